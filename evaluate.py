"""How a model folder stands against simple baselines, on the same cells.

    python evaluate.py --data_path cells.ready.h5mu --model_path runs/celltype
    python evaluate.py --data_path cells.ready.h5mu --model_path runs/student

A cell type model is scored on the labels of the test cells, beside the majority class, nearest neighbours and logistic
regression (on all features, and on 50 principal components), fitted on the same training cells and tuned on the same
validation cells; its embedding beside principal components. A model with a student is scored on translation, how well
it tells, from the measured modality, the one it has not seen, beside the mean, nearest neighbours and ridge regression.
Writes evaluation_<split>.json, .csv and .png into --out_path; of cell types also the confusion matrix, the model's
precision, recall and F1 of each type, per_type_<split>.csv, and what each method predicted for each cell,
predicted_<split>.csv.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.shapes import other
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError
from utils.train.config import InferConfig

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse import csr_matrix

    from utils.cells.preprocessed import Cells
    from utils.train.distributed import Runtime
    from utils.train.model_folder import SavedModel

RANKED = ("accuracy", "macro_f1", "peak_auroc", "cell_auroc", "rna_mse")  # the best of each is printed
ERRORS = ("rna_mse",)
SHOWN = ("accuracy", "balanced_accuracy", "macro_f1", "peak_auroc", "cell_auroc", "peak_ap", "cell_ap", "rna_mse")


@dataclass
class Flags:
    data_path: str = flag("preprocessed cells, .h5ad or .h5mu")
    model_path: str = flag("folder of train_missing_celltype_func.py or pretrain_missing_mod.py")
    split: str = flag("which cells to score: test, val or train", "test")
    label_column: str | None = flag("column of obs with cell types; by default the one the model was trained on", None)
    out_path: str | None = flag("folder for the results; by default <model_path>/evaluation", None)
    model_alone: bool = flag("leave out the baselines of cell types", False)


def main() -> None:
    flags, config = parse_flags(__doc__, Flags, InferConfig)

    # Slow to import: --help and mistaken flags do not wait for them.
    import pandas as pd

    from utils.as_json import to_json
    from utils.cells.preprocessed import read_cells
    from utils.evaluate.plots import bars
    from utils.train.distributed import Runtime, choose_device
    from utils.train.model_folder import check_fits, load_model

    runtime = Runtime(choose_device(config.device))
    saved = load_model(flags.model_path, "celltype", "student")
    out = Path(flags.out_path or saved.path / "evaluation")
    is_types = saved.kind == "celltype"
    cells = read_cells(flags.data_path, saved.model_config.inputs if is_types else ("rna", "atac"), say=print)
    check_fits(saved, cells.features, cells.stamp, flags.data_path)
    rows = cells.rows(flags.split)
    if saved.stamp.get("split") != cells.stamp.get("split"):
        print(
            f"note: {flags.data_path} was split otherwise than the cells that {saved.path} learned from; of the same "
            f"cells, {flags.split} cells may be among those it has learned from"
        )
    if not len(rows):
        raise UserError(f"{flags.data_path}: has no {flags.split} cells; choose another --split, or split it anew")
    if is_types:
        table = score_types(saved, cells, rows, flags, config, runtime, out)
    else:
        table = score_translation(saved, cells, rows, config, runtime)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"evaluation_{flags.split}.json"
    path.write_text(to_json({"model": str(saved.path), "hash": saved.hash, "split": flags.split} | table))
    methods = {name: row for name, row in table.items() if isinstance(row, dict) and name != "embeddings"}
    scores = pd.DataFrame(methods).T
    scores.to_csv(path.with_suffix(".csv"))
    print(scores.map(_cell).to_string())
    for measure in [name for name in RANKED if name in scores]:
        best = scores[measure].astype(float)
        winner = best.idxmin() if measure in ERRORS else best.idxmax()
        print(f"best {measure.replace('_', ' ')}: {winner}")
    if "embeddings" in table:
        print(pd.DataFrame(table["embeddings"]).T.dropna(axis=1, how="all").map(_cell).to_string())
        print(table["calibration"])
    shown = [name for name in SHOWN if name in scores]
    values = {name: {measure: row[measure] for measure in shown} for name, row in methods.items()}
    intervals = {name: {m: row[f"{m}_95%"] for m in shown if f"{m}_95%" in row} for name, row in methods.items()}
    bars(values, path.with_suffix(".png"), f"{saved.path.name}, {table['n_cells']:,} cells", intervals)
    print(f"wrote {path}")


def _cell(value) -> str:
    """A score with its interval, for the printed table."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(f"{v:.3f}" for v in value) + "]"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3f}"
    return str(value)


def score_types(
    saved: SavedModel, cells: Cells, rows: np.ndarray, flags: Flags, config: InferConfig, runtime: Runtime, out: Path
) -> dict:
    """Scores of the model and of the baselines, with 95 % bootstrap intervals over cells; and of their embeddings."""
    import numpy as np
    import pandas as pd
    from scipy.sparse import hstack

    from utils.cells.labels import label_codes, limit_labels
    from utils.cells.minibatches import CellDataset
    from utils.evaluate.baselines import FEW_LABEL_BASELINES, TYPE_BASELINES
    from utils.evaluate.calibration import expected_calibration_error
    from utils.evaluate.embedding import embedding_scores
    from utils.evaluate.metrics import bootstrap_interval, classification_scores, per_class_table
    from utils.evaluate.plots import confusion
    from utils.predict.infer import predict_types

    column = flags.label_column or saved.training.get("label_column")
    labels = cells.labels(column)
    if labels is None:
        raise UserError(f"{cells.path}: no column {column!r} in obs; name the labels with --label_column")
    labelled = labels.notna().to_numpy()
    rows = rows[labelled[rows]]
    if not len(rows):
        raise UserError(f"{cells.path}: no {flags.split} cell has a label in {column}; choose another --label_column")
    truth = labels.iloc[rows].to_numpy()
    codes = pd.Index(saved.labels).get_indexer(truth)
    if (codes < 0).all():
        raise UserError(
            f"{cells.path}: none of the types in {column} is the model's, such as {saved.labels[0]!r}; "
            "choose another --label_column"
        )

    def data(which: np.ndarray) -> csr_matrix:
        return hstack([cells.values[name][which] for name in saved.model_config.inputs], format="csr")

    dataset = CellDataset({name: cells.values[name][rows] for name in saved.model_config.inputs}, cells.obs.index[rows])
    prediction = predict_types(saved, dataset, config, runtime)
    predicted = {"scmomer": prediction.types}
    probability = {"scmomer": (prediction.probability, saved.labels)}
    # Baselines learn from the labels that the model learned from, and see the same unlabelled training cells.
    known_types = label_codes(labels, sorted(set(labels.dropna())))
    labelled = limit_labels(known_types, cells, saved.training.get("labels_per_type", 0), saved.training["seed"]) >= 0
    known = [row[labelled[row]] for row in (cells.rows("train"), cells.rows("val"))]
    (x_train, x_val), (y_train, y_val) = [data(row) for row in known], [labels.iloc[row].to_numpy() for row in known]
    x, x_all, chosen, embeddings = data(rows), data(cells.rows("train")), {}, {"scmomer": prediction.embedding}
    baselines = TYPE_BASELINES | (FEW_LABEL_BASELINES if x_all.shape[0] > x_train.shape[0] else {})
    for name, fit in () if flags.model_alone else baselines.items():
        estimator, chosen[name] = fit(x_train, y_train, x_val, y_val, seed=0, x_all=x_all)
        predicted[name] = estimator.predict(x)
        probability[name] = estimator.predict_proba(x), list(estimator.classes_)
        if name == "nearest neighbours":
            embeddings["50 principal components"] = estimator["pca"].transform(x)
    confusion(truth, prediction.types, out / f"confusion_{flags.split}.png")
    per_class_table(truth, prediction.types).to_csv(out / f"per_type_{flags.split}.csv")
    by_cell = pd.DataFrame({"label": truth} | predicted, index=cells.obs.index[rows])
    by_cell.to_csv(out / f"predicted_{flags.split}.csv", index_label="barcode")
    table = {}
    for name, types in predicted.items():
        table[name] = classification_scores(truth, types)
        for score in ("accuracy", "macro_f1"):
            table[name][f"{score}_95%"] = bootstrap_interval(truth, types, score)
        share, classes = probability[name]
        known_codes = label_codes(truth, classes)  # -1 for types that the method does not know
        table[name]["calibration_error"] = expected_calibration_error(
            share[known_codes >= 0], known_codes[known_codes >= 0]
        )
        if chosen.get(name) is not None:
            table[name]["setting"] = chosen[name]  # penalty C, or number of neighbours, chosen on validation cells
    missed = pd.Series(truth[~np.isin(truth, prediction.types)]).value_counts()
    if len(missed):
        print("never predicted by the model: " + ", ".join(f"{name} ({n:,} cells)" for name, n in missed.items()))
    batches = cells.obs.get((cells.stamp.get("split") or {}).get("split_by"))
    batches = None if batches is None else batches.iloc[rows]
    return table | {
        "n_cells": len(rows),
        "calibration": str(saved.calibration or "unknown: the model folder does not say"),
        "embeddings": {name: embedding_scores(embedding, truth, batches) for name, embedding in embeddings.items()},
    }


def score_translation(saved: SavedModel, cells: Cells, rows: np.ndarray, config: InferConfig, runtime: Runtime) -> dict:
    """Measured → missing modality, beside baselines: how peaks are ranked, or the squared error of genes."""
    import numpy as np

    from utils.cells.minibatches import CellDataset
    from utils.evaluate.baselines import neighbour_translation, ridge_translation
    from utils.evaluate.metrics import translation_scores
    from utils.evaluate.translation import product, pseudobulk_rmse, squared_error, unweighted_probability
    from utils.predict.infer import infer

    missing = saved.options["missing"]
    present, model = other(missing), saved.build()
    dataset = CellDataset({present: cells.values[present][rows]}, cells.obs.index[rows])
    (embedding,) = infer(lambda batch: (model.embed(batch),), model, dataset, config, runtime, "embedding")
    decoder = model.decoders[missing].cpu()
    weights = np.vstack([decoder.weight.detach().numpy().T, decoder.bias.detach().numpy()])
    known = [(cells.values[present][row], cells.values[missing][row]) for row in map(cells.rows, ("train", "val"))]
    (x_train, y_train), (x_val, y_val) = known
    x, truth = cells.values[present][rows], cells.values[missing][rows]
    mean = np.asarray(y_train.mean(0), dtype=np.float32)  # of open peaks, or of log values
    # All predictions are products left [cells, k] · right [k, features]: never all of them in memory.
    factors = {
        "scmomer": (np.hstack([embedding, np.ones((len(rows), 1), np.float32)]), weights, None),
        f"mean {'accessibility' if missing == 'atac' else 'expression'}": (np.ones((len(rows), 1)), mean, None),
        "nearest neighbours": neighbour_translation(x_train, y_train, x_val, y_val, x),
        "ridge on PCA": ridge_translation(x_train, y_train, x_val, y_val, x),
    }
    labels, table = cells.labels(), {}
    for name, (left, right, setting) in factors.items():
        # A decoder that was trained with open peaks weighted w times gives logits of w times the odds.
        to_probability = unweighted_probability if missing == "atac" and name == "scmomer" else None
        if missing == "atac":
            table[name] = translation_scores(
                truth,
                lambda start, stop, left=left, right=right: product(left, right[:, start:stop]),
                cell_scores=lambda start, stop, left=left, right=right: product(left[start:stop], right),
            )
        else:
            table[name] = {"rna_mse": squared_error(left, right, truth)}
        if labels is not None:
            types = labels.iloc[rows].to_numpy()
            table[name]["pseudobulk_rmse"] = pseudobulk_rmse(left, right, truth, types, to_probability)
        if setting is not None:
            table[name]["setting"] = setting
    return table | {"n_cells": len(rows)}


if __name__ == "__main__":
    run_script(main)
