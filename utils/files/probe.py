"""Damaged HDF5 files on which the HDF5 library never ends or crashes: in C, where no exception and no thread gets in.

So a file is looked through by a child process first, which the system ends when it computes for too long. Time that it
waits, for a slow disk or for other programs, does not count.
"""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import h5py

SECONDS = 4.0
BYTES_PER_SECOND = 1e6
"""Computing time that an item of a file may take, and how slowly more of it may be read; what is read here are names,
attributes and texts."""
DAMAGED = "is damaged (HDF5 crashes on it); copy or download it again"
SLOW = (
    "takes too long to read (HDF5 computes longer on its names and texts than fits their size); copy it to a local "
    "disk or download it again, or write it anew with anndata"
)


def problem(path: Path) -> str | None:
    """What stops the names, attributes and texts of an HDF5 file from being read, in words, or None.

    None also for files that fail with an error: they are read again, where it becomes a sentence. None where there is
    no fork.
    """
    if not hasattr(os, "fork"):
        return None
    child = os.fork()
    if not child:
        for number in (signal.SIGPROF, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # ends the process inside a loop in C, too
        with suppress(BaseException):
            most = 10 * path.stat().st_size  # a damaged item may claim any size; compressed texts grow a little
            _look_through(path, lambda size: _allow(SECONDS + min(size, most) / BYTES_PER_SECOND))
        os._exit(0)  # nothing of the parent's is flushed or closed twice
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        return None
    return SLOW if os.WTERMSIG(status) == signal.SIGPROF else DAMAGED


def _allow(seconds: float) -> None:
    """So much computing from now on, then the system ends this process."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _look_through(path: Path, allow: Callable[[float], None]) -> None:
    """Read what there is besides matrices; every item that is reached is progress, and gets its own time."""

    def visit(_, item: h5py.Group | h5py.Dataset) -> None:
        allow(0)
        with suppress(Exception):
            list(item.attrs.items())
        with suppress(Exception):
            if isinstance(item, h5py.Dataset) and h5py.check_vlen_dtype(item.dtype) is not None:
                allow(item.nbytes)
                item[()]

    allow(0)
    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)
