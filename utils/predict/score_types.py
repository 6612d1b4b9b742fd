"""Scores of a cell type model beside baselines, on the same cells."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, hstack

from utils.cells.hierarchy import TOP, ancestors_of
from utils.cells.labels import label_codes, limit_labels
from utils.cells.minibatches import CellDataset
from utils.cells.preprocessed import Cells
from utils.errors import UserError
from utils.evaluate import conformal
from utils.evaluate.across import coverage_by_place
from utils.evaluate.calibration import error_auroc, expected_calibration_error
from utils.evaluate.comparison import compare_types, in_words
from utils.evaluate.embedding import embedding_scores
from utils.evaluate.metrics import bootstrap_interval, per_class_table
from utils.evaluate.plots import confusion
from utils.evaluate.tuning import BUDGET, Tuned
from utils.evaluate.type_baselines import MOST_TRAINING, MOST_VALIDATION, Unlabelled, fewer, fit_all
from utils.files.disk_rows import select
from utils.predict.infer import Prediction, predict
from utils.predict.report import EVALUATION_LEAD, evaluated_cells, write_report_of
from utils.train.config import InferConfig, LabelConfig
from utils.train.distributed import Runtime
from utils.train.model_folder import SavedModel

DOUBTS = ("confidence", "agreement")
"""Columns that are low where the model doubts."""
PLACES = {
    "set_coverage_within": "in batches that training cells have",
    "set_coverage_across": "in batches that they do not have",
}
BLOCK = 8192
"""Test cells whose values are in memory at once for the baselines."""
WITH_SETS = "logistic regression"
"""The baseline whose prediction sets stand beside the model's."""


def score_types(
    saved: SavedModel,
    cells: Cells,
    split: str,
    config: InferConfig,
    runtime: Runtime,
    out: Path,
    label_column: str | None = None,
    model_alone: bool = False,
    coverage: float = 0.9,
    report: bool = False,
    sample_column: str | None = None,
    quick: bool = False,
) -> dict:
    """Scores of the model and of the baselines, with 95 % bootstrap intervals over cells, and of their embeddings.

    Parameters
    ----------
    saved, cells : the model, and cells that fit it
    split : train, val or test
    config, runtime : how to run the model
    out : folder for the confusion matrix, per_type_<split>.csv and predicted_<split>.csv
    label_column : of obs; by default the one that the model learned from
    model_alone : leave out the baselines
    quick : leave out the networks that learn from unlabelled cells
    coverage : of the prediction sets, which are scored for the model and for logistic regression
    report : also write the page report_<split>.html
    sample_column : of obs, for the page; by default donor, sample or batch

    Returns
    -------
    method → scores; also n_cells, calibration and embeddings

    Raises
    ------
    UserError
        If the column is missing, no cell of the split has a label in it, or none of its types is the model's.
    """
    column = label_column or saved.training.get("label_column")
    labels = cells.labels(column)
    rows = labelled_rows(saved, cells, labels, column, split)
    truth = labels.iloc[rows].to_numpy()

    inputs = saved.model_config.inputs
    dataset = CellDataset({name: select(cells.values[name], rows) for name in inputs}, cells.obs.index[rows])
    choices = LabelConfig(coverage)
    prediction = predict(saved, dataset, config, runtime, choices)
    if report:
        shown = evaluated_cells(saved, cells, rows, prediction, choices, truth, column, sample_column)
        write_report_of(shown, out / f"report_{split}.html", cells.path.name, EVALUATION_LEAD)
    types = prediction["predicted_cell_type"]
    predicted = {"scmomer": types}
    probability = {"scmomer": (prediction["probability"], saved.outputs)}
    embeddings, tuned, baselines = {"scmomer": prediction.embedding}, {}, {}
    if not model_alone:
        baselines, unlabelled = fit_baselines(saved, cells, labels, runtime.say, quick)
        estimators = {name: estimator for name, (estimator, tuned[name]) in baselines.items()}
        transforms = {name: estimator.predict_proba for name, estimator in estimators.items()}
        transforms["50 principal components"] = lambda x: unlabelled.pca.transform(x)[:, :50]
        found = in_blocks(transforms, cells, inputs, rows)
        embeddings["50 principal components"] = found.pop("50 principal components")
        for name, share in found.items():
            predicted[name] = estimators[name].classes_[share.argmax(1)]
            probability[name] = share, list(estimators[name].classes_)

    sets = {"scmomer": saved.fitted.get("sets")} | fit_baseline_sets(saved, cells, labels, baselines)
    for line in saved.task.left_out(saved.fitted):
        print(line)
    confusion(truth, types, out / f"confusion_{split}.png")
    per_class_table(truth, types).to_csv(out / f"per_type_{split}.csv")
    by_cell = pd.DataFrame({"label": truth} | predicted, index=cells.obs.index[rows])
    by_cell.to_csv(out / f"predicted_{split}.csv", index_label="barcode")
    never = pd.Series(truth[~np.isin(truth, types)]).value_counts()
    if len(never):
        print("never predicted by the model: " + ", ".join(f"{name} ({n:,} cells)" for name, n in never.items()))

    batches, is_known = batches_of(saved, cells, rows)
    table = {}
    for name in predicted:
        table[name] = saved.task.scores(truth, predicted[name])
        for score in ("accuracy", "macro_f1"):
            table[name][f"{score}_95%"] = bootstrap_interval(truth, predicted[name], score)
        share, classes = probability[name]
        codes = label_codes(truth, classes)  # -1 for types that the method does not know
        table[name]["calibration_error"] = expected_calibration_error(share[codes >= 0], codes[codes >= 0])
        if fitted := sets.get(name):
            held = conformal.prediction_sets(fitted, share, coverage)
            table[name] |= conformal.set_scores(held, codes)
            table[name] |= {} if is_known is None else coverage_by_place(held, codes, is_known)
        if isinstance(tuned.get(name), Tuned):
            table[name] |= {"setting": str(tuned[name]), "settings_tried": tuned[name].tried}
    table["scmomer"] |= trust_scores(prediction, truth, saved)
    if baselines:
        table["differences"] = compare_types(truth, predicted, "scmomer", list(baselines))
        table["verdict"] = [in_words("scmomer", row, row["score"].replace("_", " ")) for row in table["differences"]]
        table["intervals"] = (
            "95% of bootstrap samples of cells, drawn within types; batches and training runs do not vary. Each "
            f"baseline tried at most {BUDGET} settings on validation cells; a self-trained row as many again for each "
            "set of labels"
        )
    say_sets({name: table[name] for name in predicted}, coverage)
    return table | {
        "n_cells": len(rows),
        "coverage": coverage,
        "calibration": saved.task.provenance(saved.fitted)["calibration"],
        "embeddings": {name: embedding_scores(embedding, truth, batches) for name, embedding in embeddings.items()},
    }


def batches_of(saved: SavedModel, cells: Cells, rows: np.ndarray) -> tuple[pd.Series | None, np.ndarray | None]:
    """The batch of some cells, and whether training cells come from it; None twice where no column names batches.

    The column is that of --calibrate_across, or the one by which preprocess.py has split the cells.
    """
    column = saved.training.get("calibrate_across") or (cells.stamp.get("split") or {}).get("split_by")
    batches = cells.obs.get(column)
    if batches is None:
        return None, None
    return batches.iloc[rows], batches.iloc[rows].isin(batches.iloc[cells.rows("train")].unique()).to_numpy()


def trust_scores(prediction: Prediction, truth: np.ndarray, saved: SavedModel) -> dict[str, float]:
    """How well the doubts in a model's output mark its errors (AUROC), and how often the parents of sets are right."""
    values = prediction.values
    wrong = values["predicted_cell_type"] != truth
    scores = {f"{name}_auroc": error_auroc(wrong, -values[name]) for name in DOUBTS if name in values}
    if "agreement" in values:
        all_agree = values["agreement"] == 1
        scores["both_auroc"] = error_auroc(wrong, -values["confidence"] - values["agreement"])
        scores["all_agree"] = float(all_agree.mean())
        for name, rows in {"accuracy_where_all_agree": all_agree, "accuracy_elsewhere": ~all_agree}.items():
            scores |= {name: float(1 - wrong[rows].mean())} if rows.any() else {}
    if "is_novel" in values:
        scores["novel"] = float(values["is_novel"].mean())
    if "parent_cell_type" in values:
        parents, hierarchy = values["parent_cell_type"], saved.fitted["hierarchy"]
        above = {name: set(ancestors_of(name, hierarchy)) | {TOP} for name in set(truth)}
        scores["parent_holds"] = float(
            np.mean([name in above[true] for name, true in zip(parents, truth, strict=True)])
        )
        scores["parent_is_a_type"] = float(np.isin(parents, saved.outputs).mean())
    return scores


def say_sets(table: dict, coverage: float) -> None:
    """Print coverage and size of the prediction sets of each method that has some."""
    for name, row in table.items():
        if "set_size" in row:
            print(
                f"prediction sets at a coverage of {coverage:g}, {name}: {row['set_coverage']:.1%} hold the true type, "
                f"{row['set_size']:.2f} types on average"
                + "".join(f"; {row[key]:.1%} {words}" for key, words in PLACES.items() if key in row)
            )
    if "agreement_auroc" in table["scmomer"]:
        agreement, confidence, both = (
            table["scmomer"][f"{name}_auroc"] for name in ("agreement", "confidence", "both")
        )
        print(
            f"errors marked by low confidence: AUROC {confidence:.3f}; by low agreement with the simple classifiers: "
            f"{agreement:.3f}; by the sum of both: {both:.3f}"
        )


def fit_baseline_sets(saved: SavedModel, cells: Cells, labels: pd.Series, baselines: dict[str, tuple]) -> dict:
    """Thresholds of the sets of logistic regression, name → fitted, by the validation cells that the model's use.

    None for too few validation cells; nothing without this baseline.
    """
    if WITH_SETS not in baselines:
        return {}
    estimator, _ = baselines[WITH_SETS]
    codes = label_codes(labels.iloc[cells.rows("val")], list(estimator.classes_))
    val = cells.rows("val")[codes >= 0]
    if len(val) < conformal.MIN_CELLS:
        return {WITH_SETS: None}
    share = in_blocks({WITH_SETS: estimator.predict_proba}, cells, saved.model_config.inputs, val)[WITH_SETS]
    return {WITH_SETS: conformal.fit_sets(share, codes[codes >= 0])}


def labelled_rows(saved: SavedModel, cells: Cells, labels: pd.Series | None, column: str, split: str) -> np.ndarray:
    """Rows of the split's cells that have a label.

    Raises
    ------
    UserError
        If there are none, or no label is one of the model's types.
    """
    if labels is None:
        raise UserError(f"{cells.path}: no column {column!r} in obs; name the labels with --label_column")
    rows = cells.rows(split)
    rows = rows[labels.notna().to_numpy()[rows]]
    if not len(rows):
        raise UserError(f"{cells.path}: no {split} cell has a label in {column}; choose another --label_column")
    if not labels.iloc[rows].isin(saved.outputs).any():
        raise UserError(
            f"{cells.path}: no type in {column} is one of the model's (such as {saved.outputs[0]!r}); "
            "choose another --label_column"
        )
    return rows


def features(cells: Cells, inputs: tuple[str, ...], rows: np.ndarray) -> csr_matrix:
    """[rows, features] the model-ready values of the modalities `inputs`, side by side."""
    return hstack([cells.values[name][rows] for name in inputs], format="csr")


def in_blocks(
    transforms: dict[str, Callable], cells: Cells, inputs: tuple[str, ...], rows: np.ndarray
) -> dict[str, np.ndarray]:
    """Return name → [rows, …] what each function makes of the cells' values, of which a block is read at a time."""
    found = {name: [] for name in transforms}
    for start in range(0, len(rows), BLOCK):
        x = features(cells, inputs, rows[start : start + BLOCK])
        for name, transform in transforms.items():
            found[name].append(transform(x))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def fit_baselines(
    saved: SavedModel, cells: Cells, labels: pd.Series, say, quick: bool = False
) -> tuple[dict[str, tuple], Unlabelled]:
    """Baselines, name → (estimator, how it was tuned), from the labels that the model learned from.

    Where the model saw unlabelled training cells, baselines that can use them see the same cells. The second value is
    what was learned without labels.
    """
    known_types = label_codes(labels, sorted(set(labels.dropna())))
    per_type = saved.training.get("labels_per_type", 0)
    is_known = limit_labels(known_types, cells, per_type, saved.training.get("seed", 0)) >= 0
    train, val = (rows[is_known[rows]] for rows in (cells.rows("train"), cells.rows("val")))
    more = np.setdiff1d(cells.rows("train"), train)
    train = _fewer(train, known_types, MOST_TRAINING, "labelled training cells", say)
    val = _fewer(val, known_types, MOST_VALIDATION, "validation cells", say)
    more = _fewer(more, np.zeros(len(labels)), MOST_TRAINING, "training cells without a label", say)
    read = lambda rows: features(cells, saved.model_config.inputs, rows) if len(rows) else None
    types = lambda rows: labels.iloc[rows].to_numpy()
    return fit_all(read(train), types(train), read(val), types(val), read(more), say=say, quick=quick)


def _fewer(rows: np.ndarray, codes: np.ndarray, most: int, what: str, say) -> np.ndarray:
    """Draw rows if there are more than `most`, and print how many."""
    drawn = rows[fewer(codes[rows], most)]
    if len(drawn) < len(rows):
        say(f"baselines use {len(drawn):,} of {len(rows):,} {what}")
    return drawn
