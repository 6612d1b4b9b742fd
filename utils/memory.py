"""Measure the memory of this process, as counted by the operating system, and give freed memory back to it."""

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path


def forget_peak_memory() -> None:
    """Reset the peak to the memory in use now (Linux only; a no-op elsewhere).

    On Linux a process inherits the peak of its parent, so a parent resets its own peak before it starts a child.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def release_memory() -> None:
    """Give freed memory back to the system (glibc only; a no-op elsewhere).

    The C library keeps what arrays of changing size have left, in pieces: over many blocks of cells they add up.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_memory() -> float:
    """Return the largest resident memory of this process in bytes; on Linux, since `forget_peak_memory`."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
