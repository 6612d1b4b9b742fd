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

    import json

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
    found = {name: doubts(out, name) for name in batches}
    print(json.dumps(pooled(found, flags.seed), indent=1))


def doubts(out: Path, name: str) -> tuple:
    """Return for the test cells of one batch whether the model was wrong, its confidence, and the agreement [cells]."""
    import torch

    from utils.cells.minibatches import CellDataset
    from utils.cells.preprocessed import read_cells
    from utils.predict.infer import predict
    from utils.train.config import InferConfig
    from utils.train.distributed import Runtime
    from utils.train.model_folder import load_model

    cells = read_cells(out / f"{name}.h5ad", ("rna",))
    labels = cells.labels("cell_type")
    rows = cells.rows("test")
    rows = rows[labels.notna().to_numpy()[rows]]
    dataset = CellDataset({"rna": cells.values["rna"][rows]}, cells.obs.index[rows])
    found = predict(
        load_model(out / name, "celltype"), dataset, InferConfig(device="cpu"), Runtime(torch.device("cpu"))
    )
    wrong = found["predicted_cell_type"] != labels.iloc[rows].to_numpy()
    return wrong, found["confidence"], found["agreement"]


def pooled(found: dict[str, tuple], seed: int) -> dict:
    """Return the AUROC of each doubt over all batches with its 95% bootstrap interval, and the accuracy per agreement.

    Parameters
    ----------
    found : batch → from `doubts`
    seed : of the resamples
    """
    import numpy as np

    from utils.evaluate.calibration import error_auroc

    wrong, confidence, agreement = map(np.concatenate, zip(*found.values(), strict=True))
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(wrong), (1000, len(wrong)))
    sure = {"agreement": agreement, "confidence": confidence, "both": agreement + confidence}
    out = {}
    for name, values in sure.items():
        low, high = np.nanpercentile([error_auroc(wrong[rows], -values[rows]) for rows in draws], [2.5, 97.5])
        out[name] = {"auroc": error_auroc(wrong, -values), "95%": [low, high]}
    levels = np.unique(agreement)
    return out | {
        f"accuracy at {v:g}": [float(1 - wrong[agreement == v].mean()), int((agreement == v).sum())] for v in levels
    }


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
