"""Score predictions of one modality from the other.

A prediction [cells, features] can be too large for memory. It is given as two factors, left [cells, k] and right
[k, features], and only blocks of their product are computed.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, issparse
from scipy.special import expit

from models.scmomer import ATAC_JOINT_OPEN_WEIGHT
from utils.evaluate.metrics import MIN_OPEN, feature_auroc

FIT_CELLS, FIT_PEAKS, FIT_STEPS = 1024, 10_000, 25
"""Calibration is fitted on at most this many cells and peaks, drawn at random, and in at most this many steps."""


def product(left, right) -> np.ndarray:
    """Return left @ right as a dense float32 array."""
    product = left @ right
    return np.asarray(product.todense() if issparse(product) else product, dtype=np.float32)


def unweighted_probability(logits: np.ndarray) -> np.ndarray:
    """Return the probability that a peak is open, from the logits of the joint model's decoder.

    That decoder was trained with open peaks weighted w times, so its odds are w times too large.
    """
    return expit(logits - math.log(ATAC_JOINT_OPEN_WEIGHT))


@dataclass(frozen=True)
class PeakCalibration:
    """Turns the logits of the joint model's decoder into probabilities, by three numbers for all peaks.

    The logit of a probability is slope · (decoder's logit - log w) + offset + depth · log(1 + n), for open peaks that
    weighed w times in training and a cell with n detected features of the measured modality. In one cell all peaks
    share offset and depth, and the slope is above zero: so the order of a cell's peaks stays as it was.

    Attributes
    ----------
    slope, offset, depth : by default only the weight of open peaks is undone
    """

    slope: float = 1.0
    offset: float = 0.0
    depth: float = 0.0

    def __str__(self) -> str:
        return f"slope {self.slope:.3f}, offset {self.offset:.3f}, depth {self.depth:.3f}"

    def factors(self, left, right, n_detected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return left [cells, k + 1] and right [k + 1, peaks], whose product is the logit of the probability.

        Parameters
        ----------
        left, right : [cells, k] and [k, peaks]; their product is the decoder's logit
        n_detected : [cells] features of the measured modality that are detected in each cell
        """
        shift = self.offset - self.slope * math.log(ATAC_JOINT_OPEN_WEIGHT) + self.depth * np.log1p(n_detected)
        return (
            np.hstack([self.slope * left, shift[:, None]]).astype(np.float32),
            np.vstack([right, np.ones((1, right.shape[1]))]).astype(np.float32),
        )


def fit_peaks(left, right, n_detected: np.ndarray, truth: csr_matrix, seed: int = 0) -> PeakCalibration:
    """Fit the three numbers by logistic regression on cells that the decoder was not trained on.

    Parameters
    ----------
    left, right, n_detected : as in `PeakCalibration.factors`
    truth : [cells, peaks] 1 where open
    seed : of the draw of cells and peaks; at most `FIT_CELLS` and `FIT_PEAKS` are used

    Returns
    -------
    PeakCalibration; the default one if there are fewer than ten cells, or no peak is open
    """
    draw = np.random.default_rng(seed)
    cells = np.sort(draw.permutation(truth.shape[0])[:FIT_CELLS])
    peaks = np.sort(draw.permutation(truth.shape[1])[:FIT_PEAKS])
    is_open = truth[cells][:, peaks]
    if len(cells) < 10 or not 0 < is_open.nnz < is_open.shape[0] * is_open.shape[1]:
        return PeakCalibration()
    left, right = np.asarray(left)[cells], np.asarray(right)[:, peaks]
    depth = np.log1p(np.asarray(n_detected, dtype=np.float64)[cells])
    centre = depth.mean()  # a centred column converges in fewer steps
    weights = np.array([1.0, 0.0, 0.0])  # of the logit, of one, and of the centred depth
    for _ in range(FIT_STEPS):
        # A tiny penalty keeps the system solvable where all cells have the same depth.
        gradient, curvature = np.zeros(3), np.eye(3) * 1e-6
        for start in range(0, len(cells), 64):
            part = slice(start, start + 64)
            logit = product(left[part], right).astype(np.float64) - math.log(ATAC_JOINT_OPEN_WEIGHT)
            d = depth[part, None] - centre
            chance = expit(weights[0] * logit + weights[1] + weights[2] * d)
            error, spread = is_open[part].toarray() - chance, chance * (1 - chance)
            columns = (logit, np.ones_like(logit), np.broadcast_to(d, logit.shape))
            gradient += [float((error * column).sum()) for column in columns]
            curvature += [[float((spread * a * b).sum()) for b in columns] for a in columns]
        step = np.linalg.solve(curvature, gradient)
        weights += step / max(1.0, np.abs(step).max())  # no step is longer than 1, so that the fit cannot run away
        if np.abs(step).max() < 1e-6:
            break
    if not np.isfinite(weights).all() or weights[0] <= 0:  # the decoder ranks worse than chance: leave it as it is
        return PeakCalibration()
    return PeakCalibration(float(weights[0]), float(weights[1] - weights[2] * centre), float(weights[2]))


def auroc_within_depth(left, right, truth: csr_matrix, n_detected: np.ndarray, n_strata: int = 4) -> float:
    """Return the mean AUROC of peaks among cells of similar depth, which the depth of a cell alone cannot raise much.

    Parameters
    ----------
    left, right, truth : as in `pseudobulk_rmse`
    n_detected : [cells] features of the measured modality that are detected in each cell; cells are cut into
        `n_strata` groups of equal size by it, and each group is scored on its own

    Returns
    -------
    float, over groups and peaks that are open and closed in at least `MIN_OPEN` cells of the group; NaN if none is
    """
    found = []
    for cells in np.array_split(np.argsort(n_detected, kind="stable"), n_strata):
        mine = left[cells]
        scores = lambda start, stop, mine=mine: product(mine, right[:, start:stop])
        found.append(feature_auroc(truth[cells], scores, MIN_OPEN))
    found = np.concatenate(found)
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


def squared_error(left, right, truth: csr_matrix) -> float:
    """Return the squared error of left @ right, averaged over cells and features."""
    blocks = range(0, truth.shape[0], 1024)
    errors = [np.square(product(left[b : b + 1024], right) - truth[b : b + 1024].toarray()).sum() for b in blocks]
    return float(sum(errors) / truth.shape[0] / truth.shape[1])


def pseudobulk_rmse(left, right, truth: csr_matrix, types: np.ndarray, transform=None) -> float:
    """Return the root mean squared error of mean profiles per type, over features and types with at least ten cells.

    Parameters
    ----------
    left, right : [cells, k] and [k, features]; their product is the prediction
    truth : measured values [cells, features]
    types : cell types [cells], None where unknown
    transform : applied to the prediction, to bring it to the scale of `truth`; None if it is on that scale

    Returns
    -------
    float, NaN if no type has ten cells
    """
    names, sizes = np.unique(types[pd.notna(types)].astype(str), return_counts=True)
    errors = []
    for name in names[sizes >= 10]:
        mine = np.flatnonzero(types == name)
        total = np.zeros(truth.shape[1])
        for start in range(0, len(mine), 512):
            predicted = product(left[mine[start : start + 512]], right)
            total += (predicted if transform is None else transform(predicted)).sum(0, dtype=np.float64)
        errors.append(np.square(total / len(mine) - np.asarray(truth[mine].mean(0)).ravel()).mean())
    return float(np.sqrt(np.mean(errors))) if errors else float("nan")
