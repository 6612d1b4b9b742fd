"""The other tasks of the paper, one module each, run as `python -m downstream.NAME`."""
