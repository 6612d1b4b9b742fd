"""Damaged HDF5 files on which the HDF5 library never ends: a loop in C that no exception, signal or thread can leave.

So a file is looked through by a child process first, which can be ended.
"""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import h5py

SECONDS = 4.0
BYTES_PER_SECOND = 1e6
"""How slowly a file may be read before it counts as one that never ends; all that is read here are names and texts."""


def ends(path: Path) -> bool:
    """Whether the names, attributes and texts of an HDF5 file can be read in a time that fits its size.

    True also for files that fail: they are read again, where an error has a sentence. True where there is no fork.
    """
    if not hasattr(os, "fork"):
        return True
    child = os.fork()
    if not child:
        with suppress(BaseException):
            _look_through(path)
        os._exit(0)  # nothing of the parent's is flushed or closed twice
    end = time.monotonic() + SECONDS + path.stat().st_size / BYTES_PER_SECOND
    pause = 0.001
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return True


def _look_through(path: Path) -> None:
    def visit(_, item: h5py.Group | h5py.Dataset) -> None:
        with suppress(Exception):
            list(item.attrs.items())
        with suppress(Exception):
            if isinstance(item, h5py.Dataset) and h5py.check_vlen_dtype(item.dtype) is not None:
                item[()]

    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)
