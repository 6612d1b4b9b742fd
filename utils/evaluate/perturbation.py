"""Predicted changes of expression: splits of conditions, scores with intervals, and what needs no trained model.

A condition is a cell line and the genes that were perturbed in it. Changes are [conditions, genes]: the mean of a
condition's cells minus the mean of its line's control cells.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.ensemble import RandomForestRegressor

Conditions = list[tuple[str, tuple[str, ...]]]
MEASURES = {
    "pearson": "Pearson of the change",
    "pearson_20": "Pearson, 20 most changed genes",
    "mse_20": "squared error, 20 most changed genes",
    "pearson_perturbed": "Pearson against the mean perturbed profile",
    "rank": "rank of the right condition",
}
"""Score → what it is. All but the squared error are better when larger; a rank of 0.5 is chance, and 1 is perfect."""
N_TOP = 20
NO_CHANGE, MEAN, MEAN_SAME = "no change", "mean of training conditions", "mean of those with as many genes"
SUM, SAME, LINEAR = "sum of the singles", "same condition in the other lines", "linear, gene PCA × perturbation PCA"
NEIGHBOURS, FOREST = "nearest neighbours", "random forest"
N_NEIGHBOURS, PENALTIES, N_COMPONENTS = (1, 3, 5, 10), (0.1, 1.0, 10.0), (5, 10)
"""What is tried on the validation conditions; the linear model has both of the latter."""
N_TREES = 100


# Splits --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fold:
    """Conditions by number.

    Attributes
    ----------
    test : conditions to predict
    train : conditions that may be learned from
    inner : (train, validation) within `train`, for all choices
    """

    test: np.ndarray
    train: np.ndarray
    inner: list[tuple[np.ndarray, np.ndarray]]


def make_folds(split: str, conditions: Conditions, line: str, n_folds: int, rng: np.random.Generator) -> list[Fold]:
    """Split conditions so that each of them is tested once.

    Parameters
    ----------
    split : singles (a test gene is in no training condition), doubles (their singles may be) or lines (all conditions
        of a line are tested that were measured in another line too)
    line : the cell line of singles and doubles
    n_folds : most folds of singles and doubles

    Returns
    -------
    list of Fold; empty if there is too little to test and to validate
    """
    if split == "lines":
        groups = [np.flatnonzero([c[0] == name for c in conditions]) for name in sorted({c[0] for c in conditions})]
    else:
        n_genes = 1 if split == "singles" else 2
        of = np.flatnonzero([c[0] == line and len(c[1]) == n_genes for c in conditions])
        groups = [np.sort(part) for part in np.array_split(rng.permutation(of), min(n_folds, len(of))) if len(part)]
    if len(groups) < 3:  # one tests, one validates, one trains
        return []
    pool = np.flatnonzero([split == "lines" or c[0] == line for c in conditions])

    def rest(*held: np.ndarray) -> np.ndarray:
        """Conditions that share nothing with those held out that must not be known."""
        out = np.concatenate(held)
        lines, genes = {conditions[i][0] for i in out}, {gene for i in out for gene in conditions[i][1]}
        leaks = {
            "singles": lambda c: bool(genes & set(c[1])),
            "doubles": lambda c: False,
            "lines": lambda c: c[0] in lines,
        }[split]
        return np.array([i for i in np.setdiff1d(pool, out) if not leaks(conditions[i])], dtype=int)

    def seen(test: np.ndarray, train: np.ndarray) -> np.ndarray:
        """Of the lines' test conditions, those that were measured in a training line."""
        known = {conditions[i][1] for i in train}
        return test if split != "lines" else np.array([i for i in test if conditions[i][1] in known], dtype=int)

    folds = []
    for test in groups:
        train = rest(test)
        inner = [(rest(test, val), val) for val in groups if val is not test]
        inner = [(some, seen(val, some)) for some, val in inner]
        fold = Fold(seen(test, train), train, [(some, val) for some, val in inner if len(some) and len(val)])
        if len(fold.test) and fold.inner:
            folds.append(fold)
    return folds


def n_seen(condition: tuple[str, ...], conditions: Conditions, train: np.ndarray, line: str) -> int:
    """Number of a condition's genes whose single perturbation in a line is among the training conditions."""
    singles = {conditions[i][1][0] for i in train if len(conditions[i][1]) == 1 and conditions[i][0] == line}
    return sum(gene in singles for gene in condition)


# Scores --------------------------------------------------------------------------------------------------------------


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation of each row of two matrices; 0 where a row is constant."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(size > 1e-9, (a * b).sum(1) / np.maximum(size, 1e-9), 0.0)


def change_scores(
    predicted: np.ndarray, true: np.ndarray, centre: np.ndarray, groups: np.ndarray
) -> dict[str, np.ndarray]:
    """Score predicted changes, condition by condition.

    Parameters
    ----------
    predicted, true : [n, genes] changes
    centre : [n, genes] mean change of the training conditions, from which `pearson_perturbed` measures
    groups : [n] conditions with the same number compete for the rank: those of one fold and line, whose predictions
        come from the same training conditions

    Returns
    -------
    each of MEASURES → [n]
    """
    top = np.argsort(-np.abs(true), axis=1, kind="stable")[:, :N_TOP]
    few, few_true = np.take_along_axis(predicted, top, 1), np.take_along_axis(true, top, 1)
    rank = np.full(len(true), np.nan)
    for i in range(len(true)):
        others = np.flatnonzero((groups == groups[i]) & (np.arange(len(true)) != i))
        if len(others):
            own = np.square(predicted[i] - true[i]).sum()
            theirs = np.square(predicted[i] - true[others]).sum(1)
            rank[i] = np.mean((theirs > own) + 0.5 * (theirs == own))
    return {
        "pearson": correlations(predicted, true),
        "pearson_20": correlations(few, few_true),
        "mse_20": np.square(few - few_true).mean(1),
        "pearson_perturbed": correlations(predicted - centre, true - centre),
        "rank": rank,
    }


def interval(values: np.ndarray, seed: int = 0, repeats: int = 2000) -> tuple[float, float]:
    """95% interval of the mean over conditions, by drawing conditions with replacement; conditions without a score
    are left out."""
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(0, len(values), (repeats, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def summary(scores: dict[str, np.ndarray]) -> dict[str, float | tuple[float, float]]:
    """Mean and 95% interval of each score over the conditions."""
    row: dict = {}
    for name, values in scores.items():
        finite = values[np.isfinite(values)]
        row[name] = float(finite.mean()) if len(finite) else float("nan")
        row[f"{name}_95%"] = interval(values)
    return row


def compare(
    ours: str, scores: dict[str, dict[str, np.ndarray]], baselines: list[str], measure: str, some: np.ndarray
) -> dict:
    """Compare our row with the best of the baselines in one measure, on the same conditions.

    Parameters
    ----------
    some : [n] bool, the conditions to compare on

    Returns
    -------
    score, ours and theirs, baseline, difference (ours minus the baseline's) and its 95% interval, lower_is_better
    """
    lower_is_better = measure.startswith("mse")
    means = {name: float(np.nanmean(scores[name][measure][some])) for name in baselines}
    best = (min if lower_is_better else max)(means, key=means.get)
    paired = (scores[ours][measure] - scores[best][measure])[some]
    return {
        "score": measure,
        "ours": float(np.nanmean(scores[ours][measure][some])),
        "baseline": best,
        "theirs": means[best],
        "difference": float(np.nanmean(paired)),
        "difference_95%": interval(paired),
        "lower_is_better": lower_is_better,
    }


# Rows without a trained model ----------------------------------------------------------------------------------------


def baselines(
    split: str, fold: Fold, conditions: Conditions, change: np.ndarray, vectors: dict[str, np.ndarray], seed: int
) -> dict[str, np.ndarray]:
    """Predict a fold's test conditions without a trained model; settings are chosen on its validation conditions.

    Parameters
    ----------
    change : [conditions, genes]; those of test conditions are not read
    vectors : name → [conditions, width] sums of the perturbed genes' vectors

    Returns
    -------
    name → [test conditions, genes]
    """
    known = np.isin(np.arange(len(change)), fold.train)
    change = np.where(known[:, None], change, np.nan)  # a row that read a test condition would be NaN
    rows = {
        NO_CHANGE: np.zeros((len(fold.test), change.shape[1])),
        MEAN: np.repeat(change[fold.train].mean(0)[None], len(fold.test), 0),
        MEAN_SAME: np.stack([_mean_of_size(len(conditions[i][1]), fold.train, conditions, change) for i in fold.test]),
    }
    if split == "doubles":
        rows[SUM] = np.stack([sum_of_singles(conditions[i], fold.train, conditions, change) for i in fold.test])
    if split == "lines":
        same = [[j for j in fold.train if conditions[j][1] == conditions[i][1]] for i in fold.test]
        rows[SAME] = np.stack([change[j].mean(0) for j in same])
    for name, x in vectors.items():
        fits = {f"{NEIGHBOURS}, {name}": [(neighbours, {"k": k}) for k in N_NEIGHBOURS]}
        if not name.startswith("random"):
            grid = [{"penalty": p, "n_components": n} for p in PENALTIES for n in N_COMPONENTS]
            fits[LINEAR] = [(linear, settings) for settings in grid]
        for row, candidates in fits.items():
            fit, settings = _choose(candidates, fold, x, change)
            rows[row] = fit(x, change, fold.train, fold.test, **settings)
        rows[f"{FOREST}, {name}"] = forest(x, change, fold.train, fold.test, seed)
    return rows


def sum_of_singles(condition, train: np.ndarray, conditions: Conditions, change: np.ndarray) -> np.ndarray:
    """Sum of the measured changes of a condition's genes in its line; the mean of the singles for a gene without."""
    line, genes = condition
    singles = {conditions[i][1][0]: i for i in train if len(conditions[i][1]) == 1 and conditions[i][0] == line}
    mean = _mean_of_size(1, train, conditions, change)
    return np.sum([change[singles[gene]] if gene in singles else mean for gene in genes], axis=0)


def _mean_of_size(n_genes: int, train: np.ndarray, conditions: Conditions, change: np.ndarray) -> np.ndarray:
    """Mean change of the training conditions of so many genes, or of all if there are none."""
    of = [i for i in train if len(conditions[i][1]) == n_genes]
    return change[of if of else train].mean(0)


def neighbours(x: np.ndarray, change: np.ndarray, train: np.ndarray, test: np.ndarray, k: int) -> np.ndarray:
    """Mean change of the k training conditions whose vectors are nearest."""
    distance = np.square(x[test][:, None] - x[train][None]).sum(2)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return change[train[nearest]].mean(1)


def linear(
    x: np.ndarray, change: np.ndarray, train: np.ndarray, test: np.ndarray, penalty: float, n_components: int
) -> np.ndarray:
    """Change = G K P + mean: principal components of the changes, and of the perturbed genes' vectors, joined by ridge
    regression (Ahlmann-Eltze et al. 2025)."""
    mean, centre = change[train].mean(0), x[train].mean(0)
    genes = np.linalg.svd(change[train] - mean, full_matrices=False)[2][:n_components]
    axes = np.linalg.svd(x[train] - centre, full_matrices=False)[2][:n_components]
    p, p_test = (x[train] - centre) @ axes.T, (x[test] - centre) @ axes.T
    scale = np.maximum(np.sqrt(np.square(p).sum(1).mean()), 1e-9)
    p, p_test = p / scale, p_test / scale
    k = np.linalg.solve(p.T @ p + penalty * np.eye(p.shape[1]), p.T @ ((change[train] - mean) @ genes.T))
    return mean + p_test @ k @ genes


def forest(x: np.ndarray, change: np.ndarray, train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    """Random forest from vectors to changes."""
    model = RandomForestRegressor(N_TREES, max_features="sqrt", random_state=seed, n_jobs=1)
    return model.fit(x[train], change[train]).predict(x[test])


def _choose(candidates: list[tuple[Callable, dict]], fold: Fold, x: np.ndarray, change: np.ndarray):
    """Return the candidate with the best Pearson correlation on the validation conditions."""
    means = []
    for fit, settings in candidates:
        scores = [correlations(fit(x, change, some, val, **settings), change[val]) for some, val in fold.inner]
        means.append(np.concatenate(scores).mean())
    return candidates[int(np.argmax(means))]
