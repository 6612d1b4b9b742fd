"""Measure calibration across batches: each batch is left out of all training once, and labelled afterwards.

    python -m benchmarks.across_batches --data_path ../shared/data/scrna/pbmc_3tech.h5ad

A model is fine-tuned twice on the other batches: calibrated on validation cells of the same batches, and with
--calibrate_across. Two more models see all batches, for test cells within them. Prints and writes to
<out_path>/across_batches.csv, for each model and for logistic regression with sets of validation cells: accuracy,
calibration error (10 bins), coverage and size of the sets at --coverage, share of novel cells; and how well agreement
and confidence mark the errors (AUROC).
"""

from dataclasses import dataclass
from pathlib import Path

from utils.cli import flag, parse_flags, run_script

COMMON = "--val_fraction 0.3"


@dataclass
class Flags:
    data_path: str = flag("raw RNA with cell types", "../shared/data/scrna/pbmc_3tech.h5ad")
    batch_column: str = flag("column of obs with the batches", "batch")
    out_path: str = flag("folder for the models and the table", "runs/across_batches")
    coverage: float = flag("coverage of the prediction sets", 0.9)
    preset: str = flag("preset of both stages", "tiny")
    seed: int = flag("random seed of the split and of all training", 0)


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)

    import anndata as ad
    import numpy as np
    import pandas as pd

    from benchmarks.lib.stages import Stages, from_root

    out = Path(flags.out_path).resolve()
    out.mkdir(parents=True, exist_ok=True)
    stages, path = Stages(out / "stages.json"), lambda name: from_root(out / name)
    cells = ad.read_h5ad(flags.data_path)
    batches = sorted(cells.obs[flags.batch_column].astype(str).unique())
    # Test cells within the batches: a random part of all of them, as a group of its own.
    draw = np.random.default_rng(flags.seed).random(cells.n_obs) < 1 / (1 + len(batches))
    cells.obs["part"] = np.where(draw, "test", "train")
    cells.write(out / "raw.h5ad")
    rows = []
    for name in ["within", *batches]:
        split = "--split_by part --test_groups test" if name == "within" else ""
        split = split or f"--split_by {flags.batch_column} --test_groups {name}"
        ready = path(f"{name}.h5ad")
        stages.run(
            f"{name}: preprocess",
            f"preprocess.py --data_path {path('raw.h5ad')} --out_path {ready} {COMMON} --seed {flags.seed} {split}",
        )
        common = f"--data_path {ready} --ckpt_dir {path('')} --seed {flags.seed} --preset {flags.preset} --overwrite"
        stages.run(f"{name}: stage I", f"pretrain_rna.py {common} --model_name {name}_rna")
        parent = f"--pretrained_model_path {path(name + '_rna')} --other_modality zeros"
        for how in ("", f"--calibrate_across {flags.batch_column}"):
            model = f"{name}_across" if how else name
            stages.run(
                f"{model}: fine-tune",
                f"train_missing_celltype_func.py {common} --model {model} {parent} {how}",
            )
            stages.run(
                f"{model}: evaluate",
                f"evaluate.py --data_path {ready} --model_path {path(model)} --coverage {flags.coverage} "
                f"--out_path {path(model + '_evaluation')}",
            )
            rows += scores(out / f"{model}_evaluation", name, how)
    table = pd.DataFrame(rows).set_index(["test cells", "method"])
    table.to_csv(out / "across_batches.csv")
    print(table.round(3).to_string())


def scores(folder: Path, name: str, how: str) -> list[dict]:
    """Return the rows of one evaluation: the model's, and once per test batch that of logistic regression."""
    import json

    found = json.loads((folder / "evaluation_test.json").read_text())
    shown = (
        "accuracy",
        "calibration_error",
        "set_coverage",
        "set_size",
        "novel",
        "agreement_auroc",
        "confidence_auroc",
        "both_auroc",
        "all_agree",
        "accuracy_where_all_agree",
        "accuracy_elsewhere",
    )
    methods = {"scmomer": "scMomer, across" if how else "scMomer"}
    methods |= {} if how else {"logistic regression": "logistic regression"}
    return [
        {"test cells": name, "method": words, "cells": found["n_cells"]}
        | {score: found[method].get(score) for score in shown}
        for method, words in methods.items()
    ]


if __name__ == "__main__":
    run_script(main)
