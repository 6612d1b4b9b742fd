"""Run one fold and one seed of the study on RNA-only data: immune_rna.h5ad or scanpy's pbmc68k_reduced.

    python -m benchmarks.rna_only --data immune --data_path immune_rna.h5ad --fold 0 --seed 0
    python -m benchmarks.rna_only --data pbmc68k --fold 0 --seed 0

Both files have a few hundred human cells without batches. A fold sets a fifth of each type's cells aside for testing; a
type with a single cell is always in training. Stage I is trained on the training cells without labels, then the cell
type model, which is compared with baselines. Adds its rows to <data>_fold<f>_types.csv, for benchmarks/study.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad

from benchmarks.lib.bench import RESULTS
from benchmarks.lib.stages import Stages, from_root
from benchmarks.lib.study import add_rows, scores_in
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError
from utils.files.write import write_whole

N_FOLDS = 5
# Added to --preset small: with few cells, more epochs.
STAGE_ONE = "--epochs 20 --cycle_epochs 19"
FINE_TUNE = "--epochs 40 --cycle_epochs 39 --grad_acc 1"


@dataclass
class Flags:
    data: Literal["immune", "pbmc68k"] = flag("data set", "immune")
    data_path: str = flag("path of immune_rna.h5ad; pbmc68k comes with scanpy", "../shared/data/immune_rna.h5ad")
    out_path: str | None = flag("folder for the models; by default runs/rna_only/<data>_fold<f>_seed<s>", None)
    fold: int = flag(f"which fifth of the cells is set aside for testing, 0 to {N_FOLDS - 1}", 0)
    seed: int = flag("random seed of the choice of validation cells and of all training", 0)
    results_path: str = flag("folder for the CSV files", f"{RESULTS}/study")


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    if not 0 <= flags.fold < N_FOLDS:
        raise UserError(f"--fold {flags.fold} must be between 0 and {N_FOLDS - 1}")
    if flags.data == "immune" and not Path(flags.data_path).is_file():
        raise UserError(
            f"--data_path {flags.data_path} does not exist; give the path of immune_rna.h5ad, or use --data pbmc68k"
        )
    out = Path(flags.out_path or f"runs/rna_only/{flags.data}_fold{flags.fold}_seed{flags.seed}").resolve()
    adata = read_h5ad(flags.data_path) if flags.data == "immune" else pbmc68k()
    adata.obs["fold"] = folds(adata.obs["cell_type"].astype(str).to_numpy())
    write_whole(adata, out / "raw.h5ad")
    stages, path = Stages(out / "stages.json"), lambda name: from_root(out / name)
    stages.run(
        "preprocess",
        f"preprocess.py --data_path {path('raw.h5ad')} --out_path {path('ready.h5ad')} --split_by fold "
        f"--test_groups {flags.fold} --target_sum median --seed {flags.seed}",
    )
    common = f"--data_path {path('ready.h5ad')} --ckpt_dir {path('')} --seed {flags.seed} --preset small --overwrite"
    stages.run("stage I", f"pretrain_rna.py {common} --model_name rna {STAGE_ONE}")
    stages.run(
        "fine-tune",
        f"train_missing_celltype_func.py {common} --model celltype --pretrained_model_path {path('rna')} "
        f"--other_modality zeros {FINE_TUNE}",
    )
    stages.run("evaluate", f"evaluate.py --data_path {path('ready.h5ad')} --model_path {path('celltype')}")
    path = Path(flags.results_path) / f"{flags.data}_fold{flags.fold}_types.csv"
    add_rows(path, scores_in(out / "celltype", "scMomer", flags.seed, 0))
    print(f"\nwrote {path}")


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
