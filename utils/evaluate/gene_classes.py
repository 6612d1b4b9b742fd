"""Score features of genes by how well they tell classes of genes apart, in repeated stratified folds over genes."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from utils.evaluate.gene_features import random_vectors

LINEAR, FOREST = "logistic regression", "random forest"
CLASSIFIERS = (LINEAR, FOREST)
MEASURES = {"auroc": "AUROC", "auprc": "AUPRC", "macro_f1": "macro F1"}
"""Name of a score → how figures write it."""
WIDE = 0.6
"""If random vectors reach this AUROC within their interval, there are too few genes for a test."""
Features = np.ndarray | Callable[[int], np.ndarray]
"""[genes, k], or a function that gives such an array for each repeat."""


def make_classifier(name: str, seed: int):
    """Return an unfitted classifier with fixed settings; classes weigh the same, whatever their size."""
    if name == FOREST:
        return RandomForestClassifier(n_estimators=100, class_weight="balanced", random_state=seed)
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, class_weight="balanced"))


def score_probabilities(y: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """Score the predictions of one classifier.

    Parameters
    ----------
    y : [genes] class numbers; the first of two classes counts as the positive one
    probability : [genes, classes]

    Returns
    -------
    dict
        `auroc` and `auprc` (of more than two classes, the mean over each class against the others) and `macro_f1`
    """
    positives = range(probability.shape[1]) if probability.shape[1] > 2 else (0,)
    return {
        "auroc": float(np.mean([roc_auc_score(y == i, probability[:, i]) for i in positives])),
        "auprc": float(np.mean([average_precision_score(y == i, probability[:, i]) for i in positives])),
        "macro_f1": float(f1_score(y, probability.argmax(1), average="macro")),
    }


@threadpool_limits.wrap(limits=1)  # threads slow such small problems down
def repeated_folds(
    features: Features, y: np.ndarray, n_folds: int, n_repeats: int, seed: int, classifier: str
) -> dict[str, np.ndarray]:
    """Score a classifier on genes that it was not fitted on.

    Parameters
    ----------
    features : of the genes
    y : [genes] class numbers
    n_folds, n_repeats : each repeat shuffles the genes and cuts them into folds with equal shares of the classes
    seed : the same seed gives the same folds, so scores of different features may be compared repeat by repeat
    classifier : one of CLASSIFIERS

    Returns
    -------
    measure → [n_repeats], the mean over the folds of each repeat
    """
    scores = {measure: np.zeros(n_repeats) for measure in MEASURES}
    for repeat in range(n_repeats):
        x = features(repeat) if callable(features) else features
        folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed * 1_000 + repeat)
        for train, test in folds.split(x, y):
            probability = make_classifier(classifier, seed).fit(x[train], y[train]).predict_proba(x[test])
            for measure, value in score_probabilities(y[test], probability).items():
                scores[measure][repeat] += value / n_folds
    return scores


def summary(scores: dict[str, np.ndarray]) -> dict[str, float | tuple[float, float]]:
    """Return mean and 95% interval over repeats of each measure: `auroc` and `auroc_95%` …"""
    out = {}
    for measure, values in scores.items():
        out[measure] = float(values.mean())
        out[f"{measure}_95%"] = tuple(np.quantile(values, (0.025, 0.975)).tolist())
    return out


def random_interval(y: np.ndarray, width: int, n_folds: int, seed: int, n_draws: int = 20) -> tuple[float, float]:
    """Return the interval in which the AUROC of 95% of random embeddings lies (mean ± 1.96 standard deviations).

    It measures what so many genes can show at all: an AUROC within it is chance.

    Parameters
    ----------
    y : [genes] class numbers
    width : length of the random vectors
    n_folds, seed : as in `repeated_folds`, with logistic regression
    n_draws : number of random embeddings, each with its own folds
    """
    draw = lambda repeat: random_vectors(len(y), width, seed * 1_000 + repeat)
    values = repeated_folds(draw, y, n_folds, n_draws, seed, LINEAR)["auroc"]
    margin = 1.96 * values.std(ddof=1)
    return float(values.mean() - margin), float(values.mean() + margin)


def difference(ours: str, aurocs: dict[str, np.ndarray]) -> dict:
    """Compare an embedding with the best of all others, over the same repeats.

    Parameters
    ----------
    ours : name of the embedding
    aurocs : name → AUROC in each repeat, also of ours

    Returns
    -------
    dict
        ours and theirs (mean AUROCs), baseline (name of the best other), difference and difference_95%
    """
    rivals = {name: values for name, values in aurocs.items() if name != ours}
    best = max(rivals, key=lambda name: rivals[name].mean())
    gain = aurocs[ours] - rivals[best]
    return {
        "ours": float(aurocs[ours].mean()),
        "baseline": best,
        "theirs": float(rivals[best].mean()),
        "difference": float(gain.mean()),
        "difference_95%": tuple(np.quantile(gain, (0.025, 0.975)).tolist()),
    }


def compare(ours: str, found: dict, chance: float) -> str:
    """Say in words whether an embedding beats the best of all others, by the difference over the same repeats.

    Parameters
    ----------
    ours : name of the embedding
    found : as `difference` returns it
    chance : AUROC that random vectors may reach; if neither is above it, neither wins
    """
    best, mean, best_mean, (low, high) = (found[key] for key in ("baseline", "ours", "theirs", "difference_95%"))
    wins = f"{ours} wins" if low > 0 else f"{best} wins" if high < 0 else "neither wins"
    if max(mean, best_mean) <= chance:
        wins = "neither is above chance"
    return (
        f"{wins}: AUROC {mean:.3f} of {ours}, {best_mean:.3f} of {best} (best of the others), difference {low:+.3f} to "
        f"{high:+.3f}"
    )


def rank_genes(x: np.ndarray, y: np.ndarray, x_new: np.ndarray, names: list[str], seed: int) -> pd.DataFrame:
    """Predict the class of genes that are in no list.

    Parameters
    ----------
    x, y : [genes, k] and [genes], listed genes and their class numbers
    x_new : [new genes, k]
    names : the classes
    seed : of the forest

    Returns
    -------
    DataFrame [new genes], with the probability of each class (of the first one, if there are two) by each classifier,
    and last the mean of the first class's probabilities
    """
    columns = {}
    for classifier in CLASSIFIERS:
        probability = make_classifier(classifier, seed).fit(x, y).predict_proba(x_new)
        for i, name in enumerate(names if len(names) > 2 else names[:1]):
            columns[f"{name}, {classifier}"] = probability[:, i]
    columns[f"{names[0]}, mean"] = np.mean([columns[f"{names[0]}, {classifier}"] for classifier in CLASSIFIERS], axis=0)
    return pd.DataFrame(columns)
