"""Score predicted cell types and predicted chromatin accessibility."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import sparse

from utils.errors import UserError

BLOCK_VALUES = 16_000_000
"""Dense scores are computed in blocks of at most this many values (64 MB in float32), however large the data."""
MIN_OPEN = 10
"""A peak is scored if it is open in at least this many of the scored cells, and closed in at least this many."""


# ---------------------------------------------------------------------------------------------------------------------
# Cell types
# ---------------------------------------------------------------------------------------------------------------------


def _labels(true, predicted) -> tuple[np.ndarray, np.ndarray]:
    """Check both lists of labels and return them as string arrays [cells]."""
    true, predicted = pd.Series(np.asarray(true)), pd.Series(np.asarray(predicted))
    if len(true) != len(predicted):
        raise ValueError(f"{len(true)} true labels but {len(predicted)} predicted ones")
    if len(true) == 0:
        raise UserError("There are no labelled cells to score: give a file whose cells have cell types.")
    if true.isna().any() or predicted.isna().any():
        missing = int((true.isna() | predicted.isna()).sum())
        raise UserError(f"{missing} of {len(true)} cells have no label: remove them before scoring.")
    return true.astype(str).to_numpy(), predicted.astype(str).to_numpy()


def confusion_counts(true, predicted) -> tuple[np.ndarray, np.ndarray]:
    """Count cells by true and predicted class.

    Parameters
    ----------
    true, predicted : array-like of labels [cells]

    Returns
    -------
    counts : ndarray of int [classes, classes]
        Rows are true classes, columns predicted ones.
    classes : ndarray of str [classes]
        All classes in either list, sorted.

    Raises
    ------
    UserError
        There are no cells, or a cell has no label.
    ValueError
        The lists differ in length.
    """
    true, predicted = _labels(true, predicted)
    classes, codes = np.unique(np.concatenate([true, predicted]), return_inverse=True)
    n, k = len(true), len(classes)
    counts = np.bincount(codes[:n] * k + codes[n:], minlength=k * k).reshape(k, k)
    return counts, classes


def scores_of_counts(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the scores of `classification_scores` for each confusion matrix.

    Parameters
    ----------
    counts : ndarray of int [..., true classes, predicted classes]

    Returns
    -------
    dict of ndarray [...]
    """
    n_correct = counts.diagonal(axis1=-2, axis2=-1)  # [..., classes], as the next two
    n_true, n_predicted = counts.sum(axis=-1), counts.sum(axis=-2)
    n_present = (n_true > 0).sum(axis=-1)  # classes without true cells add 0 to the sums below
    return {
        "accuracy": n_correct.sum(axis=-1) / n_true.sum(axis=-1),
        "balanced_accuracy": (n_correct / np.maximum(n_true, 1)).sum(axis=-1) / n_present,
        "macro_f1": (2 * n_correct / np.maximum(n_true + n_predicted, 1)).sum(axis=-1) / n_present,
        "n_cells": n_true.sum(axis=-1),
    }


def classification_scores(true, predicted) -> dict[str, float]:
    """Score predicted cell types.

    Means over classes are taken over the classes in `true`. A class that is only predicted already lowers the recall
    of the classes to which its cells belong. Counted as a class of its own, it would add a zero that says nothing about
    these cells.

    Parameters
    ----------
    true, predicted : array-like of labels [cells]

    Returns
    -------
    dict
        `accuracy`, `balanced_accuracy` (mean recall), `macro_f1` (all 0…1) and `n_cells`.

    Raises
    ------
    UserError
        There are no cells, or a cell has no label.
    ValueError
        The lists differ in length.
    """
    counts, _ = confusion_counts(true, predicted)
    return {name: value.item() for name, value in scores_of_counts(counts).items()}


def per_class_table(true, predicted) -> pd.DataFrame:
    """Return the precision, recall, F1 and support (number of true cells) of each class, largest class first.

    Parameters
    ----------
    true, predicted : array-like of labels [cells]

    Returns
    -------
    DataFrame [classes, 4]
        Indexed by class; classes that are only predicted come last, with support 0.
    """
    from sklearn.metrics import (
        precision_recall_fscore_support,
    )  # here, because it is slow to import and training does not need it

    true, predicted = _labels(true, predicted)
    classes = np.union1d(true, predicted)
    columns = precision_recall_fscore_support(true, predicted, labels=classes, zero_division=0)
    table = pd.DataFrame(dict(zip(["precision", "recall", "f1", "support"], columns, strict=True)), index=classes)
    table.index.name = "cell_type"
    return table.astype({"support": int}).sort_values("support", ascending=False, kind="stable")


def bootstrap_interval(
    true,
    predicted,
    score: str | Callable[[np.ndarray, np.ndarray], float],
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a score over cells (Efron & Tibshirani 1993, chapter 13).

    Cells are drawn with replacement within each true class. If they were drawn from all cells, a class of three cells
    would be missing from many resamples, and the mean over classes would rise whenever a hard class is missing.

    Parameters
    ----------
    true, predicted : array-like of labels [cells]
    score : str or callable
        A key of :func:`classification_scores` (fast), or a function (true, predicted) → float.
    n : int
        Number of resamples.
    seed : int
    level : float
        Coverage, 0…1.

    Returns
    -------
    low, high : float
        The interval covers the choice of test cells. It does not cover variation between donors, experimental batches
        or training runs.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    rng = np.random.default_rng(seed)
    true, predicted = _labels(true, predicted)
    if callable(score):
        members = [np.flatnonzero(true == name) for name in np.unique(true)]
        draws = (np.concatenate([rng.choice(rows, len(rows)) for rows in members]) for _ in range(n))
        values = [score(true[rows], predicted[rows]) for rows in draws]
    else:
        # Drawing a class's cells with replacement is the same as drawing its row of counts from a multinomial, which is
        # less work.
        counts, _ = confusion_counts(true, predicted)
        sizes = counts.sum(axis=1)
        shares = counts / np.maximum(sizes, 1)[:, None]
        shares[sizes == 0, 0] = 1  # only predicted, 0 cells to draw: any distribution will do
        values = [scores_of_counts(rng.multinomial(sizes, shares))[score] for _ in range(n)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# ---------------------------------------------------------------------------------------------------------------------
# Accessibility
# ---------------------------------------------------------------------------------------------------------------------

Scores = np.ndarray | Callable[[int, int], np.ndarray]


def _binary(accessibility, layout: type) -> sparse.sparray:
    """Return the open entries as a canonical sparse array of the given layout, without changing the caller's matrix."""
    matrix = layout(accessibility)
    if not matrix.has_canonical_format or not matrix.data.all():
        matrix = matrix.copy()
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
    return matrix


def _ranking_by_line(positives, n_values: int, block: Callable[[int, int], np.ndarray], minimum: int) -> np.ndarray:
    """Return the AUROC and the average precision of each line (peak or cell) of a compressed sparse array.

    A line has n₁ positive and n₀ negative scores. With ties counting one half (Mann & Whitney 1947), and the sum over
    the positive scores x,

        AUROC = (Σₓ (#{scores < x} + #{scores ≤ x}) / 2 - n₁² / 2) / (n₁ n₀).

    This takes one sort per line and two binary searches per positive score, of which there are few. Average precision
    is the mean over positives of the precision among all values that score at least as high.

    Parameters
    ----------
    positives : compressed sparse array of open entries, one line per peak or cell
    n_values : length of a line
    block : (start, stop) → scores of these lines [stop - start, n_values]
    minimum : lines with fewer open or fewer closed entries get NaN

    Returns
    -------
    ndarray [lines, 2]
    """
    n_lines = len(positives.indptr) - 1
    n_open = np.diff(positives.indptr).astype(np.int64)
    n_closed = n_values - n_open
    result = np.full((n_lines, 2), np.nan)
    wanted = (n_open >= max(minimum, 1)) & (n_closed >= max(minimum, 1))
    step = max(1, BLOCK_VALUES // max(n_values, 1))
    for start in range(0, n_lines, step):
        stop = min(start + step, n_lines)
        lines = np.flatnonzero(wanted[start:stop])
        if len(lines) == 0:
            continue
        values = np.asarray(block(start, stop))
        if values.shape != (stop - start, n_values):
            raise ValueError(f"scores of lines {start}…{stop} have shape {values.shape}, not {stop - start, n_values}")
        if not np.issubdtype(values.dtype, np.floating) or values.dtype.itemsize < 4:
            values = values.astype(np.float32 if values.dtype.itemsize < 4 else np.float64)
        for line in lines:  # sorting takes the time; searching all lines at once was slower
            ordered = np.sort(values[line])
            if np.isnan(ordered[-1]):
                raise ValueError(f"scores of line {start + line} contain NaN")
            i = start + line
            x = values[line, positives.indices[positives.indptr[i] : positives.indptr[i + 1]]]
            x.sort()  # binary searches in ascending order are faster
            lower = np.searchsorted(ordered, x, "left")
            below = lower.sum() + np.searchsorted(ordered, x, "right").sum()
            result[i, 0] = (below / 2 - n_open[i] ** 2 / 2) / (n_open[i] * n_closed[i])
            result[i, 1] = np.mean((n_open[i] - np.searchsorted(x, x, "left")) / (n_values - lower))
    return result


def feature_auroc(accessibility, scores: Scores, min_open: int = 1) -> np.ndarray:
    """Return the AUROC of each peak: how well its scores separate cells where it is open from cells where it is closed.

    Scores that are the same in all cells give 0.5, so this measures whether differences between cells are predicted.

    Parameters
    ----------
    accessibility : sparse or dense matrix [cells, peaks]
        Open where not zero. Compressed sparse columns (CSC) save a conversion.
    scores : ndarray [cells, peaks], or a function (start, stop) → ndarray [cells, stop - start]
        The function returns the scores of the peaks start…stop-1. It is called once per block, which limits memory.
    min_open : int
        A peak must be open in at least this many cells, and closed in at least this many.

    Returns
    -------
    ndarray of float64 [peaks]
        NaN where a peak is open or closed in too few cells.

    Raises
    ------
    ValueError
        Shapes do not match, or a score is NaN.
    """
    return peak_ranking(accessibility, scores, min_open)[:, 0]


def peak_ranking(accessibility, scores: Scores, min_open: int) -> np.ndarray:
    """Return the AUROC and average precision of each peak [peaks, 2]; parameters as in :func:`feature_auroc`."""
    positives = _binary(accessibility, sparse.csc_array)
    block = _blocks(scores, positives.shape, by_peak=True)

    def peaks_as_rows(start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(
            np.transpose(block(start, stop))
        )  # sorting strided columns takes several times as long

    return _ranking_by_line(positives, positives.shape[0], peaks_as_rows, min_open)


def cell_auroc(accessibility, scores: Scores, min_open: int = 1) -> np.ndarray:
    """Return the AUROC of each cell: how well its scores separate its open peaks from its closed ones.

    Some peaks are open more often than others in all cells. Scores that are the same for every cell, namely the mean
    accessibility of each peak, therefore reach a high AUROC. Compare with that baseline and with :func:`feature_auroc`.

    Parameters
    ----------
    accessibility : sparse or dense matrix [cells, peaks]
        Open where not zero.
    scores : ndarray [cells, peaks], or a function (start, stop) → ndarray [stop - start, peaks]
        The function returns the scores of the cells start…stop-1.
    min_open : int
        A cell must have at least this many open peaks, and at least this many closed ones.

    Returns
    -------
    ndarray of float64 [cells]
        NaN where a cell has too few open or closed peaks.

    Raises
    ------
    ValueError
        Shapes do not match, or a score is NaN.
    """
    return cell_ranking(accessibility, scores, min_open)[:, 0]


def cell_ranking(accessibility, scores: Scores, min_open: int) -> np.ndarray:
    """Return the AUROC and average precision of each cell [cells, 2]; parameters as in :func:`cell_auroc`."""
    positives = _binary(accessibility, sparse.csr_array)
    block = _blocks(scores, positives.shape, by_peak=False)
    return _ranking_by_line(positives, positives.shape[1], block, min_open)


def _blocks(scores: Scores, shape: tuple[int, int], by_peak: bool) -> Callable[[int, int], np.ndarray]:
    """Return scores, given as an array or as a function, as a function (start, stop) of peaks or cells."""
    if callable(scores):
        return scores
    if np.shape(scores) != shape:
        raise ValueError(f"scores have shape {np.shape(scores)}, accessibility has {shape}")
    return (lambda start, stop: scores[:, start:stop]) if by_peak else (lambda start, stop: scores[start:stop])


def translation_scores(
    accessibility, scores: Scores, min_open: int = MIN_OPEN, cell_scores: Callable[[int, int], np.ndarray] | None = None
) -> dict[str, float]:
    """Score accessibility that was predicted from RNA.

    Parameters
    ----------
    accessibility : sparse or dense matrix [cells, peaks]
        Open where not zero.
    scores : ndarray [cells, peaks], or a function of peaks as in :func:`feature_auroc`
        Probabilities or logits: only their order matters.
    min_open : int
        Only peaks count that are open in at least this many cells and closed in at least this many.
    cell_scores : function of cells as in :func:`cell_auroc`, optional
        Required if `scores` is a function.

    Returns
    -------
    dict
        `peak_auroc` and `peak_ap` : AUROC and average precision, averaged over these peaks
        `cell_auroc` and `cell_ap` : the same for cells, averaged over cells with any open peak; all peaks count
        `n_peaks` and `n_cells` : numbers of peaks and cells in these means
        A mean over nothing is NaN.
    """
    if callable(scores) and cell_scores is None:
        raise ValueError("scores is a function of peaks: give cell_scores, a function of cells, too")
    per_peak = peak_ranking(accessibility, scores, min_open)
    per_cell = cell_ranking(accessibility, cell_scores if callable(scores) else scores, 1)
    return {
        "peak_auroc": _mean(per_peak[:, 0]),
        "cell_auroc": _mean(per_cell[:, 0]),
        "peak_ap": _mean(per_peak[:, 1]),
        "cell_ap": _mean(per_cell[:, 1]),
        "n_peaks": int(np.isfinite(per_peak[:, 0]).sum()),
        "n_cells": int(np.isfinite(per_cell[:, 0]).sum()),
    }


def _mean(values: np.ndarray) -> float:
    """Return the mean of the finite values; NaN if there is none."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")
