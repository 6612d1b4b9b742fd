"""Real processes for tests. They start from a server that has imported the slow libraries once.

A fork of the test process itself would not do: a library that has started OpenMP's threads there stops or hangs in the
child.
"""

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.helpers import call, command_line
from utils.cli import run_script

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.helpers", "tests.builders", "scanpy", "sklearn", "matplotlib"])

STARTED = "training and"
"""Words that `fit` prints just before its first step."""


def free_port() -> int:
    """Return a port that nobody listens on, below those that the system gives to outgoing connections.

    One of the system's could be given to a connection of another test before the first process listens on it.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free:
            try:
                free.bind(("", port))
            except OSError:
                continue
            return port


@dataclass
class Processes:
    """Processes that run a script or a function of a module together; they all write their output to one file."""

    script: str | Callable
    flags: dict
    size: int
    output: Path
    before: Callable[[], None] | None = None  # called first in each process

    def start(self) -> "Processes":
        port = free_port()
        self.output.write_text("")
        self._processes = [SERVER.Process(target=self._child, args=(rank, port)) for rank in range(self.size)]
        for process in self._processes:
            process.start()
        return self

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_processes"}  # they cannot be pickled

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

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
            torch.set_num_threads(1)
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
            if any(process.exitcode is not None for process in self._processes):
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
        end = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(end - time.monotonic(), 0))
        late = [process for process in self._processes if process.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        if late:
            raise AssertionError(f"{self.script}: did not end within {seconds} s\n{self.output.read_text()[-3000:]}")
        return [process.exitcode for process in self._processes]


def finish(script: str | Callable, flags: dict, size: int, output: Path) -> None:
    """Run a script or a function to its end, which must be a success."""
    codes = Processes(script, flags, size, output).start().join()
    if any(codes):
        raise AssertionError(f"{script}: {codes}\n{output.read_text()[-3000:]}")
