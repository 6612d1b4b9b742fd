"""A method beside a baseline: the interval of bootstrap values, and the comparison as a sentence."""

import numpy as np

from utils.evaluate.metrics import scores_of_counts


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """Return the 95% percentile interval of bootstrap values that could be computed; NaN if none could."""
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def compare_types(true, predicted: dict, ours: str, baselines: list[str], n: int = 1000, seed: int = 0) -> list[dict]:
    """Compare the accuracy and the macro-F1 of one method with those of the best baseline.

    Both methods are scored on the same resampled cells, drawn with replacement within each true type. The best baseline
    is the best on these very cells, which favours it.

    Parameters
    ----------
    true : [cells] labels
    predicted : method → labels [cells]
    ours, baselines : names of methods
    n, seed : number of resamples, and their seed

    Returns
    -------
    list of a dict for each score: score, ours, baseline (the best one), theirs, difference and its 95% interval
    """
    rows = [np.asarray(values).astype(str) for values in (true, *(predicted[name] for name in (ours, *baselines)))]
    classes, codes = np.unique(np.stack(rows), return_inverse=True)
    codes, k = codes.reshape(len(rows), -1), len(classes)
    counts = lambda of, weights=None: np.bincount(codes[0] * k + codes[of], weights, minlength=k * k).reshape(k, k)
    scores = [scores_of_counts(counts(of)) for of in range(1, len(rows))]
    found = []
    for name in ("accuracy", "macro_f1"):
        best = 1 + max(range(len(baselines)), key=lambda i: scores[1 + i][name])
        draw, differences = np.random.default_rng(seed), np.empty(n)
        members = [np.flatnonzero(codes[0] == code) for code in np.unique(codes[0])]
        for i in range(n):
            drawn = np.concatenate([draw.choice(cells, len(cells)) for cells in members])
            weights = np.bincount(drawn, minlength=codes.shape[1])
            values = [scores_of_counts(counts(of, weights))[name] for of in (1, 1 + best)]
            differences[i] = values[0] - values[1]
        theirs = float(scores[best][name])
        row = {"score": name, "ours": float(scores[0][name]), "baseline": baselines[best - 1], "theirs": theirs}
        found.append(row | {"difference": row["ours"] - theirs, "difference_95%": percentiles(differences)})
    return found


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
    how = "wins against" if better > 0 else "loses against" if worse < 0 else "does not differ clearly from"
    return (
        f"{ours} {how} {'the best baseline, ' if is_best else ''}{row['baseline']}: {score} {_number(row['ours'])} "
        f"against {_number(row['theirs'])}, difference {_change(row['difference'])} (95% from {_change(low)} to "
        f"{_change(high)})"
    )


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.4g}"


def _change(value: float) -> str:
    return f"{value:+.3f}" if abs(value) >= 0.001 else f"{value:+.2g}"
