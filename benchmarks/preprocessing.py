"""Measure the speed and memory of preprocess.py at 20,000, 60,000 and 200,000 cells.

    python -m benchmarks.preprocessing --out_path runs/preprocessing

Simulates .h5ad files of 20,000 genes with about 1,500 expressed per cell (at random, since only their number matters
here) and preprocesses each in a separate process. Prints cells per second and peak resident memory, and writes them to
preprocessing.json. The file of 200,000 cells takes about 2.5 GB, and its preprocessed file about 2 GB; both are deleted
afterwards.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import sparse_dataset, write_elem
from scipy.sparse import csr_matrix, vstack

from benchmarks.lib.stages import ROOT
from utils.cli import flag, parse_flags, run_script
from utils.features.gene_symbols import load_gene_table
from utils.memory import forget_peak_memory

N_GENES, N_EXPRESSED, BLOCK = 20_000, 1_500, 5_000


@dataclass
class Flags:
    out_path: str = flag("folder for the files and the result", "runs/preprocessing")
    sizes: str = flag("comma-separated numbers of cells", "20000,60000,200000")
    layout: str = flag("layout of the counts on disk: csr, csc or dense", "csr")
    seed: int = flag("random seed of the simulated counts", 0)


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    out = Path(flags.out_path)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for n_cells in map(int, flags.sizes.split(",")):
        raw, ready = out / f"{n_cells}.h5ad", out / f"{n_cells}.ready.h5ad"
        try:
            simulate(raw, n_cells, flags.layout, flags.seed)
            seconds, memory = preprocess(raw, ready)
        finally:
            raw.unlink(missing_ok=True)
            ready.unlink(missing_ok=True)
        rows.append({"cells": n_cells, "seconds": seconds, "cells_per_second": n_cells / seconds, "peak_mb": memory})
        print(
            f"{n_cells:>8,} cells  {seconds:6.1f} s  {n_cells / seconds:7,.0f} cells/s  {memory:6,.0f} MB", flush=True
        )
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    result = {"genes": N_GENES, "expressed": N_EXPRESSED, "layout": flags.layout, "machine": machine, "runs": rows}
    (out / "preprocessing.json").write_text(json.dumps(result, indent=1))


def simulate(path: Path, n_cells: int, layout: str, seed: int, n_types: int = 1) -> None:
    """Write a file with counts of independent genes, whose rates of expression span orders of magnitude.

    With several types, each expresses genes of its own twice as often; obs["batch"] has ten batches.
    """
    rng = np.random.default_rng(seed)
    rate = rng.lognormal(0, 1, N_GENES)
    rate = np.minimum(rate * N_EXPRESSED / rate.sum(), 0.95).astype(np.float32)
    types = np.random.default_rng([seed, n_types]).integers(n_types, size=n_cells)
    more = 1 + (np.arange(N_GENES) % n_types == np.arange(n_types)[:, None])  # [types, genes] 1 or 2
    rates = np.minimum(rate * more / more.mean(0), 0.95).astype(np.float32)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)])
    if n_types > 1:
        obs["cell_type"] = pd.Categorical([f"type {t}" for t in types])
        obs["batch"] = pd.Categorical([f"batch {i * 10 // n_cells}" for i in range(n_cells)])
    frame = ad.AnnData(obs=obs, var=pd.DataFrame(index=load_gene_table()["symbol"].to_numpy()[:N_GENES]))

    def draw(start: int) -> csr_matrix:
        here = types[start : start + BLOCK]
        expressed = csr_matrix(rng.random((len(here), N_GENES), dtype=np.float32) < rates[here], dtype=np.float32)
        expressed.data = rng.geometric(0.5, expressed.nnz).astype(np.float32)
        return expressed

    blocks = (draw(start) for start in range(0, n_cells, BLOCK))
    if layout == "csr":
        write_blocks(path, frame, blocks)
    else:  # these layouts are made in memory
        counts = vstack(list(blocks), format="csr")
        frame.X = counts.tocsc() if layout == "csc" else counts.toarray()
        frame.write(path)


def write_blocks(path: Path, frame: ad.AnnData, blocks: Iterator[csr_matrix]) -> None:
    """Write an .h5ad whose counts come in blocks of cells, uncompressed, as anndata writes them."""
    frame.write(path)
    with h5py.File(path, "r+") as file:
        write_elem(file, "X", next(blocks), dataset_kwargs={"indptr_dtype": np.int64, "chunks": (2**16,)})
        for block in blocks:
            sparse_dataset(file["X"]).append(block)


def preprocess(raw: Path, ready: Path) -> tuple[float, float]:
    """Run preprocess.py in a separate process; return its seconds and its peak resident memory in MB."""
    command = [sys.executable, "preprocess.py", "--data_path", str(raw.resolve()), "--out_path", str(ready.resolve())]
    start = time.perf_counter()
    forget_peak_memory()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"preprocess.py failed with status {status}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


if __name__ == "__main__":
    run_script(main)
