"""Damaged HDF5 files on which the HDF5 library never ends or crashes: in C, where no exception and no thread gets in.

So a file is looked through by a child process first, which the system ends when its time is up.
"""

import os
import signal
from contextlib import suppress
from pathlib import Path

import h5py

SECONDS, MOST_SECONDS = 4.0, 60.0
BYTES_PER_SECOND = 1e6
"""How slowly a file may be read before it counts as one that never ends; all that is read here are names and texts."""


def ends(path: Path) -> bool:
    """Whether the names, attributes and texts of an HDF5 file can be read in a time that fits its size.

    True also for files that fail with an error: they are read again, where it becomes a sentence. True where there is
    no fork.
    """
    if not hasattr(os, "fork"):
        return True
    seconds = min(SECONDS + path.stat().st_size / BYTES_PER_SECOND, MOST_SECONDS)
    child = os.fork()
    if not child:
        for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # ends the process inside a loop in C, too
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with suppress(BaseException):
            _look_through(path)
        os._exit(0)  # nothing of the parent's is flushed or closed twice
    return not os.WIFSIGNALED(os.waitpid(child, 0)[1])


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
