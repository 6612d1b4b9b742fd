"""Calibration across batches: constants from cells of batches that a model has not seen, and what they hold."""

from dataclasses import dataclass

import numpy as np

from utils.errors import UserError
from utils.evaluate.conformal import set_scores

FOLDS = 3
"""At most so many models are trained, each without the batches of one fold."""
COVERAGE = 0.9
"""The coverage at which sets within and across batches are compared."""


@dataclass
class LeftOut:
    """Cells of batches that were left out, scored by the models that were trained without them.

    Attributes
    ----------
    column : column of obs with the batches
    batch, fold : [cells] the name of each cell's batch, and the number of the fold that it was left out with
    logits, labels : [cells, types] divided by the temperature that the model has within its batches, and [cells] class
        numbers
    distances : novelty distances of such cells, to the training cells of the model without them; may be empty
    is_mixed : whether the logits are those of mixtures with simple classifiers
    gain : of these mixtures over the models alone, in the mean of accuracy and macro-F1; None if there were none
    """

    column: str
    batch: np.ndarray
    fold: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    distances: np.ndarray
    is_mixed: bool = False
    gain: float | None = None


def batch_folds(batches: np.ndarray, flag: str) -> list[list[str]]:
    """Share batches among at most `FOLDS` folds, so that the folds have about equally many cells.

    Parameters
    ----------
    batches : [cells] names of the batches of the labelled cells
    flag : how the user named the column, for the message

    Raises
    ------
    UserError
        If there are fewer than two batches.
    """
    names, sizes = np.unique(batches.astype(str), return_counts=True)
    if len(names) < 2:
        named = f"only batch {names[0]!r}" if len(names) else "no batch"
        raise UserError(
            f"{flag}: the labelled training and validation cells are of {named}, and two are needed; train on cells of "
            "several batches, name another column, or leave the flag out"
        )
    folds: list[list[str]] = [[] for _ in range(min(FOLDS, len(names)))]
    filled = np.zeros(len(folds), dtype=np.int64)
    for number in np.argsort(-sizes, kind="stable"):
        smallest = int(filled.argmin())
        folds[smallest].append(str(names[number]))
        filled[smallest] += sizes[number]
    return folds


def coverage_of(sets: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return number of cells, coverage and mean size of prediction sets; see `conformal.set_scores`."""
    scores = set_scores(sets, labels)
    return {"n_cells": len(labels), "set_coverage": scores["set_coverage"], "set_size": scores["set_size"]}


def coverage_by_place(sets: np.ndarray, labels: np.ndarray, is_known: np.ndarray) -> dict[str, float]:
    """Return the coverage of sets in batches of training cells and in others, where both have cells.

    Parameters
    ----------
    sets, labels : [cells, types] bool, and [cells] class numbers, -1 for a type that is not a class
    is_known : [cells] bool, whether training cells come from the cell's batch
    """
    places = {"set_coverage_within": is_known, "set_coverage_across": ~is_known}
    return {name: coverage_of(sets[rows], labels[rows])["set_coverage"] for name, rows in places.items() if rows.any()}


def coverage_across(left_out: LeftOut, sets_from) -> tuple[dict[str, float], list[dict]]:
    """Return coverage and size of sets in batches that neither a model nor its thresholds have seen.

    Parameters
    ----------
    left_out : the cells
    sets_from : function (logits, labels, logits of other cells) → their sets [cells, types], or None for too few cells

    Returns
    -------
    over all cells, and for each batch with its name as `batch`; empty if a fold has too few cells
    """
    sets = np.zeros(left_out.logits.shape, dtype=bool)
    for fold in np.unique(left_out.fold):
        mine = left_out.fold == fold
        found = sets_from(left_out.logits[~mine], left_out.labels[~mine], left_out.logits[mine])
        if found is None:
            return {}, []
        sets[mine] = found
    by_batch = [
        {"batch": str(name)} | coverage_of(sets[left_out.batch == name], left_out.labels[left_out.batch == name])
        for name in np.unique(left_out.batch)
    ]
    return coverage_of(sets, left_out.labels), by_batch


def coverage_text(measured: dict) -> str:
    """Say in words what sets hold within and across batches.

    Parameters
    ----------
    measured : column; coverage; within and across, each from :func:`coverage_of` or empty; batches
    """
    parts = []
    for name, where in (
        ("within", "validation cells of the training batches"),
        ("across", "cells of batches left out"),
    ):
        if found := measured[name]:
            size = f"{found['set_size']:.2f} types on average"
            parts.append(f"{found['set_coverage']:.1%} of {found['n_cells']:,} {where} ({size})")
    worst = min(measured["batches"], key=lambda row: row["set_coverage"], default=None)
    least = f", least in {worst['batch']} ({worst['set_coverage']:.1%})" if worst else ""
    return f"sets at {measured['coverage']:.0%}, calibrated across {measured['column']}, hold the true type of " + (
        f"{' and of '.join(parts)}{least}"
    )
