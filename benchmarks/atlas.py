"""Measure whether time and memory grow with the cells, no faster: cells in another order, and a million cells.

    python -m benchmarks.atlas                              # orders, then a million cells (60 GB of disk, half an hour)
    python -m benchmarks.atlas --cells 0                    # orders alone
    python -m benchmarks.atlas --cells 200000 --sizes ""    # a fifth of the second part, without the first

Orders: files of three sizes are read completely, twice, in a random order of their cells, as for paired files whose
barcodes stand in different orders: stored by cells, by cells with compression, and by features. Each is read in a
separate process.

A million cells: 20,000 human genes, about 1,500 expressed, at random, since only their number matters here.
Preprocesses the file, opens it as a training script does at its start, reads one epoch of minibatches, and labels a
tenth of the cells with the model in the box. Prints cells/s, peak memory and disk, and writes atlas.json into
--out_path.
"""

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from anndata.io import write_elem
from scipy.sparse import csr_matrix

from benchmarks.lib.bench import RESULTS, Row, save_rows
from benchmarks.lib.stages import ROOT, Stages
from benchmarks.preprocessing import simulate
from utils.cli import flag, parse_flags, run_script
from utils.memory import forget_peak_memory, peak_memory

LAYOUTS = {"by cells": {}, "by cells, compressed": {"compression": "gzip", "compression_opts": 1}, "by features": {}}
N_GENES, N_EXPRESSED = 5_000, 200
"""Of the files that are read in another order."""
MEMORY = 4
"""GB that no step may exceed."""


@dataclass
class Flags:
    sizes: str = flag(
        "comma-separated numbers of cells to read in another order; empty for none", "20000,100000,300000"
    )
    cells: int = flag("cells of the second part; 0 for none", 1_000_000)
    only: str | None = flag("one step: read PATH, or load PATH; prints JSON", None)
    work_path: str | None = flag("folder for the files; by default a temporary folder", None)
    out_path: str = flag("folder for the result", RESULTS)


def write(path: Path, n_cells: int, layout: str) -> None:
    """Write a matrix of random counts."""
    rng = np.random.default_rng(0)
    counts = csr_matrix(
        (
            rng.geometric(0.5, n_cells * N_EXPRESSED).astype(np.float32),
            np.sort(rng.integers(0, N_GENES, (n_cells, N_EXPRESSED)), axis=1).astype(np.int32).ravel(),
            np.arange(n_cells + 1) * N_EXPRESSED,
        ),
        shape=(n_cells, N_GENES),
    )
    counts.sum_duplicates()
    with h5py.File(path, "w") as file:
        content = counts.tocsc() if layout == "by features" else counts
        write_elem(file, "X", content, dataset_kwargs=LAYOUTS[layout])


def read_in_another_order(path: Path) -> dict[str, float]:
    """Read all cells twice in a random order; return seconds and the peak memory in GB."""
    from utils.files.disk_matrix import Matrix

    forget_peak_memory()
    started = time.perf_counter()
    with h5py.File(path) as file:
        matrix = Matrix(file["X"], path)
        ordered = matrix.take(np.random.default_rng(1).permutation(matrix.shape[0]))
        for _ in range(2):
            for _, block in ordered.blocks():
                block.sum()
    return {"seconds": time.perf_counter() - started, "peak_gb": peak_memory() / 1e9}


def load(path: Path) -> dict[str, float]:
    """Open a preprocessed file, identify its cells and read one epoch; return seconds of both and the peak memory."""
    from utils.cells.minibatches import Plan, make_loader, train_and_val
    from utils.cells.preprocessed import read_cells

    forget_peak_memory()
    started = time.perf_counter()
    train, _ = train_and_val(read_cells(path, ("rna",)), seed=0)
    opened = time.perf_counter()
    train.fingerprint  # noqa: B018
    identified = time.perf_counter()
    for batch in make_loader(train, Plan(train.lengths, 64, seed=0, shuffle=True)):
        len(batch)
    return {
        "open_seconds": opened - started,
        "identify_seconds": identified - opened,
        "cells_per_second": len(train) / (time.perf_counter() - identified),
        "peak_gb": peak_memory() / 1e9,
    }


def apart(what: str, path: Path) -> dict[str, float]:
    """Do one step in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.atlas", "--only", f"{what} {path}"]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def orders(sizes: list[int], folder: Path) -> tuple[list[Row], dict]:
    rows, found = [], {}
    for layout in LAYOUTS:
        per_cell = []
        for n_cells in sizes:
            path = folder / "order.h5"
            write(path, n_cells, layout)
            used = apart("read", path)
            path.unlink()
            per_cell.append(used["seconds"] / n_cells)
            found[f"{layout}, {n_cells}"] = used
            print(f"{layout}, {n_cells:,} cells: {used['seconds']:.1f} s, {used['peak_gb']:.2f} GB", flush=True)
        # Small files by features are sorted in memory, which is faster; the others tell whether time grows faster.
        work = f"another order, {layout}: time per cell, {sizes[-1]:,} cells against the slowest of fewer"
        rows.append(Row(work, per_cell[-1] / max(per_cell[:-1]), 1.3, "times", at_most=True))
    return rows, found


def million(n_cells: int, folder: Path) -> tuple[list[Row], dict]:
    stages, raw, ready, tenth = Stages(), *(folder / f"{name}.h5ad" for name in ("raw", "ready", "tenth"))
    quoted = {path: shlex.quote(str(path)) for path in (raw, ready, tenth, ROOT / "reference" / "pbmc")}
    simulate(raw, n_cells, "csr", seed=0)
    stages.run("preprocess", f"preprocess.py --data_path {quoted[raw]} --out_path {quoted[ready]}")
    disk = {path.stem: path.stat().st_size / n_cells / 1e3 for path in (raw, ready)}  # kB per cell
    raw.unlink()
    loaded = apart("load", ready)
    ready.unlink()
    simulate(tenth, n_cells // 10, "csr", seed=1)
    model = quoted[ROOT / "reference" / "pbmc"]
    stages.run(
        "predict", f"predict_cell_type.py --data_path {quoted[tenth]} --model_path {model} --min_count_coverage 0"
    )
    used = {name: {key: run[key] for key in ("seconds", "peak_memory_gb")} for name, run in stages.used.items()}
    peaks = {
        f"{n_cells:,} cells, preprocessing": used["preprocess"]["peak_memory_gb"],
        f"{n_cells:,} cells, one epoch of minibatches": loaded["peak_gb"],
        f"{n_cells // 10:,} cells, prediction": used["predict"]["peak_memory_gb"],
    }
    rows = [Row(f"{work}, peak memory", peak, MEMORY, "GB", at_most=True) for work, peak in peaks.items()]
    rates = {
        "preprocessing": n_cells / used["preprocess"]["seconds"],
        "loader": loaded["cells_per_second"],
        "prediction": n_cells / 10 / used["predict"]["seconds"],
    }
    print(", ".join(f"{work} {rate:,.0f} cells/s" for work, rate in rates.items()))
    print(f"opened in {loaded['open_seconds']:.1f} s, identified in {loaded['identify_seconds']:.1f} s")
    print(", ".join(f"{name} {size:.1f} kB per cell" for name, size in disk.items()), flush=True)
    return rows, {"cells": n_cells, "kb_per_cell": disk, "loading": loaded, "rates": rates, "scripts": used}


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    if flags.only:
        what, path = flags.only.split(" ", 1)
        print(json.dumps({"read": read_in_another_order, "load": load}[what](Path(path))))
        return
    folder = Path(tempfile.mkdtemp(dir=flags.work_path))
    rows, found = [], {}
    try:
        if flags.sizes:
            more, found["orders"] = orders(sorted(map(int, flags.sizes.split(","))), folder)
            rows += more
        if flags.cells:
            more, found["cells"] = million(flags.cells, folder)
            rows += more
    finally:
        shutil.rmtree(folder)
    save_rows("atlas", rows, flags.out_path, **found)


if __name__ == "__main__":
    run_script(main)
