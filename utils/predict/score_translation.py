"""Scores of the translation between modalities beside baselines, on the same cells."""

import numpy as np
from scipy import sparse
from scipy.special import expit

from models.shapes import other
from utils.cells.minibatches import CellDataset
from utils.cells.preprocessed import Cells
from utils.evaluate.comparison import in_words
from utils.evaluate.metrics import MIN_OPEN
from utils.evaluate.translation import unweighted_probability
from utils.evaluate.translation_baselines import depth_translation, neighbour_translation, ridge_translation
from utils.evaluate.translation_scores import ERRORS, N_RESAMPLES, draw_resamples, interval, score_prediction
from utils.evaluate.type_baselines import MOST_TRAINING, MOST_VALIDATION
from utils.files.disk_rows import Rows, row_lengths, select
from utils.predict.translation import at_most, fit_calibration, translate
from utils.train.config import InferConfig
from utils.train.distributed import Runtime
from utils.train.model_folder import SavedModel

CALIBRATED = "scmomer, calibrated"
"""Row of the model's probabilities after calibration on validation cells."""
OURS = ("scmomer", CALIBRATED)
MOST_CELLS, MOST_FEATURES = 10_000, 100_000
"""Cells and features that are scored, at most: more take hours, and change the means little."""


def score_translation(saved: SavedModel, cells: Cells, rows: np.ndarray, config: InferConfig, runtime: Runtime) -> dict:
    """Scores of the missing modality, predicted from the measured one, with intervals and the best baseline beside.

    Parameters
    ----------
    saved : a model with a student
    cells : paired cells that fit it
    rows : of the cells to score
    config, runtime : how to run the model

    Returns
    -------
    method → scores, each with its 95% interval (`<score>_95%`); also n_cells, intervals (what varies in them),
    differences to the best baseline, a verdict in words, and for peaks the rule by which they are scored
    """
    missing = saved.options["missing"]
    measured = other(missing)
    what = "peaks" if missing == "atac" else "genes"
    rows = draw(rows, MOST_CELLS, "cells are scored", runtime.say)
    train = draw(cells.rows("train"), MOST_TRAINING, "training cells are used by baselines", runtime.say)
    val = draw(cells.rows("val"), MOST_VALIDATION, "validation cells are used by baselines", runtime.say)
    n_features = cells.values[missing].shape[1]
    kept = draw(np.arange(n_features), MOST_FEATURES, f"{what} are scored", runtime.say)
    columns = {measured: None, missing: kept if len(kept) < n_features else None}
    read = lambda name, part: read_columns(cells.values[name], part, columns[name])

    dataset = CellDataset({measured: select(cells.values[measured], rows)}, cells.obs.index[rows])
    ours = translate(saved, dataset, config, runtime)
    known = [read(name, part) for part in (train, val) for name in (measured, missing)]
    y_train = known[1]
    x, truth = read(measured, rows), read(missing, rows)
    mean = np.asarray(y_train.mean(0), dtype=np.float32)  # of open peaks, or of log values
    depths = row_lengths(select(cells.values[measured], train)), y_train, ours.n_detected
    # Every prediction is a product left [cells, k] · right [k, features], computed in stretches: all of them at once
    # would not fit into memory.
    factors = {"scmomer": (ours.left, ours.right[:, kept], None)}
    if missing == "atac":
        calibration = fit_calibration(saved, cells, config, runtime)
        left, right = calibration.factors(ours.left, ours.right, ours.n_detected)
        factors[CALIBRATED] = left, right[:, kept], str(calibration)
    factors |= {
        f"mean {'accessibility' if missing == 'atac' else 'expression'}": (np.ones((len(rows), 1)), mean, None),
        "mean × depth": depth_translation(*depths),
        "nearest neighbours": neighbour_translation(*known, x),
        "ridge on PCA": ridge_translation(*known, x, ranking=missing == "atac"),
    }
    labels = cells.labels()
    types = None if labels is None else labels.iloc[rows].to_numpy()
    if labels is not None:
        factors["type mean × depth"] = depth_translation(*depths, labels.iloc[train].to_numpy(), types)
    # Trained with open peaks weighted w times, the decoder overestimates the odds of an open peak w-fold.
    to_probability = {"scmomer": unweighted_probability, CALIBRATED: expit} if missing == "atac" else {}
    resamples = draw_resamples(*truth.shape, types)
    table, draws = {}, {}
    for name, (left, right, setting) in factors.items():
        scores = score_prediction(
            left, right, truth, resamples, types, ours.n_detected, to_probability.get(name), missing == "atac"
        )
        draws[name] = {score: values for score, (_, values) in scores.items() if len(values)}
        table[name] = {score: value for score, (value, _) in scores.items()}
        table[name] |= {f"{score}_95%": interval(values, table[name][score]) for score, values in draws[name].items()}
        if setting is not None:
            table[name]["setting"] = setting
    ours_is = CALIBRATED if missing == "atac" else "scmomer"
    table["differences"] = differences(table, draws, ours_is, [name for name in factors if name not in OURS])
    table["verdict"] = verdict(table["differences"], ours_is)
    table["intervals"] = (
        f"95% of {N_RESAMPLES} bootstrap samples: of peaks for scores per peak, of cells (drawn within types where "
        "there are labels) for all others; batches and training runs do not vary"
    )
    if missing == "atac":
        rule = (
            f"{table['scmomer']['n_peaks']:,} of {truth.shape[1]:,} peaks count in scores per peak: those that are "
            f"open in at least {MIN_OPEN} of the {len(rows):,} cells and closed in at least {MIN_OPEN}; linear "
            "predictions are clipped to 0..1 for Brier score and calibration error"
        )
        runtime.say(rule)
        table["rule"] = rule
    return table | {"n_cells": len(rows)}


def draw(numbers: np.ndarray, most: int, what: str, say) -> np.ndarray:
    """Return at most so many of the numbers, in order, and say so if there are more."""
    if len(numbers) > most:
        say(f"{most:,} of {len(numbers):,} {what}, drawn at random")
    return at_most(numbers, most)


def read_columns(matrix: Rows, rows: np.ndarray, columns: np.ndarray | None, block: int = 2048) -> sparse.csr_matrix:
    """Read some columns of cells, a block of cells at a time; None for all columns."""
    if columns is None:
        return matrix[rows]
    blocks = [matrix[rows[start : start + block]][:, columns] for start in range(0, max(len(rows), 1), block)]
    return sparse.vstack(blocks, format="csr")


def differences(table: dict, draws: dict, ours: str, baselines: list[str]) -> list[dict]:
    """Compare one method with the best of the baselines, for each score.

    Parameters
    ----------
    table : method → score → value
    draws : method → score → values in the bootstrap samples
    ours, baselines : names of methods

    Returns
    -------
    list of a dict for each score: score, ours, baseline (the best one), theirs, difference, its 95% interval, and
    lower_is_better
    """
    found = []
    for score in draws[ours]:
        known = {name: table[name][score] for name in baselines if np.isfinite(table[name].get(score, np.nan))}
        if not known or not np.isfinite(table[ours][score]):
            continue
        best = (min if score in ERRORS else max)(known, key=known.get)
        difference = table[ours][score] - known[best]
        comparison = {
            "score": score,
            "ours": table[ours][score],
            "baseline": best,
            "theirs": known[best],
            "difference": difference,
            "difference_95%": interval(draws[ours][score] - draws[best][score], difference),
            "lower_is_better": score in ERRORS,
        }
        found.append(comparison)
    return found


def verdict(compared: list[dict], ours: str) -> list[str]:
    """Return a sentence for each score that says who wins; `compared` comes from `differences`."""
    return [in_words(ours, row, row["score"].replace("_", " ")) for row in compared]
