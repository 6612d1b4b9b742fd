"""What benchmarks.pbmc_box measures: cells and splits, baselines, scores, and the card of the model folder."""

import copy
import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MaxAbsScaler

from utils.cells.config import IngestConfig
from utils.cells.ingest import ingest
from utils.cells.minibatches import CellDataset
from utils.cells.preprocessed import STAMP, open_cells, read_cells
from utils.evaluate.metrics import bootstrap_interval, classification_scores, per_class_table
from utils.features.normalise import log_normalise
from utils.files.write import write_whole
from utils.predict.infer import decode
from utils.predict.label import label_cells
from utils.train.config import InferConfig
from utils.train.distributed import Runtime
from utils.train.model_folder import ARRAYS, SavedModel

Cells = tuple[sparse.csr_matrix, np.ndarray]
"""Model values [cells, genes] and types [cells]."""
TARGETS = {
    "3pv1": {"MLP": {"accuracy": 0.916, "macro_f1": 0.783}, "LR": {"accuracy": 0.924, "macro_f1": 0.787}},
    "3pv2": {"MLP": {"accuracy": 0.907, "macro_f1": 0.829}, "LR": {"accuracy": 0.935, "macro_f1": 0.841}},
    "5p": {"MLP": {"accuracy": 0.953, "macro_f1": 0.819}, "LR": {"accuracy": 0.972, "macro_f1": 0.830}},
}
"""Scores that an MLP and balanced logistic regression reached before the box existed: what it has to reach."""
TYPES_68K = {
    "CD14+ Monocyte": "Mono_CD14",
    "CD19+ B": "B",
    "CD34+": "HSC",
    "CD4+/CD25 T Reg": "T_CD4",
    "CD4+/CD45RA+/CD25- Naive T": "T_CD4",
    "CD4+/CD45RO+ Memory": "T_CD4",
    "CD56+ NK": "NK",
    "CD8+ Cytotoxic T": "T_CD8",
    "CD8+/CD45RA+ Naive Cytotoxic": "T_CD8",
    "Dendritic": "DC",
}
"""Type in pbmc68k_reduced → type of the box. Its types come from the correlation with sorted cells."""
LICENCE = {"license": "other", "license_name": "trained-on-gpl-3-data", "license_link": "README.md"}
"""What the card says to the Hugging Face hub about the licence of the box's weights."""
C_GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Inverse penalties of logistic regression to try."""
DECAYS = (1e-4, 1e-2, 1.0, 10.0)
"""Weight decays of the MLP to try."""


def write_cells(pbmc: Path, immune: Path, out_path: Path) -> None:
    """Write the cells of both files, with the genes of the first; those of the second have no label."""
    first = ad.read_h5ad(pbmc)
    with open_cells(str(immune), None, None) as file:
        found = ingest(file.modalities["rna"], IngestConfig(), first.var_names.to_numpy())
        counts, keep = sparse.vstack(list(found.blocks()), format="csr"), found.measured
    more = pd.DataFrame({"cell_type": np.nan, "batch": "immune"}, index=[f"immune_{name}" for name in found.barcodes])
    obs = pd.concat([first.obs[["cell_type", "batch"]].astype(object), more[keep].astype(object)])
    x = sparse.vstack([sparse.csr_matrix(first.X), counts[keep]], format="csr")
    write_whole(ad.AnnData(x, obs, first.var[[]]), out_path)


def add_panels(path: Path, out_path: Path, seed: int) -> None:
    """Copy a preprocessed file, and add each labelled training cell once more with a random panel of its genes.

    A new file often lacks many of the genes, and its cells are scaled by the sum of those that it has. The copies show
    such cells to the model: with 10 to 60% of the genes, drawn for each cell. No validation or test cell is copied.
    """
    cells, rng = ad.read_h5ad(path), np.random.default_rng(seed)
    train = cells[(cells.obs["split"] == "train").to_numpy() & cells.obs["cell_type"].notna().to_numpy()].copy()
    kept = rng.random(train.shape) < rng.uniform(0.1, 0.6, (train.n_obs, 1))
    counts = sparse.csr_matrix(sparse.csr_matrix(train.layers["counts"]).multiply(kept))
    train.X = log_normalise(counts, json.loads(cells.uns[STAMP])["target_sum"])
    train.layers["counts"] = counts
    train.obs_names = "panel_" + train.obs_names
    both = ad.concat([cells, train[np.asarray(counts.sum(1)).ravel() > 0]])
    both.var, both.uns = cells.var, cells.uns
    write_whole(both, out_path)


def split_of(path: Path) -> dict[str, Cells]:
    """Return the labelled cells of each part of a preprocessed file: train, val and test."""
    cells = read_cells(path, ("rna",))
    labels, split = cells.labels("cell_type"), cells.obs["split"].to_numpy()
    rows = lambda part: np.flatnonzero(labels.notna().to_numpy() & (split == part))
    return {
        part: (cells.values["rna"][rows(part)], labels.iloc[rows(part)].astype(str).to_numpy())
        for part in ("train", "val", "test")
    }


def with_intervals(true: np.ndarray, predicted: np.ndarray) -> dict:
    """Return accuracy and macro-F1 with 95% bootstrap intervals over cells."""
    scores = classification_scores(true, predicted)
    out = {name: scores[name] for name in ("accuracy", "macro_f1")}
    return out | {f"{name}_interval": list(bootstrap_interval(true, predicted, name)) for name in list(out)}


def chosen(validation: dict[str, dict]) -> str:
    """Return the setting with the highest mean of accuracy and macro-F1 on validation cells."""
    return max(validation, key=lambda name: validation[name]["accuracy"] + validation[name]["macro_f1"])


def model_rows(folder: Path, cells: dict[str, Cells]) -> dict[str, dict]:
    """Return the scores of a cell type model on validation and on test cells."""
    from utils.train.model_folder import load_model

    saved, rows = load_model(folder, "celltype"), {}
    for part in ("val", "test"):
        x, types = cells[part]
        dataset = CellDataset({"rna": x}, pd.Index([str(row) for row in range(x.shape[0])]))
        _, decoded = decode(saved, dataset, InferConfig(device="cpu"), Runtime(torch.device("cpu")), part)
        rows[part] = with_intervals(types, np.array(saved.outputs)[decoded["logits"].argmax(1)])
    return rows


def simple_models(cells: dict[str, Cells], seed: int) -> dict[str, tuple[Pipeline, float]]:
    """Fit balanced LR and an MLP, their penalties chosen on validation cells; return name → model, penalty."""
    families = {
        "LR": [LogisticRegression(C=c, class_weight="balanced", max_iter=2000, random_state=seed) for c in C_GRID],
        "MLP": [MLPClassifier((64,), alpha=decay, max_iter=100, random_state=seed) for decay in DECAYS],
    }
    best = {}
    for name, models in families.items():
        fits = [make_pipeline(MaxAbsScaler(), copy.deepcopy(model)).fit(*cells["train"]) for model in models]
        scores = [classification_scores(cells["val"][1], fit.predict(cells["val"][0])) for fit in fits]
        number = int(np.argmax([score["accuracy"] + score["macro_f1"] for score in scores]))
        penalty = models[number].C if name == "LR" else models[number].alpha
        best[name] = fits[number], penalty
    return best


def simple_rows(cells: dict[str, Cells], seed: int) -> dict[str, dict]:
    """Return the scores of the baselines on test cells, with the chosen penalty."""
    x, types = cells["test"]
    return {
        name: with_intervals(types, model.predict(x)) | {"penalty": penalty}
        for name, (model, penalty) in simple_models(cells, seed).items()
    }


def scored(saved: SavedModel, query: ad.AnnData, cells: dict[str, Cells], least: float, seed: int) -> dict:
    """Label pbmc68k_reduced with the box, and score it beside the baselines.

    The baselines come in two forms: fitted on all genes of the box, as the box was, and fitted anew on the genes that
    the file has. The latter is more than the box can do without training.

    Parameters
    ----------
    saved : the box
    query : the cells, with their types as `cell_type`
    cells : the box's training and validation cells
    least : least share of the box's genes
    seed : of the baselines
    """
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pbmc68k_reduced.h5ad"
        write_whole(query, path)
        out = label_cells(path, saved)
        with open_cells(str(path), None, None) as file:
            found = ingest(file.modalities["rna"], IngestConfig(min_gene_coverage=least), saved.features["rna"])
            counts = sparse.vstack(list(found.blocks()), format="csr")
    true = query.obs["cell_type"].map(TYPES_68K).astype(str).to_numpy()
    obs = out.obs
    predicted = obs["predicted_cell_type"].astype(str).to_numpy()
    known = np.isin(true, saved.outputs)
    x = log_normalise(counts, saved.stamp["target_sum"])
    have = np.flatnonzero(np.asarray(counts.sum(0)).ravel() > 0)
    again = lambda values: log_normalise(raw_of(values)[:, have], saved.stamp["target_sum"])
    shared = {part: (again(values), types) for part, (values, types) in cells.items() if len(types)}
    rows = {"scMomer": with_intervals(true[known], predicted[known])}
    for name, (model, _) in simple_models(cells, seed).items():
        rows[f"{name}, all genes"] = with_intervals(true[known], model.predict(x)[known])
    for name, (model, _) in simple_models(shared, seed).items():
        rows[f"{name}, fitted on the shared genes"] = with_intervals(true[known], model.predict(again(x))[known])
    record = out.uns["scmomer"]
    sets = [name in str(held).split("; ") for name, held in zip(true, obs["prediction_set"], strict=True)]
    novelty = pd.DataFrame({"type": query.obs["cell_type"].to_numpy(), "is_novel": obs["is_novel"].to_numpy(bool)})
    return {
        "n_cells": int(known.sum()),
        "gene_coverage": record["rna_coverage"],
        "count_coverage": record["rna_count_coverage"],
        "scores": rows,
        "per_type": per_class_table(true, predicted).round(3).reset_index().to_dict("records"),
        "mean_confidence": float(obs["confidence"].mean()),
        "sets_hold_the_truth": float(np.mean(sets)),
        "mean_set_size": float(obs["prediction_set"].astype(str).str.count("; ").add(1).mean()),
        "called_novel": novelty.groupby("type")["is_novel"].mean().round(3).to_dict(),
        "called_novel_all": float(novelty["is_novel"].mean()),
    }


def raw_of(values: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return values proportional to counts from log2(1 + x)."""
    raw = values.copy()
    raw.data = np.exp2(raw.data) - 1
    return raw


def card(saved: SavedModel, setting: str, commands: str, unseen: dict, other: dict) -> str:
    """Return the card of reference/pbmc, in Markdown.

    Parameters
    ----------
    saved : the box
    setting, commands : the chosen setting, and the commands that trained the box
    unseen, other : scores on the chemistry left out, and on pbmc68k_reduced
    """
    lines = [
        f"| {name} | {row['n_cells']} | {_cell(row['scores']['scMomer'])} | {_cell(row['scores']['LR'])} | "
        f"{_cell(row['scores']['MLP'])} |"
        for name, row in unseen.items()
    ]
    scores = other["scores"]
    own, lr, mlp = (scores[name] for name in ("scMomer", "LR, all genes", "MLP, all genes"))
    lines.append(f"| pbmc68k_reduced | {other['n_cells']} | {_cell(own)} | {_cell(lr)} | {_cell(mlp)} |")
    rows = "\n".join(lines)
    return (
        saved.front_matter(**LICENCE)
        + f"""# reference/pbmc: cell types of human blood

`python predict_cell_type.py --data_path my_pbmc.h5ad` labels human blood with this model, RNA alone.
{len(saved.features["rna"]):,} genes; types: {", ".join(saved.outputs)}. It was made by
`python -m benchmarks.pbmc_box`; [docs/pbmc_box.md](../../docs/pbmc_box.md) has all numbers.

## Data and licences

**The weights were trained on data from a GPL-3 repository.** Check whether that matters for your use.

| data | cells | used for | source, licence |
|---|---|---|---|
| human PBMC, 10x 3' v1, 3' v2 and 5' | 1,200 | everything | immunogenomics/symphony, `data/`; GPL-3 repository |
| human immune cells of tumours, without their labels | 699 | stages I and II | PyPI package scspectra 0.2.1, MIT |

How it was trained ({setting}):

```
{commands}
```

Each labelled training cell was also shown with a random panel of 10 to 60% of the genes. A fifth of the cells of each
type was kept for validation, on which the mixture, confidence, prediction sets and novelty were fitted.

## What it was measured on

Accuracy / macro-F1. In the first three rows a model was trained without that chemistry. The last row is this model
on another study, which has {other["gene_coverage"]:.0%} of its genes. LR: balanced logistic regression; LR and MLP were
fitted on the same cells and tuned on the same validation cells.

| test cells | number | scMomer | LR | MLP |
|---|---|---|---|---|
{rows}

## What else is in the folder

Three simple classifiers (`{ARRAYS}`), fitted on the same training cells: `agreement` is the share of the model
and these three that give a cell the model's type. Two of them are mixed into its probabilities.
{saved.task.card(saved.fitted)}
## What it must not be used for

- **Not for medicine.** No diagnosis, no decision about a patient. It is a first look for research.
- Not for tissue, tumours, cell lines, sorted cells, bone marrow, other species or nuclei: it gives each of these cells
  one of its types of blood. `--model_path` chooses another model; `train_missing_celltype_func.py` makes one.
- Not for disease states and not for subtypes. It does not know regulatory, naive and memory T cells, plasma cells,
  plasmacytoid dendritic cells, red cells or neutrophils.
- Not for rare types without a second look: it has seen 28 dendritic cells, 7 megakaryocytes and 3 stem cells.
- Its confidence and sets were calibrated within these three chemistries. In a new study they promise too much. The
  scores above say how far labels hold elsewhere.
"""
    )


def _cell(row: dict) -> str:
    """Accuracy and macro-F1 in one cell of a table."""
    return f"{row['accuracy']:.3f} / {row['macro_f1']:.3f}"
