"""Memory of this process, as the system counts it."""

import resource
import sys
from contextlib import suppress
from pathlib import Path


def forget_peak_memory() -> None:
    """Set this process's peak to what it uses now; on Linux a process inherits the peak of the one that starts it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Largest resident memory of this process in bytes; since it was last forgotten, on Linux."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
