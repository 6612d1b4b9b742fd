"""Run one fold of the study on RNA alone, with few human cells.

    python -m benchmarks.rna_only --data immune --fold 0
    python -m benchmarks.rna_only --data pbmc_3tech --fold 2 --seeds 0,1

    immune       immune cells of tumours; a fold sets a fifth of each type's cells aside
    pbmc68k      scanpy's pbmc68k_reduced; likewise
    pbmc_3tech   blood by three chemistries; a fold sets a chemistry aside, and there are rows for few labels, too

A type with a single cell is always in training. Stages I and II are trained on the training cells without labels, then
the cell type model, which is compared with the baselines of evaluate.py (part types), with itself after simple
classifiers have been mixed in, where validation cells say that it helps (part mixed: --mix_baselines auto) or where
batches left out do (part across: --calibrate_across, too; blood alone, all labels), and with one that starts from
stage I (part stage_one).
Adds its rows to <data>_fold<f>_<part>.csv, for benchmarks/study.py; what a file has already is not run again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad

from benchmarks.lib import fine_tune
from benchmarks.lib.bench import RESULTS
from benchmarks.lib.stages import Stages, from_root
from benchmarks.lib.study import ACROSS, MIXED, OURS, add_rows, done_in, scores_in
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError
from utils.files.write import write_whole

N_FOLDS = 5
CHEMISTRIES = ("3pv1", "3pv2", "5p")
FILES = {"immune": "immune_rna.h5ad", "pbmc_3tech": "scrna/pbmc_3tech.h5ad"}
FEW_LABELS = {"pbmc_3tech": (10, 30)}
"""Data set → numbers of labels per type, beside all of them."""
BATCHES = {"pbmc_3tech": "batch"}
"""Data set → the column with its batches."""
# Added to --preset small: with few cells, more epochs.
PARTS = {"types": OURS, "mixed": MIXED, "across": ACROSS, "stage_one": "scMomer without stage II"}
"""Part → what its rows call our model."""
STAGE_ONE = "--epochs 20 --cycle_epochs 19"
STAGE_TWO = "--epochs 40 --cycle_epochs 39"
FINE_TUNE = "--epochs 40 --cycle_epochs 39"


@dataclass
class Flags:
    data: Literal["immune", "pbmc68k", "pbmc_3tech"] = flag("data set", "immune")
    data_path: str = flag("folder with immune_rna.h5ad and scrna/; pbmc68k comes with scanpy", "../shared/data")
    out_path: str | None = flag("folder for the models; by default runs/rna_only/<data>_fold<f>_seed<s>", None)
    fold: int = flag("which fifth of the cells, or which chemistry, is set aside for testing, from 0", 0)
    seeds: str = flag("of the choice of validation cells and labels and of all training, separated by commas", "0")
    parts: str = flag(f"what to run, a comma-separated list of {', '.join(PARTS)}", ",".join(PARTS))
    results_path: str = flag("folder for the CSV files", f"{RESULTS}/study")

    def __post_init__(self):
        if unknown := [part for part in self.parts.split(",") if part not in PARTS]:
            raise UserError(f"--parts {self.parts}: {unknown[0]!r} is none of {', '.join(PARTS)}")
        n_folds = len(CHEMISTRIES) if self.data == "pbmc_3tech" else N_FOLDS
        if not 0 <= self.fold < n_folds:
            raise UserError(f"--fold {self.fold} must be between 0 and {n_folds - 1}")
        if not all(seed.isdigit() for seed in self.seeds.split(",")):
            raise UserError(f"--seeds {self.seeds}: give whole numbers, separated by commas")


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    for part in flags.parts.split(","):
        path = Path(flags.results_path) / f"{flags.data}_fold{flags.fold}_{part}.csv"
        for seed in map(int, flags.seeds.split(",")):
            numbers = (0, *FEW_LABELS.get(flags.data, ()))
            if part == "across":  # it does not go with labels that come from another model
                numbers = (0,) if flags.data in BATCHES else ()
            todo = [n for n in numbers if (seed, n) not in done_in(path)]
            if not todo:
                why = f"has the rows of seed {seed} already; to make them again, delete it"
                print(f"{path}: {why if numbers else f'{flags.data} has no batches to leave out'}")
                continue
            out = Path(flags.out_path or f"runs/rna_only/{flags.data}_fold{flags.fold}_seed{seed}").resolve()
            cells = read(flags.data, Path(flags.data_path))
            across = f"{fine_tune.MIX} --calibrate_across {BATCHES.get(flags.data)}"
            mix = {"mixed": fine_tune.MIX, "across": across}.get(part)
            for n, rows in run(part, cells, flags.fold, seed, out, todo, mix):
                add_rows(path, rows)
                print(f"\nwrote {path}: {n or 'all'} labels")


def read(data: str, folder: Path) -> AnnData:
    """Return the cells of a data set, with the column that says in which fold each is a test cell."""
    if data == "pbmc68k":
        adata = pbmc68k()
    elif (folder / FILES[data]).is_file():
        adata = read_h5ad(folder / FILES[data])
    else:
        raise UserError(f"--data_path {folder}: has no {FILES[data]}; give the folder with it, or use --data pbmc68k")
    if data == "pbmc_3tech":
        adata.obs["fold"] = [str(CHEMISTRIES.index(batch)) for batch in adata.obs["batch"]]
    else:
        adata.obs["fold"] = folds(adata.obs["cell_type"].astype(str).to_numpy())
    return adata


def run(part: str, adata: AnnData, fold: int, seed: int, out: Path, numbers: list[int], mix: str | None = None):
    """Train and evaluate with each number of labels per type (0 for all); yield the number and the rows.

    With `mix`, flags that mix simple classifiers in, copies of the models are mixed and evaluated.
    """
    if not (out / "raw.h5ad").is_file():
        write_whole(adata, out / "raw.h5ad")
    stages, path = Stages(out / "stages.json"), lambda name: from_root(out / name)
    stages.run(
        "preprocess",
        f"preprocess.py --data_path {path('raw.h5ad')} --out_path {path('ready.h5ad')} --split_by fold "
        f"--test_groups {fold} --target_sum median --seed {seed}",
    )
    data, seeded = f"--data_path {path('ready.h5ad')}", f"--seed {seed} --preset small"
    common = f"{data} --ckpt_dir {path('')} {seeded} --overwrite"
    stages.run("stage I", f"pretrain_rna.py {common} --model_name rna {STAGE_ONE}")
    kind, parent = ("celltype", "rna") if part == "stage_one" else ("denoised", "denoiser")
    if parent == "denoiser":
        join = f"pretrain_multimodal.py {common} --model_name {parent} --rna_model_path {path('rna')} {STAGE_TWO}"
        stages.run("stage II", join)
    fit = f"train_missing_celltype_func.py {data} {seeded} --pretrained_model_path {path(parent)}"
    fit += " --other_modality zeros --grad_acc 1"

    def tuned(title: str, name: str, flags: str) -> Path:
        """Run fine-tuning once, the model alone or a copy of it with simple classifiers mixed in; return its folder."""
        own = f"--ckpt_dir {path('')} --overwrite --model {name} {flags} {fine_tune.ALONE}"
        stages.run(f"fine-tune {title}", f"{fit} {own}")
        if not mix:
            return out / name
        mixing = f"mix {title}" if part == "mixed" else f"mix {part}, {title}"
        fine_tune.copy_to_mix(stages, mixing, out, name, part)
        stages.run(mixing, f"{fit} --ckpt_dir {path(part)} --model {name} {flags} {mix}")
        return out / part / name

    for n in numbers:
        name, flags, title = f"{kind}_{n}" if n else kind, FINE_TUNE, f"{kind}, {n or 'all'} labels"
        if n:
            first = tuned(f"{title} alone", f"{name}_alone", fine_tune.alone(n))
            if not (of_mixture := mix and fine_tune.is_mixed(first)):
                first = out / f"{name}_alone"  # whose labels are the same, so that its second training serves, too
            flags = f"{FINE_TUNE} {fine_tune.on_all_cells(n, from_root(first))}"
            if of_mixture:
                name, title = f"{name}{fine_tune.RELABELLED}", f"{title}, labels of a mixture"
        model, more = tuned(title, name, flags), " --model_alone" * (part != "types")
        stage = f"evaluate {part} {title}" if mix else f"evaluate {title}"
        stages.run(stage, f"evaluate.py {data} --model_path {from_root(model)}{more}")
        yield n, scores_in(model, PARTS[part], seed, n)


def pbmc68k() -> AnnData:
    """Return scanpy's 700 human blood cells with log values of the 765 genes in `raw`; types are its bulk labels."""
    from scanpy.datasets import pbmc68k_reduced

    raw = pbmc68k_reduced()
    types = raw.obs["bulk_labels"].astype(str).to_numpy()
    return AnnData(raw.raw.X.copy(), pd.DataFrame({"cell_type": types}, index=raw.obs_names), raw.raw.var[[]].copy())


def folds(types: np.ndarray) -> np.ndarray:
    """Return for each cell the fold in which it is a test cell, as text [cells]; "-" for types with a single cell.

    The cells of each type are shuffled, always in the same way, and dealt to the folds in turn.
    """
    rng, fold, turn = np.random.default_rng(0), np.full(len(types), "-", dtype=object), 0
    for kind in sorted(set(types)):
        rows = rng.permutation(np.flatnonzero(types == kind))
        if len(rows) > 1:
            fold[rows] = [str((turn + i) % N_FOLDS) for i in range(len(rows))]
            turn += len(rows)
    return fold


if __name__ == "__main__":
    run_script(main)
