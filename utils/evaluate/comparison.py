"""A method beside a baseline: the interval of bootstrap values, and the comparison as a sentence."""

import numpy as np


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """Return the 95% percentile interval of bootstrap values that could be computed; NaN if none could."""
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def in_words(ours: str, row: dict, score: str, is_best: bool = True) -> str:
    """Return a comparison as a sentence.

    Parameters
    ----------
    ours : name of the method
    row : ours, theirs, baseline, difference, difference_95%, and lower_is_better if the score is an error
    score : name of the score in words
    is_best : whether the baseline is the best of several
    """
    low, high = row["difference_95%"]
    better, worse = (-high, -low) if row.get("lower_is_better") else (low, high)
    how = "wins against" if better > 0 else "loses against" if worse < 0 else "cannot be told apart from"
    return (
        f"{ours} {how} {'the best baseline, ' if is_best else ''}{row['baseline']}: {score} {_number(row['ours'])} "
        f"against {_number(row['theirs'])}, difference {_change(row['difference'])} (95% from {_change(low)} to "
        f"{_change(high)})"
    )


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.4g}"


def _change(value: float) -> str:
    return f"{value:+.3f}" if abs(value) >= 0.001 else f"{value:+.2g}"
