"""Predict from the vectors of two genes whether they interact, and score it with intervals over genes."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

PENALTIES = (1e-4, 1e-2, 1.0)
"""Inverse penalties of the logistic regression, tried on validation pairs."""
DECAYS = (1e-4, 1e-1)
"""Penalties on the weights of the network, tried on validation pairs."""
HIDDEN = (64,)
EPOCHS = 8
"""The network is scored on the validation pairs after each epoch, and the best epoch is kept."""


def pair_features(a: np.ndarray, b: np.ndarray, ordered: bool = False) -> np.ndarray:
    """Describe pairs by the vectors of their genes.

    Parameters
    ----------
    a, b : [n_pairs, width] vectors of the first and of the second genes
    ordered : if False, the features of (a, b) and (b, a) are the same

    Returns
    -------
    [n_pairs, 3 width] sum, absolute difference and product; with `ordered`, both vectors and their product
    """
    return np.hstack([a, b, a * b] if ordered else [a + b, np.abs(a - b), a * b])


def gene_log_odds(train, test, n_genes: int, ordered: bool = False) -> np.ndarray:
    """Score pairs by how often each of their genes is in a positive and in a negative training pair.

    It knows which gene is which and nothing else: it is good on genes of training pairs, and a constant on others.

    Parameters
    ----------
    train, test : pairs with a, b and y, genes as numbers below `n_genes`
    ordered : count the first and the second genes of pairs apart

    Returns
    -------
    [n_test] sum of the log-odds of both genes; a gene without a training pair has 0
    """

    def log_odds(genes: np.ndarray, y: np.ndarray) -> np.ndarray:
        positive, total = np.bincount(genes, weights=y, minlength=n_genes), np.bincount(genes, minlength=n_genes)
        return np.log((positive + 1) / (total - positive + 1))

    if ordered:
        return log_odds(train.a, train.y)[test.a] + log_odds(train.b, train.y)[test.b]
    both = log_odds(np.concatenate([train.a, train.b]), np.concatenate([train.y, train.y]))
    return both[test.a] + both[test.b]


def fit_heads(
    features: dict[str, np.ndarray], labels: dict[str, np.ndarray], seed: int = 0
) -> dict[str, tuple[float, np.ndarray]]:
    """Fit logistic regression and a small network on training pairs, and choose their settings on validation pairs.

    Parameters
    ----------
    features : train, val and test → [n_pairs, n_features]
    labels : train and val → [n_pairs], 0 or 1
    seed : seed of the network

    Returns
    -------
    dict
        "linear" and "network" → AUROC on the validation pairs, and [n_test] scores
    """
    scaler = StandardScaler().fit(features["train"])
    x = {side: scaler.transform(values).astype(np.float32) for side, values in features.items()}
    best = {"linear": (-1.0, np.empty(0)), "network": (-1.0, np.empty(0))}

    def consider(name: str, model) -> None:
        score = pair_scores(labels["val"], model.predict_proba(x["val"])[:, 1])[0]
        if score > best[name][0]:
            best[name] = score, model.predict_proba(x["test"])[:, 1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the choice on validation pairs bounds the harm
        for penalty in PENALTIES:
            consider("linear", LogisticRegression(C=penalty, max_iter=200).fit(x["train"], labels["train"]))
    for decay in DECAYS:
        network = MLPClassifier(HIDDEN, alpha=decay, random_state=seed)
        for _ in range(EPOCHS):
            network.partial_fit(x["train"], labels["train"], classes=[0, 1])
            consider("network", network)
    return best


def pair_scores(y: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """Return AUROC and average precision of scores for labels 0 and 1, with equal scores treated as a tie.

    Parameters
    ----------
    y, scores : [n_pairs]
    weights : [n_pairs] how often each pair counts, or None for once
    """
    return _ranked_scores(*_levels(y, scores), np.ones(len(y)) if weights is None else weights)


def _levels(y: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the labels as bool, the rank of each score from 0, and the number of different scores."""
    different, rank = np.unique(scores, return_inverse=True)
    return np.asarray(y) == 1, rank, len(different)


def _ranked_scores(positive: np.ndarray, rank: np.ndarray, n: int, weights: np.ndarray) -> tuple[float, float]:
    """AUROC and average precision from ranks, by counting each rank's positive and negative pairs."""
    hits = np.bincount(rank, weights=weights * positive, minlength=n)[::-1]  # the highest score first
    misses = np.bincount(rank, weights=weights * ~positive, minlength=n)[::-1]
    all_hits, all_misses = hits.sum(), misses.sum()
    if not all_hits or not all_misses:
        return np.nan, np.nan
    below = all_misses - np.cumsum(misses)  # negative pairs with a lower score
    found, drawn = np.cumsum(hits), np.cumsum(hits + misses)
    auroc = np.sum(hits * (below + misses / 2)) / (all_hits * all_misses)
    return float(auroc), float(np.sum(hits * found / np.maximum(drawn, 1e-12)) / all_hits)


def resampled_scores(pairs, scores: dict[str, np.ndarray], n: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
    """Return each method's scores in bootstrap samples of genes; all methods see the same samples.

    Pairs that share a gene are not independent, so genes are drawn rather than pairs: a pair counts as often as its
    first gene was drawn times as often as its second (Owen 2007, the pigeonhole bootstrap). The intervals are wider
    than those of a bootstrap over pairs.

    Parameters
    ----------
    pairs : test pairs with a, b and y, genes as numbers
    scores : method → [n_pairs]
    n : number of samples
    seed : seed of the samples

    Returns
    -------
    method → [n, 2] AUROC and average precision
    """
    rng = np.random.default_rng(seed)
    genes, ends = np.unique(np.concatenate([pairs.a, pairs.b]), return_inverse=True)
    first, second = ends.reshape(2, -1)
    levels = {name: _levels(pairs.y, values) for name, values in scores.items()}
    found = {name: np.empty((n, 2)) for name in scores}
    for sample in range(n):
        drawn = np.bincount(rng.integers(len(genes), size=len(genes)), minlength=len(genes)).astype(float)
        weights = drawn[first] * drawn[second]
        for name, level in levels.items():
            found[name][sample] = _ranked_scores(*level, weights)
    return found
