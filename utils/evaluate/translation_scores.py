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
    """Scores of the predicted values themselves, in one pass over the cells."""
    n_cells, n_features = truth.shape
    n_bins = len(PROBABILITY_BINS) + 1
    error = np.zeros(n_cells)  # squared error of each cell
    gap = np.zeros((n_cells, n_bins))  # sum of probability - openness over the peaks of a bin
    profiles = []  # of each type [1 + N_RESAMPLES, features]: predicted and measured
    for name, cells in _groups(n_cells, types).items():
        is_profile = name is not None and len(cells) >= MIN_CELLS
        weights = np.vstack([np.ones((1, len(cells)), np.float32), resamples.cells[:, cells]]) / len(cells)
        predicted = np.zeros((len(weights), n_features), np.float32) if is_profile else None
        for start in range(0, len(cells), BLOCK):
            part = cells[start : start + BLOCK]
            values, measured = product(left[part], right), truth[part].toarray()
            values = values if transform is None else transform(values)
            if is_profile:
                predicted += weights[:, start : start + BLOCK] @ values
            if is_probability:
                values = np.clip(values, 0, 1)
                bins = np.searchsorted(PROBABILITY_BINS, values, "right") + n_bins * np.arange(len(part))[:, None]
                sums = np.bincount(bins.ravel(), (values - measured).ravel(), n_bins * len(part))
                gap[part] = sums.reshape(len(part), n_bins)
            error[part] = np.square(values - measured).mean(1, dtype=np.float64)
        if is_profile:
            profiles.append((predicted, np.asarray(truth[cells].T @ weights.T, dtype=np.float32).T))
    found = {}
    if is_probability:
        found["brier"] = _mean(error, resamples.cells)
        gaps = np.vstack([gap.sum(0), resamples.cells @ gap])  # [1 + N_RESAMPLES, bins]
        of_all = np.abs(gaps).sum(1) / n_cells / n_features
        found["calibration_error"] = float(of_all[0]), of_all[1:]
    elif not is_peaks:
        found["rna_mse"] = _mean(error, resamples.cells)
    if profiles:
        squares = [np.square(a - b).mean(1, dtype=np.float64) for a, b in profiles]
        rmse = np.sqrt(np.mean(squares, axis=0))
        found["pseudobulk_rmse"] = float(rmse[0]), rmse[1:]
    if len(profiles) > 1:
        means = [np.mean([profile[side] for profile in profiles], axis=0) for side in (0, 1)]
        correlation = np.nanmean([_correlation(a, b, *means) for a, b in profiles], axis=0)
        found["pseudobulk_correlation"] = float(correlation[0]), correlation[1:]
    return found


def _groups(n_cells: int, types: np.ndarray | None) -> dict[str | None, np.ndarray]:
    """Return type → its cells; the key of cells without a type is None."""
    codes, names = pd.factorize(np.full(n_cells, None) if types is None else np.asarray(types, object), sort=True)
    groups = {str(name): np.flatnonzero(codes == i) for i, name in enumerate(names)}
    unknown = np.flatnonzero(codes < 0)
    return groups | ({None: unknown} if len(unknown) else {})


def _correlation(a: np.ndarray, b: np.ndarray, mean_a: np.ndarray, mean_b: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of each row of a - mean_a with that of b - mean_b; 0 where one is constant."""
    dot = lambda x, y: np.einsum("ij,ij->i", x, y, dtype=np.float64)
    # Predictions that are the same for all types differ from their mean by rounding alone.
    least = [1e-4 * np.sqrt(dot(mean, mean)) for mean in (mean_a, mean_b)]
    a, b = (x - x.mean(1, keepdims=True) for x in (a - mean_a, b - mean_b))
    norms = [np.sqrt(dot(x, x)) for x in (a, b)]
    is_constant = (norms[0] <= least[0]) | (norms[1] <= least[1])
    return np.where(is_constant, 0.0, dot(a, b) / np.where(is_constant, 1, norms[0] * norms[1]))


def _mean(values: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean of the finite values [n] or [groups, n], and their weighted means in each sample."""
    values = np.atleast_2d(values)
    is_finite = np.isfinite(values)
    total, n = np.where(is_finite, values, 0).sum(0), is_finite.sum(0)
    if not n.any():
        return float("nan"), np.full(len(weights), np.nan)
    return float(total.sum() / n.sum()), (weights @ total) / np.maximum(weights @ n, 1e-12)
