"""Running the scripts one after the other, and keeping what each cost."""

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
    """A path as scripts that run in the repository see it, quoted: commands that are kept name no machine's folders."""
    return shlex.quote(os.path.relpath(path, ROOT))


class Stages:
    """Runs scripts and keeps their time, memory and command.

    Parameters
    ----------
    path : of a file that remembers, so that stages which have run by the same command are not run again; by another,
        a stage is run, and so are those that came after it

    Attributes
    ----------
    used : stage → seconds (wall clock), peak_memory_gb (resident, of the script's process), command
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.used: dict[str, dict] = json.loads(path.read_text()) if path and path.is_file() else {}

    def run(self, name: str, command: str) -> None:
        """Run `python <command>`, written as for a shell; its output is shown.

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
            self._keep()  # now: should the script be stopped, its folder is neither the old model nor the new one
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
        self._keep()

    def _keep(self) -> None:
        if self.path:
            whole = self.path.with_suffix(".part")
            whole.write_text(json.dumps(self.used, indent=1))
            whole.replace(self.path)
