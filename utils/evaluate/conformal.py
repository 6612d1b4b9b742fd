"""Split-conformal prediction sets: for each cell the types it may have, with a known share of sets that hold the truth.

Held-out cells give a distribution of nonconformity scores. A new cell's set holds each type whose score is at most a
quantile of it. If new and held-out cells are exchangeable, a share of at least `level` of the sets holds the true type,
whatever the model (Vovk et al., Algorithmic Learning in a Random World, 2005; per class: Vovk et al., AISTATS 2003; the
correction for few cells and both scores: Angelopoulos and Bates, A Gentle Introduction to Conformal Prediction, 2021).
"""

import json
import math

import numpy as np

LEVELS = tuple(round(0.01 * percent, 2) for percent in range(50, 100))
"""Coverages for which thresholds are kept. A coverage between two of them takes the higher one."""
MIN_CELLS = 10
"""With fewer held-out cells there are no sets: at a coverage of 0.9 they would hold every type."""
MIN_PER_CLASS = 20
"""With fewer held-out cells, a class has the threshold of all cells in place of its own."""
ENOUGH_TO_CHOOSE = 200
"""With fewer held-out cells, the score is not chosen: half of the cells would be lost for the thresholds."""
CHOSEN_AT = 0.9
"""The coverage at which the two scores are compared."""
EVERYTHING = 1.0
"""A threshold that no score exceeds: both scores are probabilities."""
SEPARATOR = "; "
"""Between the types of a set, as text."""


def nonconformity(probability: np.ndarray, score: str) -> np.ndarray:
    """Return for each cell and class how badly the class fits, from 0 to 1 [cells, classes].

    Parameters
    ----------
    probability : [cells, classes]
    score : `probability` for 1 - p; `cumulated` for the sum of p over the class and all that are more likely
    """
    probability = np.asarray(probability, dtype=np.float64)
    if score == "probability":
        return 1.0 - probability
    order = np.argsort(-probability, axis=1, kind="stable")
    cumulated = np.minimum(np.cumsum(np.take_along_axis(probability, order, 1), axis=1), EVERYTHING)
    out = np.empty_like(cumulated)
    np.put_along_axis(out, order, cumulated, 1)
    return out


def quantile(scores: np.ndarray, level: float) -> float:
    """Return the ⌈(n + 1) level⌉-th smallest of n scores; `EVERYTHING` if there are too few for the level."""
    rank = math.ceil((len(scores) + 1) * level - 1e-9)  # 0.9 · 10 is 9, not the 10 that rounding may make of it
    return float(np.partition(scores, rank - 1)[rank - 1]) if 0 < rank <= len(scores) else EVERYTHING


def fit_sets(probability, labels) -> dict | None:
    """Fit the thresholds of prediction sets on held-out cells.

    With at least `ENOUGH_TO_CHOOSE` cells, the score with the smaller sets on one half of the cells is taken and its
    thresholds are fitted on the other half, so that the choice does not touch the coverage. With fewer cells the score
    is 1 - p.

    Parameters
    ----------
    probability : array-like of float [cells, classes]
    labels : array-like of int [cells], class numbers

    Returns
    -------
    Plain numbers for :func:`prediction_sets`: score; n_cells, of the thresholds; levels; threshold, per level;
    class_threshold, class → per level, for classes with enough cells. None with fewer than `MIN_CELLS` cells.
    """
    probability, labels = np.asarray(probability, dtype=np.float64), np.asarray(labels)
    if len(labels) < MIN_CELLS:
        return None
    rows, score = np.arange(len(labels)), "probability"
    if len(labels) >= ENOUGH_TO_CHOOSE:
        rows = np.random.default_rng(0).permutation(len(labels))
        half, rows = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        score = min(("probability", "cumulated"), key=lambda name: _size(probability[half], labels[half], name))
    found = nonconformity(probability[rows], score)[np.arange(len(rows)), labels[rows]]
    sizes = np.bincount(labels[rows], minlength=probability.shape[1])
    by_class = {
        str(number): [quantile(found[labels[rows] == number], level) for level in LEVELS]
        for number in np.flatnonzero(sizes >= MIN_PER_CLASS)
    }
    return {
        "score": score,
        "n_cells": len(rows),
        "levels": list(LEVELS),
        "threshold": [quantile(found, level) for level in LEVELS],
        "class_threshold": by_class,
    }


def _size(probability: np.ndarray, labels: np.ndarray, score: str) -> float:
    """Return the mean number of types in the sets of some cells with thresholds from the same cells."""
    scores = nonconformity(probability, score)
    sets = scores <= quantile(scores[np.arange(len(labels)), labels], CHOSEN_AT)
    return float(np.maximum(sets.sum(1), 1).mean())


def check_sets(fitted: dict) -> None:
    """Raise ValueError if what :func:`fit_sets` returned was damaged."""
    rows = {"threshold": fitted["threshold"]} | fitted["class_threshold"]
    if fitted["score"] not in ("probability", "cumulated"):
        raise ValueError(f"the score of prediction sets is {fitted['score']!r}, not probability or cumulated")
    for name, values in rows.items():
        numbers = np.asarray(values, dtype=np.float64)
        if numbers.shape != (len(fitted["levels"]),) or not ((numbers >= 0) & (numbers <= EVERYTHING)).all():
            raise ValueError(f"the thresholds of prediction sets ({name}) are not numbers from 0 to 1, one per level")


def thresholds(fitted: dict, level: float, n_classes: int, per_class: bool = False) -> np.ndarray:
    """Return the threshold of each class [n_classes] at a coverage.

    Parameters
    ----------
    fitted : from :func:`fit_sets`
    level : the coverage, at most the last of `LEVELS`
    per_class : each class with enough held-out cells has its own threshold, so that the coverage holds for each of them
    """
    position = int(np.searchsorted(np.asarray(fitted["levels"]), level - 1e-9))
    out = np.full(n_classes, fitted["threshold"][position])
    for number, values in fitted["class_threshold"].items() if per_class else ():
        out[int(number)] = values[position]
    return out


def prediction_sets(
    fitted: dict, probability, level: float = 0.9, per_class: bool = False, keep_best: bool = True
) -> np.ndarray:
    """Return the prediction set of each cell, [cells, classes] bool.

    Parameters
    ----------
    fitted : from :func:`fit_sets`
    probability : array-like of float [cells, classes]
    level, per_class : as in :func:`thresholds`
    keep_best : the most likely class is always in the set. Otherwise sets may be empty, where no class fits well; the
        coverage is then near the level, and not only at least the level
    """
    probability = np.asarray(probability)
    sets = nonconformity(probability, fitted["score"]) <= thresholds(fitted, level, probability.shape[1], per_class)
    if keep_best:
        sets[np.arange(len(sets)), probability.argmax(1)] = True
    return sets


def set_scores(sets: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return coverage, the least coverage of a class, and mean size of prediction sets.

    Parameters
    ----------
    sets : [cells, classes] bool
    labels : [cells] int, class numbers; -1 for a type that is not a class, which no set holds
    """
    holds = sets[np.arange(len(labels)), labels] & (labels >= 0)
    enough = [number for number in np.unique(labels[labels >= 0]) if (labels == number).sum() >= MIN_PER_CLASS]
    return {
        "set_coverage": float(holds.mean()),
        "least_type_coverage": min((float(holds[labels == number].mean()) for number in enough), default=math.nan),
        "set_size": float(sets.sum(1).mean()),
    }


def sets_as_text(sets: np.ndarray, probability: np.ndarray, names: list[str]) -> np.ndarray:
    """Return each set as text [cells]: its types in order of probability, joined by `SEPARATOR`.

    If a name could be misread (it holds a semicolon, a line break or a bracket at its start), all sets are JSON lists.
    :func:`types_of` reads both.
    """
    as_json = any(";" in name or "\n" in name or name.startswith("[") or name != name.strip() for name in names)
    write = (lambda types: json.dumps(types, ensure_ascii=False)) if as_json else SEPARATOR.join
    order = np.argsort(-np.asarray(probability), axis=1, kind="stable")
    chosen = np.take_along_axis(sets, order, 1)
    known: dict[tuple, str] = {}  # cells share few different sets
    out = np.empty(len(sets), dtype=object)
    for cell in range(len(sets)):
        types = tuple(order[cell, chosen[cell]])
        if types not in known:
            known[types] = write([names[number] for number in types])
        out[cell] = known[types]
    return out


def types_of(text: str) -> list[str]:
    """Return the types of a prediction set from its text."""
    if text.startswith("["):
        return json.loads(text)
    return text.split(SEPARATOR) if text else []
