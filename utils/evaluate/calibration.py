"""Do the probabilities mean what they say? Temperature scaling and the expected calibration error."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

# Below so many cells a temperature would be noise.
MIN_CELLS = 10
ENOUGH_CELLS = 100
"""Validation cells from which confidence is called calibrated: the standard error of an accuracy is then below 5 %."""
ENOUGH_PER_TYPE = 5
"""The same for a single type: with fewer cells nothing is known about its own confidence."""
# Without bounds, a validation set without mistakes would drive the temperature to zero, and every probability to one.
TEMPERATURE_RANGE = (0.1, 10.0)


@dataclass(frozen=True)
class Calibration:
    """What a temperature was fitted on, and hence what the confidence is worth.

    Attributes
    ----------
    n_cells : labelled validation cells
    n_types : cell types of the model
    few : types with fewer than `ENOUGH_PER_TYPE` of these cells
    """

    n_cells: int
    n_types: int
    few: tuple[str, ...] = ()

    @classmethod
    def of(cls, labels: np.ndarray, classes: list[str]) -> "Calibration":
        """From the class numbers [cells] of the validation cells."""
        sizes = np.bincount(labels, minlength=len(classes))
        few = tuple(name for name, size in zip(classes, sizes, strict=True) if size < ENOUGH_PER_TYPE)
        return cls(len(labels), len(classes), few)

    @property
    def is_enough(self) -> bool:
        """Whether there were enough cells to call the confidence calibrated."""
        return self.n_cells >= ENOUGH_CELLS

    def __str__(self) -> str:
        if not self.is_enough:
            return (
                f"confidence is not calibrated: {self.n_cells:,} labelled validation cells are fewer than "
                f"{ENOUGH_CELLS}; use it to rank cells, not as a probability"
            )
        text = f"confidence is calibrated on {self.n_cells:,} validation cells"
        if not self.few:
            return text
        named = ", ".join(self.few[:5]) + (", …" if len(self.few) > 5 else "")
        return (
            f"{text}, but not for {len(self.few)} of {self.n_types} types, which have fewer than {ENOUGH_PER_TYPE} of "
            f"these cells: {named}"
        )


def fit_temperature(logits, labels) -> float:
    """Temperature T for which softmax(logits / T) fits the labels best (Guo et al., ICML 2017, section 4.2).

    One number for all classes: the ranking of classes, and so every prediction, stays as it is.

    Parameters
    ----------
    logits : array-like of float [cells, classes]
        Of held-out cells; training cells, which the model has learned, would give too low a temperature.
    labels : array-like of int [cells]
        Class indices, 0…classes-1.

    Returns
    -------
    float
        Between 0.1 and 10; greater than 1 where the model was over-confident. 1.0 for fewer than `MIN_CELLS` cells, and
        never below 1 for fewer than `ENOUGH_CELLS`: so few cells are no reason to trust the model more.

    Raises
    ------
    ValueError
        Shapes differ, a logit is not finite, or a label is no class index.
    """
    logits, labels = _checked(logits, labels)
    if len(labels) < MIN_CELLS:
        return 1.0
    at_label = logits[np.arange(len(labels)), labels]

    def negative_log_likelihood(log_temperature: float) -> float:
        scale = np.exp(-log_temperature)
        return float(np.mean(logsumexp(logits * scale, axis=1) - at_label * scale))

    # The log makes halving and doubling equal steps.
    found = minimize_scalar(negative_log_likelihood, bounds=np.log(TEMPERATURE_RANGE), method="bounded")
    temperature = float(np.exp(found.x))
    return temperature if len(labels) >= ENOUGH_CELLS else max(temperature, 1.0)


def expected_calibration_error(prob, labels, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy (Naeini et al., AAAI 2015; Guo et al., ICML 2017, equation 3).

    Cells are put into equal-width bins of their largest probability; the gaps are weighted by the cells in a bin.

    Parameters
    ----------
    prob : array-like of float [cells, classes]
        Rows sum to 1.
    labels : array-like of int [cells]
        Class indices, 0…classes-1.
    bins : int

    Returns
    -------
    float
        0 (calibrated) … 1.

    Raises
    ------
    ValueError
        No cells, shapes differ, a probability is not finite, or a label is no class index.
    """
    prob, labels = _checked(prob, labels)
    if len(labels) == 0:
        raise ValueError("no cells: the calibration error is not defined")
    confidence, correct = prob.max(axis=1), prob.argmax(axis=1) == labels
    # Bin b holds the confidences in (b / bins, (b + 1) / bins].
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(index, weights=correct - confidence, minlength=bins)  # [bins], Σ(correct) - Σ(confidence)
    return float(np.abs(gap).sum() / len(labels))


def _checked(values, labels) -> tuple[np.ndarray, np.ndarray]:
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
