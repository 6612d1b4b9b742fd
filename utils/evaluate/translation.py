"""Turn predictions of one modality from the other into calibrated values.

A prediction [cells, features] can be too large for memory. It is given as two factors, left [cells, k] and right
[k, features], and only blocks of their product are computed.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.sparse import csr_matrix, issparse
from scipy.special import expit

from models.scmomer import ATAC_JOINT_OPEN_WEIGHT

FIT_CELLS, FIT_PEAKS, FIT_STEPS = 1024, 10_000, 25
"""Calibration is fitted on at most this many cells and peaks, drawn at random, and in at most this many steps."""
PSEUDO_CELLS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, math.inf)
"""Strengths of shrinkage of the peaks' offsets to try; the last leaves them out."""


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
    """Turns the logits of the joint model's decoder into probabilities.

    The logit of a probability is slope · (decoder's logit - log w) + offset + depth · log(1 + n) + peaks[p], for open
    peaks that weighed w times in training, a cell with n detected features of the measured modality, and peak p. The
    slope is above zero. The peaks' own offsets leave the order of the cells of a peak as it was, the other numbers the
    order of the peaks of a cell.

    Attributes
    ----------
    slope, offset, depth : by default only the weight of open peaks is undone
    peaks : [peaks] offset of each peak, or None without them
    pseudo_cells : how strongly these offsets are shrunk towards 0
    """

    slope: float = 1.0
    offset: float = 0.0
    depth: float = 0.0
    peaks: np.ndarray | None = field(default=None, compare=False, repr=False)
    pseudo_cells: float = math.inf

    def __str__(self) -> str:
        peaks = "" if self.peaks is None else f", an offset per peak shrunk by {self.pseudo_cells:g} cells"
        return f"slope {self.slope:.3f}, offset {self.offset:.3f}, depth {self.depth:.3f}{peaks}"

    @property
    def fitted(self) -> dict[str, float | np.ndarray]:
        """The numbers of which the calibration consists, by name."""
        numbers = {"slope": self.slope, "offset": self.offset, "depth": self.depth}
        return numbers if self.peaks is None else numbers | {"peaks": self.peaks, "pseudo_cells": self.pseudo_cells}

    def factors(self, left, right, n_detected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return left [cells, k + 2] and right [k + 2, peaks], whose product is the logit of the probability.

        Parameters
        ----------
        left, right : [cells, k] and [k, peaks]; their product is the decoder's logit
        n_detected : [cells] features of the measured modality that are detected in each cell
        """
        shift = self.offset - self.slope * math.log(ATAC_JOINT_OPEN_WEIGHT) + self.depth * np.log1p(n_detected)
        one, own = np.ones(len(left)), np.zeros(right.shape[1]) if self.peaks is None else self.peaks
        return (
            np.column_stack([self.slope * left, shift, one]).astype(np.float32),
            np.vstack([right, np.ones(right.shape[1]), own]).astype(np.float32),
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


def offset_per_peak(
    calibration: PeakCalibration, left, right, n_detected: np.ndarray, truth: csr_matrix, strengths=PSEUDO_CELLS
) -> list[PeakCalibration]:
    """Return a calibration with an offset per peak for each strength of shrinkage.

    The offset is the difference of the logits of the observed and the predicted share of cells in which the peak is
    open, after a number of pseudo-cells that behave as predicted has been added to both.

    Parameters
    ----------
    calibration : one without offsets of peaks
    left, right, n_detected, truth : as in `fit_peaks`, but of training cells: a few hundred validation cells hold two
        or three open counts of a typical peak
    strengths : how many cells in which a peak is expected to be open are added
    """
    expected = np.zeros(truth.shape[1])
    factors = calibration.factors(left, right, n_detected)
    for start in range(0, len(left), 256):
        expected += expit(product(factors[0][start : start + 256], factors[1])).sum(0, dtype=np.float64)
    n, n_open = len(left), np.asarray(truth.sum(0), dtype=np.float64).ravel()
    found = []
    for strength in strengths:
        if math.isinf(strength):
            found.append(calibration)
            continue
        closed = strength * (n - expected) / np.maximum(expected, 1e-9)  # as many closed ones as predicted
        peaks = np.log((n_open + strength) / (expected + strength))
        peaks -= np.log((n - n_open + closed) / (n - expected + closed))
        found.append(replace(calibration, peaks=peaks.astype(np.float32), pseudo_cells=strength))
    return found


def log_loss(calibration: PeakCalibration, left, right, n_detected: np.ndarray, truth: csr_matrix) -> float:
    """Return the mean negative log-likelihood of a cell's open and closed peaks; parameters as in `fit_peaks`."""
    factors, total = calibration.factors(left, right, n_detected), 0.0
    for start in range(0, len(left), 256):
        rows = slice(start, start + 256)
        logit = product(factors[0][rows], factors[1])
        total += np.logaddexp(0, logit).sum(dtype=np.float64) - truth[rows].multiply(logit).sum(dtype=np.float64)
    return float(total / max(len(left), 1))


def calibrate_peaks(val: tuple, train: tuple | None, seed: int = 0) -> PeakCalibration:
    """Fit the three numbers on validation cells, and offsets of peaks on training cells if they help.

    Whether there are offsets, and how strongly they are shrunk, is chosen by the log loss of validation cells: the
    three numbers are fitted on one half of them, and the loss is that of the other half. Offsets correct what the
    decoder has got wrong about a peak in all cells, so they hold for other batches as far as peaks are as open there.

    Parameters
    ----------
    val, train : left, right, n_detected and truth of cells, as in `fit_peaks`; without training cells there are no
        offsets
    seed : of the draw of halves, and of cells and peaks
    """
    chosen = fit_peaks(*val, seed)
    halves = np.array_split(np.random.default_rng(seed).permutation(len(val[0])), 2)
    if train is None or not len(train[0]) or chosen == PeakCalibration() or min(map(len, halves)) < 10:
        return chosen
    part = lambda cells: (val[0][cells], val[1], val[2][cells], val[3][cells])
    losses = np.zeros(len(PSEUDO_CELLS))
    for fitted_on, compared_on in (halves, halves[::-1]):
        candidates = offset_per_peak(fit_peaks(*part(fitted_on), seed), *train)
        losses += [log_loss(candidate, *part(compared_on)) for candidate in candidates]
    (best,) = offset_per_peak(chosen, *train, [PSEUDO_CELLS[int(losses.argmin())]])
    return best
