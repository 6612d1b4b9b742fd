"""Measure cells per second: prediction from a raw file, and training by one process and by two.

    make demo
    python -m benchmarks.throughput --model_path demo_output/runs/celltype_student

Labels 10,000 simulated cells (RNA, raw .h5ad) with the demo's model on all threads, timed from the start of the script
to the written file. Then trains the demo's RNA encoder for one epoch, by one process with one thread and by two (gloo),
three times in turn; the rate comes from the training log, and the median is taken. Prints targets and measured values,
and writes throughput.json into --out_path.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.lib.bench import RESULTS, Row, save_rows
from benchmarks.lib.stages import ROOT, Stages
from utils.cells.simulate import SimulationConfig, simulate
from utils.cli import flag, parse_flags, run_script

TRAINING = (
    "--tokens expressed --dim 64 --depth 2 --heads 2 --dim_head 32 --epochs 1 --grad_acc 1 --overwrite --model_name rna"
)


@dataclass
class Flags:
    model_path: str = flag("the demo's cell type model", "demo_output/runs/celltype_student")
    n_cells: int = flag("cells to label", 10_000)
    n_training: int = flag("simulated cells to train on", 1_000)
    repeats: int = flag("repeats of the training", 3)
    work_path: str = flag("folder for files", "runs/throughput")
    out_path: str = flag("folder for the result", RESULTS)


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    if not Path(flags.model_path).is_dir():
        print(f"skipped: {flags.model_path} does not exist; run make demo first, or give --model_path")
        return
    out = Path(flags.work_path).resolve()
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages()
    raw = out / "cells.h5ad"
    # The same seed as the demo, so that the cells have the genes of its model.
    simulate(SimulationConfig(n_cells=flags.n_cells, seed=0)).mdata["rna"].write(raw)
    model = shlex.quote(str(Path(flags.model_path).resolve()))
    stages.run("predict", f"predict_cell_type.py --data_path {shlex.quote(str(raw))} --model_path {model}")
    used = stages.used["predict"]
    work = f"prediction of {flags.n_cells:,} raw cells, whole script"
    rows = [
        Row(work, flags.n_cells / used["seconds"], 300, "cells/s"),
        Row(f"{work}, peak memory", used["peak_memory_gb"], 2, "GB", at_most=True),
    ]

    simulate(SimulationConfig(n_cells=flags.n_training, seed=0)).mdata["rna"].write(raw)
    ready = out / "ready.h5ad"
    paths = f"--data_path {shlex.quote(str(raw))} --out_path {shlex.quote(str(ready))}"
    stages.run("preprocess", f"preprocess.py {paths} --target_sum 2000")
    rates = {1: [], 2: []}
    for _ in range(flags.repeats):
        for size in rates:
            rates[size].append(train(size, ready, out))
    gain = float(np.median(rates[2]) / np.median(rates[1]))
    rows.append(Row("training by two processes of one thread against one", gain, 1.7, "times the cells/s"))
    print(f"training, cells/s: {np.median(rates[1]):.1f} by one process, {np.median(rates[2]):.1f} by two")
    save_rows("throughput", rows, flags.out_path, rates=rates)


def train(size: int, ready: Path, out: Path) -> float:
    """Train one epoch by `size` processes with 16 cells per step; return the cells per second."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    flags = ["--data_path", str(ready), "--ckpt_dir", str(out), "--batch_size", str(16 // size), *TRAINING.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    shutil.rmtree(out / "rna", ignore_errors=True)
    subprocess.run([*launcher, "pretrain_rna.py", *flags], cwd=ROOT, env=environment, check=True)
    lines = [json.loads(line) for line in (out / "rna" / "metrics.jsonl").read_text().splitlines()]
    return next(line["cells_per_second"] for line in lines if line["phase"] == "train")


if __name__ == "__main__":
    run_script(main)
