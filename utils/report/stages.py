"""Running the scripts one after the other, and keeping what each cost."""

import os
import resource
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def forget_peak_memory() -> None:
    """Let this process's peak be what it uses now: on Linux a process inherits the peak of the one that starts it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Largest resident memory of this process in bytes; since it was last forgotten where the system tells (Linux)."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stages:
    """Runs scripts and keeps their time, memory and command.

    Attributes
    ----------
    used : stage → seconds (wall clock), peak_memory_gb (resident, of the script's process), command
    """

    def __init__(self):
        self.used: dict[str, dict] = {}

    def run(self, name: str, command: str) -> None:
        """Run `python <command>`, written as for a shell; its output is shown.

        Raises
        ------
        UserError
            If the script fails.
        """
        print(f"\n[{len(self.used) + 1}] {name}\n$ python {command}", flush=True)
        forget_peak_memory()
        started = time.monotonic()
        process = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise UserError(f"{name} failed (its message stands above); the command was: python {command}")
        scale = 1024 if sys.platform != "darwin" else 1  # Linux counts kilobytes, macOS bytes
        self.used[name] = {
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_gb": round(usage.ru_maxrss * scale / 1e9, 2),
            "command": f"python {command}",
        }
