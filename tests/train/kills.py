"""Ways to interrupt runs of one or several processes, and to compare how they end."""

import random
import signal
import time
from pathlib import Path

from tests.helpers import (
    ATAC,
    MULTIMODAL,
    RNA,
    TRAINING,
    assert_same_records,
    assert_same_tensors,
    last_weights,
    records,
    weights,
)
from tests.processes import Processes, finish
from utils.train.folders import is_there
from utils.train.guards import STOPPED
from utils.train.log import training_folder

LONG = {"epochs": 6, "patience": 0, "save_steps": 3}


def model_folder(flags: dict) -> Path:
    return Path(flags["ckpt_dir"]) / flags.get("model_name", flags.get("model"))


def training_time(script: str, flags: dict, size: int, output: Path) -> float:
    """Let a run end, and return the seconds that it took from its first step on."""
    processes = Processes(script, flags, size, output).start()
    assert processes.wait_until(processes.started), output.read_text()
    begin = time.monotonic()
    assert processes.join() == [0] * size, output.read_text()
    return time.monotonic() - begin


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
