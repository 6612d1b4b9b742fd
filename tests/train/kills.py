"""Runs of one or several real processes, and ways to interrupt them; forked, so that nothing is imported again."""

import os
import random
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

from tests.helpers import (
    ATAC,
    MULTIMODAL,
    RNA,
    TRAINING,
    assert_same_records,
    assert_same_tensors,
    call,
    command_line,
    last_weights,
    records,
    weights,
)
from utils.cli import run_script
from utils.train.folders import is_there
from utils.train.guards import STOPPED
from utils.train.log import training_folder

LONG = {"epochs": 6, "patience": 0, "save_steps": 3}
STARTED = "training and"
"""Words that `fit` prints just before its first step."""


@dataclass
class Processes:
    """Forked processes that run a script or a function together; they all write their output to one file."""

    script: str | Callable
    flags: dict
    size: int
    output: Path
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


def model_folder(flags: dict) -> Path:
    return Path(flags["ckpt_dir"]) / flags.get("model_name", flags.get("model"))


def finish(script: str | Callable, flags: dict, size: int, output: Path) -> None:
    """Run a script or a function to its end, which must be a success."""
    codes = Processes(script, flags, size, output).start().join()
    if any(codes):
        raise AssertionError(f"{script}: {codes}\n{output.read_text()[-3000:]}")


def kill_and_resume(script: str, flags: dict, size: int, kills: int, seed: int, longest: float = 0.5) -> int:
    """Kill a run at random moments, resume it each time, and let it end.

    Parameters
    ----------
    longest : seconds after the first step within which it is killed

    Returns
    -------
    How many kills hit it; fewer than asked for if it was done before
    """
    rng, hits, output = random.Random(seed), 0, Path(flags["ckpt_dir"]) / "output.txt"
    resumed = lambda: flags | ({"resume": True} if is_there(training_folder(model_folder(flags)) / "state") else {})
    while hits < kills:
        processes = Processes(script, resumed(), size, output).start()
        processes.wait_until(processes.started)
        until = time.monotonic() + rng.uniform(0, longest)
        processes.wait_until(lambda until=until: time.monotonic() > until)
        processes.send(signal.SIGKILL)
        codes = processes.join()
        if codes[0] == 0:  # the process that writes was done, whatever hit the others
            return hits
        if not set(codes) <= {0, -signal.SIGKILL}:
            raise AssertionError(f"{script}: {codes}\n{output.read_text()[-3000:]}")
        hits += 1
    finish(script, resumed(), size, output)
    return hits


def stop_and_resume(script: str, flags: dict, size: int, stops: int, seed: int, longest: float = 0.3) -> int:
    """Ask a run to stop at random moments, as a scheduler does, resume it each time, and let it end.

    Returns
    -------
    How many times it was stopped; fewer than asked for if it was done before
    """
    rng, done, output = random.Random(seed), 0, Path(flags["ckpt_dir"]) / "output.txt"
    while done < stops:
        resumed = {"resume": True} if is_there(training_folder(model_folder(flags)) / "state") else {}
        processes = Processes(script, flags | resumed, size, output).start()
        processes.wait_until(processes.started)
        time.sleep(rng.uniform(0, longest))
        processes.send(rng.choice((signal.SIGTERM, signal.SIGUSR1)))
        codes = processes.join()
        if codes == [0] * size:
            return done
        if "\nsaved " in output.read_text() and set(codes) <= {0, -signal.SIGTERM, -signal.SIGUSR1}:
            break  # after the last step there is nothing to lose, and signals end a script as usual
        if codes != [STOPPED] * size:
            raise AssertionError(f"{script}: {codes}\n{output.read_text()[-3000:]}")
        done += 1
    finish(script, flags | {"resume": True}, size, output)
    return done


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Model, training state and records, to the bit."""
    assert_same_tensors(weights(ours), weights(theirs))
    assert_same_tensors(last_weights(ours), last_weights(theirs))
    assert_same_records(records(ours), records(theirs))


def training_scripts(ready: Path, runs) -> dict[str, dict]:
    """Each training script with the flags of a run of some seconds."""
    latents = {"dir_train": runs["latents"], "dir_val": runs["latents"], "model_path": runs["multimodal"]}
    encoders = {"rna_model_path": runs["rna"], "atac_model_path": runs["atac"]}
    common = {"data_path": ready, "model_name": "run"} | LONG
    celltype = {name: value for name, value in common.items() if name != "model_name"}
    return {
        "pretrain_rna": RNA | common,
        "pretrain_atac": ATAC | common,
        "pretrain_multimodal": MULTIMODAL | encoders | common,
        "pretrain_missing_mod": TRAINING | latents | common | {"epochs": 30},  # its steps are the quickest
        "train_missing_celltype_func": TRAINING
        | {"pretrained_model_path": runs["student_atac"], "model": "run"}
        | celltype,
    }
