"""Compare scores of novelty: one cell type at a time is hidden from the classifier, then looked for.

    python -m benchmarks.novelty --data_path ../shared/data/scrna/pbmc_3tech.h5ad

Stage I is trained once, without labels (it sees the cells of all types). Then, for each type with enough cells, a cell
type model is trained on the labels of the others, and each score must tell the cells of the hidden type from
validation cells of the other types. Prints and writes the AUROC of each score and type to <out_path>/novelty.csv, with
the share of the cells of the hidden type, and of the others, whose p-value is below 0.05.
"""

from dataclasses import dataclass
from pathlib import Path

from utils.cli import flag, parse_flags, run_script


@dataclass
class Flags:
    data_path: str = flag("raw RNA with cell types", "../shared/data/scrna/pbmc_3tech.h5ad")
    out_path: str = flag("folder for the models and the table", "runs/novelty")
    min_cells: int = flag("types with fewer cells are not hidden", 60)
    preset: str = flag("preset of both stages", "tiny")
    seed: int = flag("random seed of the split and of all training", 0)


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)

    import anndata as ad
    import pandas as pd

    from benchmarks.lib.stages import Stages, from_root

    out = Path(flags.out_path).resolve()
    stages, path = Stages(out / "stages.json"), lambda name: from_root(out / name)
    ready = f"--data_path {path('ready.h5ad')}"
    stages.run(
        "preprocess",
        f"preprocess.py --data_path {flags.data_path} --out_path {path('ready.h5ad')} --seed {flags.seed} "
        "--val_fraction 0.3",
    )
    cells = ad.read_h5ad(out / "ready.h5ad")
    types = cells.obs["cell_type"].astype(object)
    sizes = types.value_counts()
    hidden = sorted(sizes.index[sizes >= flags.min_cells])
    for number, name in enumerate(hidden):
        cells.obs[f"without_{number}"] = types.where(types != name)
    cells.write(out / "ready.h5ad")
    common = f"{ready} --ckpt_dir {path('')} --seed {flags.seed} --preset {flags.preset} --overwrite"
    stages.run("stage I", f"pretrain_rna.py {common} --model_name rna")
    rows = []
    for number, name in enumerate(hidden):
        stages.run(
            f"without {name}",
            f"train_missing_celltype_func.py {common} --model without_{number} --label_column without_{number} "
            f"--pretrained_model_path {path('rna')} --other_modality zeros",
        )
        rows.append({"hidden": name, "cells": int(sizes[name])} | scores(out, number))
    table = pd.DataFrame(rows).set_index("hidden")
    table.loc["mean"] = table.mean()
    table.to_csv(out / "novelty.csv")
    print(table.round(3).to_string())


def scores(out: Path, number: int) -> dict[str, float]:
    """Return the AUROC of each score for one hidden type, and what p < 0.05 finds."""
    import numpy as np
    import torch
    from scipy.special import softmax
    from sklearn.metrics import roc_auc_score

    from utils.cells.minibatches import CellDataset
    from utils.cells.preprocessed import read_cells
    from utils.evaluate.novelty import (
        energy,
        fit_novelty,
        mahalanobis_distance,
        neighbour_distance,
        novelty_p_values,
        p_values,
        unit,
    )
    from utils.predict.infer import decode
    from utils.train.config import InferConfig
    from utils.train.distributed import Runtime
    from utils.train.model_folder import load_model

    cells = read_cells(out / "ready.h5ad", ("rna",))
    saved, labels = load_model(out / f"without_{number}", "celltype"), cells.labels(f"without_{number}")
    dataset = CellDataset({"rna": cells.values["rna"][np.arange(len(cells.obs))]}, cells.obs.index)
    embedding, decoded = decode(saved, dataset, InferConfig(device="cpu"), Runtime(torch.device("cpu")), "embedding")
    known, split = labels.notna().to_numpy(), cells.obs["split"].to_numpy()
    train, val = known & (split == "train"), known & (split == "val")
    new = ~known & cells.labels("cell_type").notna().to_numpy()
    codes = np.unique(labels[train].astype(str), return_inverse=True)[1]
    mahalanobis = lambda form: mahalanobis_distance(form(embedding[train]), codes, form(embedding))
    found = {
        "neighbours": neighbour_distance(unit(embedding[train]), unit(embedding)),
        "neighbours, not scaled": neighbour_distance(embedding[train], embedding),
        "mahalanobis": mahalanobis(np.asarray),
        "mahalanobis, length 1": mahalanobis(unit),
        "max probability": -softmax(decoded["logits"] / saved.fitted["temperature"], axis=1).max(1),
        "energy": energy(decoded["logits"]),
    }
    truth = np.r_[np.zeros(val.sum()), np.ones(new.sum())]
    out = {name: roc_auc_score(truth, np.r_[score[val], score[new]]) for name, score in found.items()}
    # p-values from one half of the validation cells; the other half is exchangeable with it
    halves = np.random.default_rng(0).permutation(np.flatnonzero(val))
    one, other = halves[::2], halves[1::2]
    fitted = fit_novelty(embedding[train], embedding[one])
    novel = lambda rows: float((novelty_p_values(fitted, embedding[rows]) < 0.05).mean())
    by_mahalanobis = p_values(found["mahalanobis"][one], found["mahalanobis"][new]) < 0.05
    return out | {
        "found": novel(new),
        "false alarms": novel(other),
        "found by mahalanobis": float(by_mahalanobis.mean()),
    }


if __name__ == "__main__":
    run_script(main)
