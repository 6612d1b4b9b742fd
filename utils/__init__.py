"""Everything between files and models."""

__version__ = "0.2.0"
