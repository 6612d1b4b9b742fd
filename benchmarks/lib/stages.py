"""Run scripts one after the other, and record the time and memory that each takes."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from utils.errors import UserError
from utils.memory import forget_peak_memory

ROOT = Path(__file__).resolve().parents[2]


def from_root(path: Path) -> str:
    """Return a path relative to the repository, quoted for a shell.

    Scripts run in the repository, and recorded commands should not contain the folders of one machine.
    """
    return shlex.quote(os.path.relpath(path, ROOT))


class Stages:
    """Runs scripts and records their time, memory and command.

    Parameters
    ----------
    path : JSON file for the records, so that an interrupted series of stages can be continued. A stage is not run again
        if it is recorded with the same command. If its command has changed, it and all stages after it are run again

    Attributes
    ----------
    used : stage → seconds (wall-clock time), peak_memory_gb (resident memory of the script's process) and command
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.used: dict[str, dict] = json.loads(path.read_text()) if path and path.is_file() else {}

    def run(self, name: str, command: str) -> None:
        """Run a stage and show its output, unless it is recorded already.

        Parameters
        ----------
        name : name of the stage
        command : the script and its flags, as in a shell, without `python`

        Raises
        ------
        UserError
            If the script fails.
        """
        if self.used.get(name, {}).get("command") == f"python {command}":
            print(f"\n{name}: has run already", flush=True)
            return
        if name in self.used:
            names = list(self.used)
            for later in names[names.index(name) :]:
                del self.used[later]
            self._save()  # before the run: if it is interrupted, the stage's folder no longer holds the old result
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
        self._save()

    def _save(self) -> None:
        if self.path:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.used, indent=1))
            part.replace(self.path)  # an interruption leaves the old file or the new one
