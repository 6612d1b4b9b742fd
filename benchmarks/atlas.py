"""Measure whether time and memory grow with the cells, no faster: cells in another order, and a million cells.

    python -m benchmarks.atlas                                    # orders, then a million cells (65 GB of disk, hours)
    python -m benchmarks.atlas --cells 0 --translation_cells 0    # orders alone
    python -m benchmarks.atlas --cells 200000 --sizes ""          # a fifth of the second part, without the first

Orders: files of three sizes are read completely, twice, in a random order of their cells, as for paired files whose
barcodes stand in different orders: stored by cells, by cells with compression, and by features. Each is read in a
separate process.

A million cells: 20,000 human genes, about 1,500 expressed, 400,000 peaks, 4,000 open, eight types, ten batches, at
random, since only their numbers matter here. Preprocesses the two files, opens the result as a training script does at
its start, reads one epoch of minibatches, and runs some steps of stage I, both modalities, and of a cell type model,
which evaluate.py compares with its baselines on the tenth of the cells that has been set aside. The bundled model
labels as many cells. With --translation_cells of such cells, a student of some steps is trained and its translation
evaluated: of more cells evaluate.py draws some. Prints cells/s, peak memory and disk, and writes atlas.json into
--out_path.
"""

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
from anndata.io import write_elem
from scipy.sparse import csr_matrix

from benchmarks.disk import matrix_bytes, simulate_peaks
from benchmarks.lib.bench import RESULTS, Row, save_rows
from benchmarks.lib.stages import ROOT, Stages
from benchmarks.preprocessing import simulate
from utils.cli import flag, parse_flags, run_script
from utils.memory import forget_peak_memory, peak_memory

LAYOUTS = {"by cells": {}, "by cells, compressed": {"compression": "gzip", "compression_opts": 1}, "by features": {}}
N_GENES, N_EXPRESSED = 5_000, 200
"""Of the files that are read in another order."""
N_TYPES, STEPS = 8, 100
"""Types of the simulated cells, and optimiser steps of each training script."""
SIZE = "--dim 32 --depth 1 --heads 1 --dim_head 16"
"""Of the encoders: what a step costs is measured elsewhere."""
MEMORY = 4
"""GB that no step may exceed."""


@dataclass
class Flags:
    sizes: str = flag(
        "comma-separated numbers of cells to read in another order; empty for none", "20000,100000,300000"
    )
    cells: int = flag("cells of the second part; 0 for none", 1_000_000)
    translation_cells: int = flag("cells of the evaluation of a translation; 0 for none", 70_000)
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
    train, _ = train_and_val(read_cells(path, ("rna", "atac")), seed=0)
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


def write_paired(folder: Path, n_cells: int, stages: Stages, name: str) -> dict[str, float]:
    """Write <folder>/<name>.h5mu, the preprocessed cells; return kB per cell of raw and preprocessed matrices."""
    rna, atac, ready = folder / "rna.h5ad", folder / "atac.h5ad", folder / f"{name}.h5mu"
    simulate(rna, n_cells, "csr", seed=0, n_types=N_TYPES)
    simulate_peaks(atac, ad.read_h5ad(rna, backed="r").obs[[]], dtype=np.uint8)  # bytes, so that it fits on a disk
    files = f"--rna_path {quoted(rna)} --atac_path {quoted(atac)} --out_path {quoted(ready)}"
    split = "--split_by batch --test_groups 'batch 0' --val_fraction 0.01"
    stages.run(f"preprocess, {name}", f"preprocess.py {files} {split}")
    raw = {"rna, raw": matrix_bytes(rna)["all"], "atac, raw, counts as bytes": matrix_bytes(atac)["all"]}
    rna.unlink()
    atac.unlink()
    return {what: size / 1e3 for what, size in (raw | matrix_bytes(ready)).items()}


def train_briefly(folder: Path, stages: Stages, name: str) -> Callable[[str, str, str], None]:
    """Run some steps of stage I on <folder>/<name>.h5mu; return what runs a further script on it."""

    def run(script: str, model: str, flags: str) -> None:
        common = f"--preset tiny --max_steps {STEPS} --data_path {quoted(folder / f'{name}.h5mu')}"
        stages.run(
            f"{script}, {name}", f"{script}.py {common} --ckpt_dir {quoted(folder)} --{model} --overwrite {flags}"
        )

    run("pretrain_rna", f"model_name rna_{name}", f"{SIZE} --n_features 16")
    run("pretrain_atac", f"model_name atac_{name}", SIZE)
    return run


def million(n_cells: int, folder: Path, stages: Stages) -> tuple[list[Row], dict]:
    ready, tenth, types = folder / "atlas.h5mu", folder / "tenth.h5ad", folder / "types_atlas"
    disk = write_paired(folder, n_cells, stages, "atlas")
    loaded = apart("load", ready)
    run = train_briefly(folder, stages, "atlas")
    start = f"--pretrained_model_path {quoted(folder / 'rna_atlas')} --other_modality zeros"
    run("train_missing_celltype_func", f"model {types.name}", start)
    stages.run("evaluate types, atlas", f"evaluate.py --data_path {quoted(ready)} --model_path {quoted(types)}")
    ready.unlink()
    simulate(tenth, n_cells // 10, "csr", seed=1)
    box = quoted(ROOT / "reference" / "pbmc")
    stages.run(
        "label, tenth", f"predict_cell_type.py --data_path {quoted(tenth)} --model_path {box} --min_count_coverage 0"
    )
    rows = [Row(f"{n_cells:,} cells, one epoch of minibatches, peak memory", loaded["peak_gb"], MEMORY, "GB", True)]
    rates = {
        "preprocessing": n_cells / stages.used["preprocess, atlas"]["seconds"],
        "loader": loaded["cells_per_second"],
        "labelling": n_cells / 10 / stages.used["label, tenth"]["seconds"],
    }
    print(", ".join(f"{work} {rate:,.0f} cells/s" for work, rate in rates.items()))
    print(f"opened in {loaded['open_seconds']:.1f} s, identified in {loaded['identify_seconds']:.1f} s")
    print(", ".join(f"{name} {size:.1f} kB per cell" for name, size in disk.items()), flush=True)
    return rows, {"cells": n_cells, "kb_per_cell": disk, "loading": loaded, "rates": rates}


def translation(n_cells: int, folder: Path, stages: Stages) -> None:
    """Train a student for some steps, and evaluate its translation."""
    write_paired(folder, n_cells, stages, "paired")
    run, part = train_briefly(folder, stages, "paired"), lambda name: quoted(folder / name)
    run(
        "pretrain_multimodal",
        "model_name teacher",
        f"--rna_model_path {part('rna_paired')} --atac_model_path {part('atac_paired')}",
    )
    latents = f"--data_path {part('paired.h5mu')} --model_path {part('teacher')} --ckpt_dir {part('latents')}"
    stages.run("get_latent_emb, paired", f"get_latent_emb.py {latents}")
    latents = f"--dir_train {part('latents')} --dir_val {part('latents')}"
    run("pretrain_missing_mod", "model_name student", f"--model_path {part('teacher')} {latents}")
    student = f"--data_path {part('paired.h5mu')} --model_path {part('student')}"
    stages.run("evaluate translation, paired", f"evaluate.py {student}")


def quoted(path: Path) -> str:
    return shlex.quote(str(path))


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    if flags.only:
        what, path = flags.only.split(" ", 1)
        print(json.dumps({"read": read_in_another_order, "load": load}[what](Path(path))))
        return
    folder = Path(tempfile.mkdtemp(dir=flags.work_path))
    rows, found, stages = [], {}, Stages()
    try:
        if flags.sizes:
            more, found["orders"] = orders(sorted(map(int, flags.sizes.split(","))), folder)
            rows += more
        if flags.cells:
            more, found["cells"] = million(flags.cells, folder, stages)
            rows += more
        if flags.translation_cells:
            translation(flags.translation_cells, folder, stages)
    finally:
        shutil.rmtree(folder)
    found["scripts"] = {
        name: {key: run[key] for key in ("seconds", "peak_memory_gb")} for name, run in stages.used.items()
    }
    sizes = {"atlas": flags.cells, "tenth": flags.cells // 10, "paired": flags.translation_cells}
    for name, run in stages.used.items():
        work, data = name.rsplit(", ", 1)
        rows.append(
            Row(f"{sizes[data]:,} cells, {work}, peak memory", run["peak_memory_gb"], MEMORY, "GB", at_most=True)
        )
    save_rows("atlas", rows, flags.out_path, **found)


if __name__ == "__main__":
    run_script(main)
