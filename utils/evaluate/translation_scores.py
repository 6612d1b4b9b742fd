"""Score translations between modalities, with bootstrap intervals that are paired between methods.

A prediction [cells, features] can be too large for memory. It is given as two factors, left [cells, k] and right
[k, features], and only blocks of their product are computed.

What varies in the intervals: features for scores per feature, which are means over peaks; cells for all others, drawn
within each type. All methods get the same draws. Batches and training runs do not vary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from utils.evaluate.metrics import MIN_OPEN, cell_ranking, feature_auroc, peak_ranking
from utils.evaluate.translation import product

N_RESAMPLES = 200
BLOCK = 128
"""Cells whose predictions are computed at once."""
STRETCH = 16_384
"""Features whose predictions are computed at once: the bootstrap samples of each type's profile are held for them."""
PROBABILITY_BINS = np.array([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
"""Edges of the bins of the expected calibration error. Most peaks are open in few cells, so that bins of equal width
would put nearly all probabilities into the first."""
MIN_CELLS = 10
"""A type's mean profile is scored if it has at least this many cells."""
ERRORS = ("rna_mse", "pseudobulk_rmse", "brier", "calibration_error")
"""Scores of which a lower one is better."""


@dataclass(frozen=True)
class Resamples:
    """How often each cell and each feature was drawn in each bootstrap sample.

    Attributes
    ----------
    cells, features : [N_RESAMPLES, cells] and [N_RESAMPLES, features] float32
    """

    cells: np.ndarray
    features: np.ndarray


def draw_resamples(n_cells: int, n_features: int, types: np.ndarray | None = None, seed: int = 0) -> Resamples:
    """Draw bootstrap samples of cells, within each type, and of features.

    Parameters
    ----------
    n_cells, n_features : numbers of cells and features
    types : [cells] types, None or NaN where unknown; None if no cell has one
    seed : seed of the draws
    """
    rng = np.random.default_rng(seed)
    counts = lambda n: rng.multinomial(n, np.full(n, 1 / n), N_RESAMPLES).astype(np.float32)
    cells = np.empty((N_RESAMPLES, n_cells), dtype=np.float32)
    for members in _groups(n_cells, types).values():
        cells[:, members] = counts(len(members))
    return Resamples(cells, counts(n_features))


def interval(draws: np.ndarray, score: float) -> tuple[float, float]:
    """Return the 95% interval of a score from its values in bootstrap samples.

    The samples are moved so that their mean is the score: a mean profile of resampled cells has more noise than that of
    the cells themselves, which adds the same to each sample's error.

    Parameters
    ----------
    draws : [N_RESAMPLES] the score in each sample; of a difference, that of both methods in the same sample
    score : the score on the cells and features themselves
    """
    if not np.isfinite(score) or not np.isfinite(draws).any():
        return float("nan"), float("nan")
    low, high = np.nanquantile(draws, (0.025, 0.975)) - np.nanmean(draws) + score
    return float(low), float(high)


def score_prediction(
    left,
    right,
    truth: csr_matrix,
    resamples: Resamples,
    types: np.ndarray | None,
    n_detected: np.ndarray,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    is_peaks: bool = True,
    is_probability: bool = True,
) -> dict[str, tuple[float, np.ndarray]]:
    """Score one method's prediction.

    Parameters
    ----------
    left, right : [cells, k] and [k, features]; their product is the prediction
    truth : measured values [cells, features]; of peaks, 1 where open
    resamples : as drawn for all methods by `draw_resamples`
    types : [cells] types, None or NaN where unknown; None if no cell has one
    n_detected : [cells] features of the measured modality that are detected in each cell
    transform : brings the product to the scale of `truth`; None if it is on that scale
    is_peaks : whether peaks are predicted; otherwise, log-normalised expression
    is_probability : whether the predicted peaks are meant as probabilities, whose calibration is scored; values below
        0 or above 1 are clipped for this score alone

    Returns
    -------
    dict
        Score → its value, and its values [N_RESAMPLES] in the bootstrap samples. Of peaks: `peak_auroc`, `peak_ap`,
        `peak_auroc_within_depth`, `cell_auroc`, `cell_ap`, `brier` and `calibration_error` (expected calibration error
        over cells × peaks, in the bins of `PROBABILITY_BINS`). Of genes: `rna_mse`. Of both, if a type has enough
        cells: `pseudobulk_rmse` of the mean profiles of types, and `pseudobulk_correlation`, the mean over types of
        the Pearson correlation over features between predicted and measured profiles after each has lost the mean of
        its profiles over types.
    """
    found = {}
    if is_peaks:
        per_peak = peak_ranking(truth, lambda start, stop: product(left, right[:, start:stop]), MIN_OPEN)
        per_cell = cell_ranking(truth, lambda start, stop: product(left[start:stop], right), 1)
        within = auroc_within_depth(left, right, truth, n_detected)
        found["peak_auroc"] = _mean(per_peak[:, 0], resamples.features)
        found["peak_auroc_within_depth"] = _mean(within, resamples.features)
        found["cell_auroc"] = _mean(per_cell[:, 0], resamples.cells)
        found["peak_ap"] = _mean(per_peak[:, 1], resamples.features)
        found["cell_ap"] = _mean(per_cell[:, 1], resamples.cells)
        found["n_peaks"] = int(np.isfinite(per_peak[:, 0]).sum()), np.empty(0)
    return found | _scores_of_values(
        left, right, truth, resamples, types, transform, is_peaks=is_peaks, is_probability=is_peaks and is_probability
    )


def auroc_within_depth(left, right, truth: csr_matrix, n_detected: np.ndarray, n_strata: int = 4) -> np.ndarray:
    """Return the AUROC of peaks among cells of similar depth, which the depth of a cell alone cannot raise much.

    Parameters
    ----------
    left, right, truth, n_detected : as in `score_prediction`
    n_strata : cells are cut into so many groups of equal size by their depth; each is scored on its own

    Returns
    -------
    [n_strata, peaks], NaN for peaks that are open or closed in fewer than `MIN_OPEN` cells of the group
    """
    found = []
    for cells in np.array_split(np.argsort(n_detected, kind="stable"), n_strata):
        mine = left[cells]
        scores = lambda start, stop, mine=mine: product(mine, right[:, start:stop])
        found.append(feature_auroc(truth[cells], scores, MIN_OPEN))
    return np.array(found)


def _scores_of_values(
    left, right, truth, resamples, types, transform, *, is_peaks: bool, is_probability: bool
) -> dict[str, tuple[float, np.ndarray]]:
    """Scores of the predicted values themselves: a stretch of features at a time, and in it each type's cells once."""
    n_cells, n_features = truth.shape
    groups = _groups(n_cells, types)
    profiled = [name for name, cells in groups.items() if name is not None and len(cells) >= MIN_CELLS]
    error = np.zeros(n_cells)  # sum of squared errors of each cell
    gap = np.zeros((n_cells, len(PROBABILITY_BINS) + 1))  # sum of probability - openness over the peaks of a bin
    sums = dict.fromkeys(profiled, 0.0)  # of each type: what `_correlation` and the RMSE need of its mean profiles
    for start in range(0, n_features, STRETCH):
        stretch = slice(start, start + STRETCH)
        columns, open_columns, profiles = right[:, stretch], truth[:, stretch], {}
        for name, cells in groups.items():
            weights = np.vstack([np.ones((1, len(cells)), np.float32), resamples.cells[:, cells]]) / len(cells)
            predicted = np.zeros((len(weights), columns.shape[1]), np.float32) if name in sums else None
            for first in range(0, len(cells), BLOCK):
                part = cells[first : first + BLOCK]
                values, measured = product(left[part], columns), open_columns[part].toarray()
                values = values if transform is None else transform(values)
                if predicted is not None:
                    predicted += weights[:, first : first + BLOCK] @ values
                if is_probability:
                    values = np.clip(values, 0, 1)
                    gap[part] += _gaps(values, measured)
                error[part] += np.square(values - measured).sum(1, dtype=np.float64)
            if predicted is not None:
                profiles[name] = predicted, np.asarray(open_columns[cells].T @ weights.T, dtype=np.float32).T
        if profiles:
            means = [np.mean([profile[side] for profile in profiles.values()], axis=0) for side in (0, 1)]
            for name, profile in profiles.items():
                sums[name] = sums[name] + _sums(*profile, *means)
    found = {}
    if is_probability:
        found["brier"] = _mean(error / n_features, resamples.cells)
        gaps = np.vstack([gap.sum(0), resamples.cells @ gap])  # [1 + N_RESAMPLES, bins]
        of_all = np.abs(gaps).sum(1) / n_cells / n_features
        found["calibration_error"] = float(of_all[0]), of_all[1:]
    elif not is_peaks:
        found["rna_mse"] = _mean(error / n_features, resamples.cells)
    if sums:
        rmse = np.sqrt(np.mean([found_sums[0] for found_sums in sums.values()], axis=0) / n_features)
        found["pseudobulk_rmse"] = float(rmse[0]), rmse[1:]
    if len(sums) > 1:
        correlation = np.nanmean([_correlation(found_sums, n_features) for found_sums in sums.values()], axis=0)
        found["pseudobulk_correlation"] = float(correlation[0]), correlation[1:]
    return found


def _gaps(values: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Return [cells, bins] the sum of values - measured over the features whose value lies in each bin."""
    n_bins = len(PROBABILITY_BINS) + 1
    bins = np.searchsorted(PROBABILITY_BINS, values, "right") + n_bins * np.arange(len(values))[:, None]
    return np.bincount(bins.ravel(), (values - measured).ravel(), n_bins * len(values)).reshape(len(values), n_bins)


def _groups(n_cells: int, types: np.ndarray | None) -> dict[str | None, np.ndarray]:
    """Return type → its cells; the key of cells without a type is None."""
    codes, names = pd.factorize(np.full(n_cells, None) if types is None else np.asarray(types, object), sort=True)
    groups = {str(name): np.flatnonzero(codes == i) for i, name in enumerate(names)}
    unknown = np.flatnonzero(codes < 0)
    return groups | ({None: unknown} if len(unknown) else {})


def _sums(a: np.ndarray, b: np.ndarray, mean_a: np.ndarray, mean_b: np.ndarray) -> np.ndarray:
    """Return sums over features [8, samples] of profiles a and b, from which RMSE and correlation follow.

    They are Σ(a-b)², and with x = a - mean_a and y = b - mean_b: Σx, Σy, Σx², Σy², Σxy, Σmean_a², Σmean_b².
    """
    dot = lambda x, y: np.einsum("ij,ij->i", x, y, dtype=np.float64)
    one = lambda x: x.sum(1, dtype=np.float64)
    x, y, d = a - mean_a, b - mean_b, a - b
    return np.array(
        [dot(d, d), one(x), one(y), dot(x, x), dot(y, y), dot(x, y), dot(mean_a, mean_a), dot(mean_b, mean_b)]
    )


def _correlation(sums: np.ndarray, n: int) -> np.ndarray:
    """Return the Pearson correlation [samples] over n features, from `_sums`; 0 where a profile is constant."""
    _, x, y, xx, yy, xy, mean_a, mean_b = sums
    norms = [np.sqrt(np.maximum(square - total**2 / n, 0)) for square, total in ((xx, x), (yy, y))]
    # Predictions that are the same for all types differ from their mean by rounding alone.
    is_constant = (norms[0] <= 1e-4 * np.sqrt(mean_a)) | (norms[1] <= 1e-4 * np.sqrt(mean_b))
    return np.where(is_constant, 0.0, (xy - x * y / n) / np.where(is_constant, 1, norms[0] * norms[1]))


def _mean(values: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean of the finite values [n] or [groups, n], and their weighted means in each sample."""
    values = np.atleast_2d(values)
    is_finite = np.isfinite(values)
    total, n = np.where(is_finite, values, 0).sum(0), is_finite.sum(0)
    if not n.any():
        return float("nan"), np.full(len(weights), np.nan)
    return float(total.sum() / n.sum()), (weights @ total) / np.maximum(weights @ n, 1e-12)
