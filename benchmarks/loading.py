"""Measure how fast cells are read from a file in random order, and how much memory that takes.

    python -m benchmarks.loading

Writes preprocessed .h5ad files of 20,000 and of 200,000 cells (20,000 genes, 2,000 expressed per cell, at random, since
only their number matters here). Each file is read from the page cache by the loader of the training loop, in a separate
process. Then a simulated consumer takes minibatches at the speed of an H100, and the time that it waits is measured: at
25 % of 990 TFLOP/s (bfloat16, dense), a training step of such a cell at the published size (three times 36 GFLOP) takes
1/2,270 s. The files take 3.5 GB and are deleted afterwards. Writes loading.json into --out_path.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from benchmarks.lib.bench import RESULTS, Row, save_rows
from utils.cells.minibatches import CellDataset, Plan, make_loader
from utils.cells.preprocessed import STAMP, STAMP_VERSION, read_cells
from utils.cli import flag, parse_flags, run_script
from utils.files.disk_rows import FileRows, select
from utils.files.write import write_in_blocks
from utils.memory import forget_peak_memory, peak_memory

N_GENES, N_EXPRESSED, BLOCK, BATCH = 20_000, 2_000, 5_000, 32
CONSUMER = 0.25 * 990e12 / 109e9  # cells/s of the simulated consumer


@dataclass
class Flags:
    sizes: str = flag("comma-separated numbers of cells", "20000,200000")
    seconds: float = flag("seconds of each measurement", 10.0)
    only: str | None = flag("measure only this file and print JSON", None)
    work_path: str | None = flag("folder for the files; by default a temporary folder", None)
    out_path: str = flag("folder for the result", RESULTS)


def write(path: Path, n_cells: int) -> None:
    """Write a file like those of preprocess.py."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"split": "train"}, index=[f"cell{i}" for i in range(n_cells)])
    frame = ad.AnnData(obs=obs, var=pd.DataFrame(index=[f"gene{i:05}" for i in range(N_GENES)]))
    stamp = {"version": STAMP_VERSION, "log_base": 2, "label_column": None, "target_sum": 1e4}
    with write_in_blocks(path, {"rna": frame}, obs, {STAMP: json.dumps(stamp)}) as file:
        for start in range(0, n_cells, BLOCK):
            shape = min(BLOCK, n_cells - start), N_GENES
            is_expressed = rng.random(shape, dtype=np.float32) < N_EXPRESSED / N_GENES
            block = csr_matrix(is_expressed, dtype=np.float32)
            block.data = rng.uniform(1, 6, block.nnz).astype(np.float32)
            file.append("rna", X=block)


def watch(path: str, seconds: float) -> dict:
    """Measure the loader's cells per second at full speed, and the share of time that a paced consumer waits for it."""
    cells = read_cells(path, ("rna",))
    assert isinstance(cells.values["rna"], FileRows)
    rows = cells.rows("train")
    dataset = CellDataset({"rna": select(cells.values["rna"], rows)}, cells.obs.index[rows])
    found = {}
    for pace in (None, CONSUMER):
        plan = Plan(dataset.lengths, BATCH, seed=0, shuffle=True)
        n, waited, warm_up = 0, 0.0, 20
        start = asked = time.perf_counter()
        for i, _ in enumerate(endless(dataset, plan)):
            now = time.perf_counter()
            if i == warm_up:
                start = now
            elif i > warm_up:
                n, waited = n + BATCH, waited + now - asked
                if now - start > seconds:
                    break
            if pace:
                time.sleep(BATCH / pace)
            asked = time.perf_counter()
        found |= {"cells_per_second": n / (now - start)} if pace is None else {"waiting": waited / (now - start)}
    found["peak_mb"] = peak_memory() / 2**20
    return found


def endless(dataset: CellDataset, plan: Plan):
    """Yield minibatches epoch after epoch, without end."""
    while True:
        yield from make_loader(dataset, plan)
        plan.epoch += 1


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    if flags.only:
        print(json.dumps(watch(flags.only, flags.seconds)))
        return
    found = {}
    with tempfile.TemporaryDirectory(dir=flags.work_path) as folder:
        for n_cells in map(int, flags.sizes.split(",")):
            path = Path(folder) / f"{n_cells}.h5ad"
            write(path, n_cells)
            size = path.stat().st_size / 1e6
            with path.open("rb") as file:  # into the page cache
                while file.read(2**24):
                    pass
            forget_peak_memory()
            command = [sys.executable, "-m", "benchmarks.loading", "--only", str(path), "--seconds", str(flags.seconds)]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            found[n_cells] = json.loads(run.stdout.splitlines()[-1]) | {"file_mb": size}
            measured = ", ".join(f"{name} {value:,.4g}" for name, value in found[n_cells].items())
            print(f"{n_cells:,} cells: {measured}", flush=True)
            path.unlink()
    small, large = found[min(found)], found[max(found)]
    rows = [
        Row("cells from a file in the page cache, shuffled by blocks", large["cells_per_second"], 20_000, "cells/s"),
        Row(
            "waiting for the loader, consumer simulated at 2,270 cells/s",
            100 * large["waiting"],
            10,
            "% of the time",
            at_most=True,
        ),
        Row(
            f"peak memory, {max(found):,} cells against {min(found):,}",
            large["peak_mb"] / small["peak_mb"],
            1.1,
            "times",
            at_most=True,
        ),
    ]
    save_rows("loading", rows, flags.out_path, runs=found)


if __name__ == "__main__":
    run_script(main)
