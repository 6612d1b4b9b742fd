"""Measure how much speed training keeps beside other busy processes, and what our limit on spinning threads costs.

    python -m benchmarks.busy_neighbour

Trains an RNA encoder with `pretrain_rna.py --preset small` on simulated cells, on all threads, and counts the optimiser
steps in a fixed number of seconds after the first epoch has begun. There are four cases: with the default waiting of
OpenMP threads and with the one that our scripts set (utils/cli.py), each alone and beside busy processes that multiply
matrices on one thread. The cases take turns several times, and medians are reported. Run it on an otherwise idle
machine. Prints a table and targets, and writes busy_neighbour.json into --out_path.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.lib.bench import RESULTS, Row, save_rows
from benchmarks.lib.stages import ROOT, Stages, from_root
from utils.cells.simulate import SimulationConfig, simulate
from utils.cli import SPIN, check_numbers, flag, parse_flags, run_script
from utils.errors import UserError

# "default" sets explicitly what OpenMP does by default; the scripts do not override variables that are set.
WAITING = {"default": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}, "ours": SPIN}
BUSY = "import numpy as np\na = np.random.default_rng(0).random((500, 500))\nwhile True:\n    a @ a"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
ENDLESS = "--epochs 1000000 --val_every 1000000 --save_steps 1000000 --patience 0 --keep best"


@dataclass
class Flags:
    seconds: float = flag("seconds of training in which steps are counted", 30.0)
    repeats: int = flag("repeats of each of the four cases", 3)
    neighbours: int = flag("busy processes beside the training", 2)
    n_cells: int = flag("simulated cells to train on", 2_000)
    work_path: str = flag("folder for files", "runs/busy_neighbour")
    out_path: str = flag("folder for the result", RESULTS)


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    check_numbers(flags, "repeats", "neighbours", least=1)
    check_numbers(flags, "seconds", least=0.1)
    work = Path(flags.work_path).resolve()
    work.mkdir(parents=True, exist_ok=True)
    raw, ready = work / "cells.h5ad", work / "ready.h5ad"
    simulate(SimulationConfig(n_cells=flags.n_cells, seed=0)).mdata["rna"].write(raw)
    Stages().run(
        "preprocess", f"preprocess.py --data_path {from_root(raw)} --out_path {from_root(ready)} --target_sum 2000"
    )
    steps = {(waiting, place): [] for place in ("alone", "beside") for waiting in WAITING}
    for _ in range(flags.repeats):
        for waiting, place in steps:
            with busy(flags.neighbours if place == "beside" else 0):
                steps[waiting, place].append(count_steps(ready, work, WAITING[waiting], flags.seconds))
            print(f"{waiting}, {place}: {steps[waiting, place][-1]} steps", flush=True)
    median = {key: float(np.median(counts)) for key, counts in steps.items()}
    beside = f"beside {flags.neighbours} busy processes"
    print(f"\n| steps in {flags.seconds:g} s | alone | {beside} | share |\n|---|---|---|---|")
    for waiting in WAITING:
        alone, rest = median[waiting, "alone"], median[waiting, "beside"]
        print(f"| {waiting} | {alone:.0f} | {rest:.0f} | {rest / max(alone, 1):.2f} |")
    rows = [
        Row(
            "training alone, threads that spin shortly against OpenMP's default",
            median["ours", "alone"] / max(median["default", "alone"], 1),
            0.95,
            "times the steps",
        ),
        Row(
            f"training {beside}, against alone",
            median["ours", "beside"] / max(median["ours", "alone"], 1),
            0.30,
            "times the steps",
        ),
    ]
    counts = {f"{waiting}, {place}": count for (waiting, place), count in steps.items()}
    save_rows("busy_neighbour", rows, flags.out_path, seconds=flags.seconds, neighbours=flags.neighbours, steps=counts)


@contextmanager
def busy(n: int) -> Iterator[None]:
    """Keep n processes computing while the block runs."""
    with ExitStack() as stack:
        for _ in range(n):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY], env=os.environ | ONE_THREAD))
            stack.callback(process.kill)
        yield


def count_steps(ready: Path, work: Path, waiting: dict[str, str], seconds: float) -> int:
    """Return the optimiser steps that a training run takes in some seconds; SIGTERM stops it, as schedulers do."""
    shutil.rmtree(work / "rna", ignore_errors=True)
    shutil.rmtree(work / "rna.training", ignore_errors=True)
    command = f"pretrain_rna.py --preset small --data_path {ready} --ckpt_dir {work} --model rna --overwrite {ENDLESS}"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | waiting
    with subprocess.Popen(
        [sys.executable, *command.split()], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "epochs ×" in line:  # printed right before the first step
                time.sleep(seconds)
                process.send_signal(signal.SIGTERM)
    stopped = re.search(r"after step (\d+)", "".join(lines))
    if not stopped:
        raise UserError(f"pretrain_rna.py was not stopped as it should be: {''.join(lines).strip()}")
    return int(stopped[1])


if __name__ == "__main__":
    run_script(main)
