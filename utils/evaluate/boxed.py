"""Boxed baselines: three simple classifiers that travel in a model folder, as a second opinion on each cell.

Logistic regression with balanced types, the same on principal components, and a neural network with one hidden layer
(MLP). All read the model's own values, from at most `MOST_FEATURES` features. Weights are kept in half precision: three
classifiers of 2,000 genes and 20 types take 0.4 MB.
"""

import warnings
from collections.abc import Iterator

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import softmax
from threadpoolctl import threadpool_limits

from utils.evaluate.metrics import classification_scores

REGRESSION, COMPONENTS, MLP = NAMES = ("logistic regression", "PCA + logistic regression", "MLP")
CORRELATION = "correlation with type means"
"""What older folders have in place of `COMPONENTS`; it is no probability, and takes no part in a mixture."""
LINEAR = (REGRESSION, COMPONENTS, CORRELATION)
MOST_CELLS = 10_000
"""Training cells that the baselines are fitted on, so that fitting takes a minute at most."""
MOST_FEATURES = 4000
"""The features with the largest variance are read; more would make the folder large, and change little."""
PENALTIES = (0.1, 1.0, 10.0)
"""Inverse strengths of the L2 penalty of logistic regression to choose from, by validation cells."""
N_COMPONENTS = 50
"""Principal components, or fewer where there are fewer cells; validation cells choose whether they are whitened."""
HIDDEN, DECAY, STEPS, MINIBATCH = 64, 1.0, 1500, 128
"""Of the MLP: hidden units, weight decay, and about how many optimiser steps on how many cells."""
BLOCK = 4096


def fit_boxed(x, labels: np.ndarray, x_val, labels_val: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Fit the boxed baselines.

    Parameters
    ----------
    x, labels : model values [cells, features], sparse or read from disk by rows, and class numbers [cells]
    x_val, labels_val : the same of validation cells, which choose a penalty; there may be none
    seed : of the draw of cells and of the MLP

    Returns
    -------
    Arrays for :func:`boxed_types`, by name; none with fewer than two classes
    """
    from sklearn.exceptions import ConvergenceWarning  # late: reading a folder does not wait for scikit-learn
    from sklearn.neural_network import MLPClassifier

    labels = np.asarray(labels)
    if len(np.unique(labels)) < 2:
        return {}
    rows = even_rows(labels, MOST_CELLS, seed)
    x, labels = csr_matrix(x[rows]), labels[rows]
    mean = np.asarray(x.mean(0)).ravel()
    variance = np.asarray(x.multiply(x).mean(0)).ravel() - mean**2
    features = np.sort(np.argsort(-variance, kind="stable")[:MOST_FEATURES]).astype(np.int32)
    x, classes = x[:, features], np.unique(labels)
    scale = np.maximum(x.max(0).toarray().ravel(), 1e-6)
    largest = scale.max()  # of all features: dividing each by its own would let the MLP follow rare ones, and overfit
    scaled = csr_matrix(x.multiply(1 / scale), dtype=np.float64)
    val = even_rows(labels_val, MOST_CELLS, seed)
    x_val, labels_val = csr_matrix(x_val[val])[:, features], labels_val[val]
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        _, linear = _logistic_regression(scaled, labels, x_val.multiply(1 / scale).tocsr(), labels_val)
        on_components = _on_components(x, labels, x_val, labels_val, seed)
        epochs = int(np.clip(round(STEPS * MINIBATCH / len(labels)), 5, 200))
        mlp = MLPClassifier((HIDDEN,), alpha=DECAY, batch_size=min(MINIBATCH, len(labels)), max_iter=epochs)
        mlp.set_params(random_state=seed).fit(x / largest, labels)
    arrays = {"features": features, "classes": classes.astype(np.int32)}
    weights = {
        REGRESSION: (_for_two(linear.coef_).T / scale[:, None], _for_two(linear.intercept_[:, None])[:, 0]),
        COMPONENTS: on_components,
        f"{MLP} 1": (mlp.coefs_[0] / largest, mlp.intercepts_[0]),
        f"{MLP} 2": (_for_two(mlp.coefs_[1].T).T, _for_two(mlp.intercepts_[1][:, None])[:, 0]),
    }
    for name, (weight, bias) in weights.items():
        arrays |= {f"{name} weight": weight.astype(np.float16), f"{name} bias": bias.astype(np.float32)}
    return arrays


def even_rows(labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return at most so many rows, drawn from the classes in turn, so that small classes are kept whole."""
    labels = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)
    for number in np.unique(labels):
        mine = order[labels[order] == number]
        turn[mine] = np.arange(len(mine))
    return np.sort(order[np.argsort(turn[order], kind="stable")][:most])


def _logistic_regression(x, labels, x_val, labels_val):
    """Fit logistic regression with balanced classes; the penalty is chosen on validation cells, if they differ.

    Returns
    -------
    The sum of accuracy and macro-F1 on validation cells, 0 without any, and the classifier
    """
    from sklearn.linear_model import LogisticRegression

    fits = []
    for c in PENALTIES if len(np.unique(labels_val)) > 1 else (1.0,):
        model = LogisticRegression(C=c, class_weight="balanced", max_iter=200, tol=1e-3).fit(x, labels)
        scores = classification_scores(labels_val, model.predict(x_val)) if len(labels_val) else {}
        fits.append((scores.get("accuracy", 0.0) + scores.get("macro_f1", 0.0), model))
    return max(fits, key=lambda fit: fit[0])


def _on_components(x, labels, x_val, labels_val, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit logistic regression on principal components, whitened or not; return its weights of features and its bias."""
    from utils.evaluate.principal_components import component_scale, fit_pca  # late, as in `fit_boxed`

    pca = fit_pca(x, N_COMPONENTS, seed)
    z, z_val = pca.transform(x), pca.transform(x_val) if x_val.shape[0] else np.empty((0, pca.n_components_))
    scales = [component_scale(z, whitened) for whitened in (False, True)]
    fits = [(*_logistic_regression(z / scale, labels, z_val / scale, labels_val), scale) for scale in scales]
    _, model, scale = max(fits, key=lambda fit: fit[0])
    weight = pca.components_.T @ (_for_two(model.coef_) / scale).T
    return weight, _for_two(model.intercept_[:, None])[:, 0] - pca.mean_ @ weight


def _for_two(values: np.ndarray) -> np.ndarray:
    """Return one row per class; scikit-learn has one row for two classes, the score of the second."""
    return np.vstack([np.zeros_like(values), values]) if len(values) == 1 else values


def check_boxed(arrays: dict[str, np.ndarray], names: list[str], n_features: int, n_classes: int) -> None:
    """Raise ValueError if the arrays cannot be those of the named baselines for a model of this size."""
    k, n = len(arrays["features"]), len(arrays["classes"])
    hidden = arrays[f"{MLP} 1 weight"].shape[-1]
    wanted = {f"{name} weight": (k, n) for name in names if name in LINEAR} | {
        f"{MLP} 1 weight": (k, hidden),
        f"{MLP} 2 weight": (hidden, n),
    }
    wanted |= {name.replace("weight", "bias"): shape[1:] for name, shape in wanted.items()}
    wanted |= {"features": (k,), "classes": (n,)}
    if {name: values.shape for name, values in arrays.items()} != wanted:
        raise ValueError("the boxed baselines do not have the shapes of the model")
    if not all(np.isfinite(values).all() for values in arrays.values()):
        raise ValueError("a number of the boxed baselines is not finite")
    for name, most in (("features", n_features), ("classes", n_classes)):
        numbers = arrays[name]
        if numbers.dtype.kind != "i" or numbers.min(initial=0) < 0 or numbers.max(initial=0) >= most:
            raise ValueError(f"the {name} of the boxed baselines are not those of the model")


def names_in(arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Return the names of the baselines that a folder has, in their order."""
    return (*(name for name in LINEAR if f"{name} weight" in arrays), MLP)


def boxed_types(arrays: dict[str, np.ndarray], x) -> np.ndarray:
    """Return the class number that each baseline gives each cell, [baselines, cells] in the order of :func:`names_in`.

    Parameters
    ----------
    arrays : from :func:`fit_boxed`
    x : model values [cells, features], sparse or read from disk by rows
    """
    found = np.empty((len(names_in(arrays)), x.shape[0]), dtype=np.int64)
    for rows, scores in _scores(arrays, x):
        found[:, rows] = [arrays["classes"][score.argmax(1)] for score in scores]
    return found


def boxed_probabilities(arrays: dict[str, np.ndarray], x, n_classes: int) -> dict[str, np.ndarray]:
    """Return the probabilities of the baselines, name → [cells, classes] float64.

    A class without training cells has probability 0.

    Parameters
    ----------
    arrays, x : as in :func:`boxed_types`
    n_classes : number of all classes
    """
    names = names_in(arrays)
    found = {name: np.zeros((x.shape[0], n_classes)) for name in names if name != CORRELATION}
    for rows, scores in _scores(arrays, x):
        for name, score in zip(names, scores, strict=True):
            if name in found:
                found[name][rows, arrays["classes"]] = softmax(score.astype(np.float64), axis=1)
    return found


def _scores(arrays: dict[str, np.ndarray], x) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """Yield some rows at a time, with the scores of each baseline [rows, classes of the baselines].

    A cell's scores do not depend on the other cells: sums run over its own values, in their order.
    """
    weights = {name: values.astype(np.float32) for name, values in arrays.items()}
    linear = [name for name in names_in(arrays) if name in LINEAR]
    apply = lambda x, name: x @ weights[f"{name} weight"] + weights[f"{name} bias"]
    for start in range(0, x.shape[0], BLOCK):
        block = csr_matrix(x[start : start + BLOCK], dtype=np.float32)[:, arrays["features"]]
        hidden = csr_matrix(np.maximum(apply(block, f"{MLP} 1"), 0))  # sparse: a product per cell, never of a block
        yield slice(start, start + BLOCK), [*(apply(block, name) for name in linear), apply(hidden, f"{MLP} 2")]


def agreement(arrays: dict[str, np.ndarray], x, predicted: np.ndarray) -> np.ndarray:
    """Return the share of the model and the baselines that give each cell the model's type, [cells] float32.

    Parameters
    ----------
    arrays, x : as in :func:`boxed_types`
    predicted : [cells] class number that the model gives
    """
    same = boxed_types(arrays, x) == predicted
    return ((1 + same.sum(0)) / (1 + len(same))).astype(np.float32)
