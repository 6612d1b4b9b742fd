"""Do the probabilities mean what they say? Temperature scaling and the expected calibration error."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

# Below so many cells a temperature would be noise.
MIN_CELLS = 10
# Without bounds, a validation set without mistakes would drive the temperature to zero, and every probability to one.
TEMPERATURE_RANGE = (0.1, 10.0)


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
        Between 0.1 and 10; greater than 1 where the model was over-confident. 1.0 for fewer than 10 cells.

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
    return float(np.exp(found.x))


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
