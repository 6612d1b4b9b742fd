"""Calibrate predicted probabilities by temperature scaling, and measure their calibration error.

Probabilities are calibrated if, for example, of all cells labelled with a confidence of 0.8, 80 % are labelled right.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from scipy.stats import rankdata

MIN_CELLS = 10
"""With fewer validation cells no temperature is fitted: it would be noise."""
ENOUGH_CELLS = 100
"""With at least this many validation cells, confidence counts as calibrated: the standard error of an accuracy is then
at most 5 percentage points."""
ENOUGH_PER_TYPE = 5
"""With fewer validation cells of a type, nothing is known about the confidence for that type."""
TEMPERATURE_RANGE = (0.1, 10.0)
"""Limits of the temperature. Without them, validation cells without a mistake would drive it to 0, and all
probabilities to 0 or 1."""


@dataclass(frozen=True)
class Calibration:
    """The validation cells on which a temperature was fitted; they decide how far the confidence can be trusted.

    Attributes
    ----------
    n_cells : number of labelled validation cells
    n_types : number of cell types of the model
    few : names of the types with fewer than `ENOUGH_PER_TYPE` of these cells
    across : column of obs, if the cells are of batches in it that were left out; empty for cells of the same batches
    """

    n_cells: int
    n_types: int
    few: tuple[str, ...] = ()
    across: str = ""

    @classmethod
    def of(cls, labels: np.ndarray, classes: list[str], across: str = "") -> "Calibration":
        """Make a Calibration from the class numbers of the validation cells [cells] and the names of the classes."""
        sizes = np.bincount(labels, minlength=len(classes))
        few = tuple(name for name, size in zip(classes, sizes, strict=True) if size < ENOUGH_PER_TYPE)
        return cls(len(labels), len(classes), few, across)

    @property
    def is_enough(self) -> bool:
        """Whether there were enough cells to call the confidence calibrated."""
        return self.n_cells >= ENOUGH_CELLS

    def __str__(self) -> str:
        kind = f"cells of batches left out (by {self.across})" if self.across else "validation cells"
        if not self.is_enough:
            return (
                f"confidence is not calibrated: {self.n_cells:,} labelled {kind} are fewer than "
                f"{ENOUGH_CELLS}; use it to rank cells, not as a probability"
            )
        text = f"confidence is calibrated on {self.n_cells:,} {kind}"
        if not self.few:
            return text
        named = ", ".join(self.few[:5]) + (", …" if len(self.few) > 5 else "")
        return (
            f"{text}, but not for {len(self.few)} of {self.n_types} types, which have fewer than {ENOUGH_PER_TYPE} of "
            f"these cells: {named}"
        )


def fit_temperature(logits, labels, offset=0.0) -> float:
    """Return the temperature T for which softmax(logits / T + offset) fits the labels best.

    Temperature scaling is described by Guo et al., ICML 2017, section 4.2. One temperature serves all classes, so the
    order of the classes does not change, and neither does any prediction.

    Parameters
    ----------
    logits : array-like of float [cells, classes]
        Logits of held-out cells; on training cells, the model is too confident and the temperature would be too low.
    labels : array-like of int [cells]
        Class indices, 0…classes-1.
    offset : array-like of float [classes]
        Logarithms of factors of the probabilities, such as a correction for the shares of the classes.

    Returns
    -------
    float
        Between 0.1 and 10; greater than 1 if the model was over-confident. With fewer than `MIN_CELLS` cells it is 1;
        with fewer than `ENOUGH_CELLS` it is at least 1, since so few cells cannot justify more confidence.

    Raises
    ------
    ValueError
        Shapes do not match, a logit is not finite, or a label is not a class index.
    """
    logits, labels = _checked(logits, labels)
    if len(labels) < MIN_CELLS:
        return 1.0
    offset = np.broadcast_to(np.asarray(offset, dtype=np.float64), logits.shape[1])
    at_label = logits[np.arange(len(labels)), labels]

    def negative_log_likelihood(log_temperature: float) -> float:
        scale = np.exp(-log_temperature)
        return float(np.mean(logsumexp(logits * scale + offset, axis=1) - at_label * scale - offset[labels]))

    # In the logarithm, halving and doubling the temperature are steps of equal size.
    best = minimize_scalar(negative_log_likelihood, bounds=np.log(TEMPERATURE_RANGE), method="bounded")
    temperature = float(np.exp(best.x))
    return temperature if len(labels) >= ENOUGH_CELLS else max(temperature, 1.0)


def share_ratios(train: np.ndarray, val: np.ndarray, n_classes: int) -> np.ndarray:
    """Return how much more frequent each class is among validation cells than among labelled training cells.

    A classifier that was trained where classes have other shares is corrected by Bayes' rule: its probabilities are
    multiplied by these ratios (Saerens et al. 2002). With so many labels of each type all shares are equal, which
    those of the cells at large are not.

    Parameters
    ----------
    train, val : class numbers [cells] of labelled cells
    n_classes : number of classes

    Returns
    -------
    [n_classes] ratios. As many cells as there are classes are added to the validation cells, with the shares of the
    training cells: so a few validation cells change little, and none change nothing
    """
    prior = np.maximum(np.bincount(train, minlength=n_classes), 1) / max(len(train), 1)
    return (np.bincount(val, minlength=n_classes) / prior + n_classes) / (len(val) + n_classes)


def with_shares(probability: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """Return probabilities [cells, classes] corrected by the ratios [classes] of `share_ratios`."""
    corrected = probability * ratios
    return corrected / np.maximum(corrected.sum(1, keepdims=True), np.finfo(float).tiny)


def expected_calibration_error(prob, labels, bins: int = 10) -> float:
    """Return the mean gap between confidence and accuracy (Naeini et al., AAAI 2015; Guo et al., ICML 2017, eq. 3).

    Cells are grouped by their largest probability into bins of equal width. The gap of a bin is weighted by its cells.

    Parameters
    ----------
    prob : array-like of float [cells, classes]
        Rows sum to 1.
    labels : array-like of int [cells]
        Class indices, 0…classes-1.
    bins : int
        Number of bins.

    Returns
    -------
    float
        From 0 (calibrated) to 1.

    Raises
    ------
    ValueError
        There are no cells, shapes do not match, a probability is not finite, or a label is not a class index.
    """
    prob, labels = _checked(prob, labels)
    if len(labels) == 0:
        raise ValueError("no cells: the calibration error is not defined")
    confidence, correct = prob.max(axis=1), prob.argmax(axis=1) == labels
    # Bin b holds the confidences in (b / bins, (b + 1) / bins].
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(index, weights=correct - confidence, minlength=bins)  # [bins], Σ(correct) - Σ(confidence)
    return float(np.abs(gap).sum() / len(labels))


def error_auroc(wrong, doubt) -> float:
    """Return the AUROC of a doubt for errors: how often a wrong cell has more of it than a right one; ties are half.

    Parameters
    ----------
    wrong : array-like of bool [cells]
    doubt : array-like of float [cells]

    Returns
    -------
    float
        0.5 for a doubt that knows nothing; NaN if all cells are wrong, or none.
    """
    wrong, ranks = np.asarray(wrong, dtype=bool), rankdata(np.asarray(doubt, dtype=np.float64))
    n, others = int(wrong.sum()), int((~wrong).sum())
    return float((ranks[wrong].sum() - n * (n + 1) / 2) / (n * others)) if n and others else math.nan


def _checked(values, labels) -> tuple[np.ndarray, np.ndarray]:
    """Return values [cells, classes] and class indices [cells] as arrays, after checking them."""
    values, labels = np.asarray(values, dtype=np.float64), np.asarray(labels)
    if values.ndim != 2 or labels.shape != values.shape[:1]:
        raise ValueError(f"values {values.shape} and labels {labels.shape} do not match: want [n, classes] and [n]")
    if not np.isfinite(values).all():
        raise ValueError("a logit or probability is not finite")
    if len(labels) and (
        not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= values.shape[1]
    ):
        raise ValueError(f"labels must be class indices 0…{values.shape[1] - 1}")
    return values, labels.astype(np.int64)
