"""Real processes for tests, forked from this one so that nothing is imported again."""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from tests.helpers import call, command_line
from utils.cli import run_script

STARTED = "training and"
"""Words that `fit` prints just before its first step."""


@dataclass
class Processes:
    """Forked processes that run a script or a function together; they all write their output to one file."""

    script: str | Callable
    flags: dict
    size: int
    output: Path
    before: Callable[[], None] | None = None  # called first in each process
    pids: list[int] = field(default_factory=list)

    def start(self) -> "Processes":
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        self.output.write_text("")
        for rank in range(self.size):
            pid = os.fork()
            if not pid:
                self._child(rank, port)
            self.pids.append(pid)
        return self

    def _child(self, rank: int, port: int) -> None:
        code = 1
        try:
            out = os.open(self.output, os.O_WRONLY | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            if self.size > 1:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.size)}
            # tqdm's lock is shared with the parent: a process killed while it holds it would stop all that come after.
            tqdm.set_lock(threading.RLock())
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where tests run in the background
            if self.before:
                self.before()
            if callable(self.script):
                sys.argv = [self.script.__name__]  # by which error messages begin
                run_script(lambda: self.script(**self.flags))
            else:
                call(self.script, *command_line(self.flags))
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60) -> bool:
        """Wait; returns whether the condition came true while all processes lived."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            if any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in self.pids):
                return condition()
            time.sleep(0.002)
        return False

    def started(self) -> bool:
        return STARTED in self.output.read_text()

    def send(self, number: int) -> None:
        for pid in self.pids:
            os.kill(pid, number)

    def join(self, seconds: float = 120) -> list[int]:
        """Exit codes; a signal's number is negative. Processes that do not end are killed, and that is an error."""
        codes, end = {}, time.monotonic() + seconds
        while len(codes) < len(self.pids):
            for pid in set(self.pids) - set(codes):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                for pid in set(self.pids) - set(codes):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                raise AssertionError(
                    f"{self.script}: did not end within {seconds} s\n{self.output.read_text()[-3000:]}"
                )
            time.sleep(0.002)
        return [codes[pid] for pid in self.pids]


def finish(script: str | Callable, flags: dict, size: int, output: Path) -> None:
    """Run a script or a function to its end, which must be a success."""
    codes = Processes(script, flags, size, output).start().join()
    if any(codes):
        raise AssertionError(f"{script}: {codes}\n{output.read_text()[-3000:]}")
