"""A mixture of a model's probabilities with those of simple classifiers, by weights that validation cells choose.

The probability of a class is proportional to the product of those of all members, each to the power of its weight
(logarithmic pooling: Genest and Zidek, Statistical Science 1986). Fitting the weights to held-out cells is stacking
(Wolpert, Neural Networks 1992). Here the loss is convex in the weights, so that there is one best choice.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

from utils.evaluate.calibration import MIN_CELLS
from utils.evaluate.dropout_mlp import class_weights
from utils.evaluate.metrics import classification_scores

OURS = "scmomer"
"""The model among the members of a mixture."""
LEAST = 1e-3
"""This share of each member's probability is spread over all classes: a product must survive one member's mistake."""
N_PARTS, N_ROUNDS, MOST_CELLS = 5, 3, 10_000
"""`gain` divides so many held-out cells at most into so many parts, so many times."""
LEAST_GAIN = 0.01
"""A mixture that is optional is used if its `gain` is at least this: a point in the mean of both scores."""
STRENGTH, BALANCE = 0.3, 0.5
"""Weights cost `STRENGTH` times their squared distance from the model alone, in nats over all held-out cells, and a
cell counts (size of its type)^-`BALANCE`. Chosen on test cells of folds of small human data from which no reported
number comes: with a larger strength few cells change too little, and without balance rare types lose."""


def fit_mixture(members: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, float] | None:
    """Fit the weights of a mixture on held-out cells.

    A weight also says how sure the member should be: weights above 1 sharpen what it says, those below 1 soften it.

    Parameters
    ----------
    members : name → log probabilities [cells, classes], from :func:`log_members`; the first is the model
    labels : [cells] class numbers

    Returns
    -------
    name → weight, at least 0; None with fewer than `MIN_CELLS` cells
    """
    if len(labels) < MIN_CELLS:
        return None
    stack = np.stack(list(members.values()))  # [members, cells, classes]
    rows, alone = np.arange(len(labels)), np.eye(len(stack))[0]
    _, codes = np.unique(labels, return_inverse=True)
    count = class_weights(codes, BALANCE)[codes]  # [cells], 1 on average
    at_label = stack[:, rows, labels]  # [members, cells]

    def loss_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = log_softmax(np.tensordot(weights, stack, 1), axis=1)
        far = weights - alone
        loss = STRENGTH * far @ far - count @ mixed[rows, labels]
        expected = (np.exp(mixed) * stack).sum(2)  # [members, cells]
        return loss, 2 * STRENGTH * far + (expected - at_label) @ count

    best = minimize(loss_and_gradient, alone, jac=True, bounds=[(0, None)] * len(stack), method="L-BFGS-B").x
    return {name: round(float(weight), 3) for name, weight in zip(members, best, strict=True)}


def gain(members: dict[str, np.ndarray], labels: np.ndarray, seed: int = 0) -> float | None:
    """Return how much better the mixture is than the model alone, on cells that did not choose its weights.

    The held-out cells are divided into parts, type by type, and each part is scored with weights fitted on the others.

    Parameters
    ----------
    members, labels : as for :func:`fit_mixture`
    seed : of the division

    Returns
    -------
    The difference in the mean of accuracy and macro-F1, between -1 and 1; None with too few cells
    """
    rng, gains = np.random.default_rng(seed), []
    if len(labels) > MOST_CELLS:
        rows = rng.choice(len(labels), MOST_CELLS, replace=False)
        members, labels = {name: member[rows] for name, member in members.items()}, labels[rows]
    part = np.empty(len(labels), dtype=np.int64)
    for _ in range(N_ROUNDS):
        order = rng.permutation(len(labels))
        part[order[np.argsort(labels[order], kind="stable")]] = np.arange(len(labels)) % N_PARTS
        mixed = np.empty_like(members[OURS])
        for number in range(N_PARTS):
            inside = part == number
            weights = fit_mixture({name: member[~inside] for name, member in members.items()}, labels[~inside])
            if weights is None:
                return None
            mixed[inside] = mixed_logits(weights, {name: member[inside] for name, member in members.items()})
        gains.append(difference(mixed, members[OURS], labels))
    return float(np.mean(gains))


def difference(mixed: np.ndarray, alone: np.ndarray, labels: np.ndarray) -> float:
    """Return how much better the first logits [cells, classes] are, in the mean of accuracy and macro-F1."""
    scores = [classification_scores(labels, logits.argmax(1)) for logits in (mixed, alone)]
    return float(np.mean([scores[0][name] - scores[1][name] for name in ("accuracy", "macro_f1")]))


def log_members(logits: np.ndarray, others: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the log probabilities of all members of a mixture, name → [cells, classes] float64.

    Parameters
    ----------
    logits : [cells, classes] of the model
    others : name → probabilities [cells, classes]
    """
    probabilities = {OURS: np.exp(log_softmax(np.asarray(logits, dtype=np.float64), axis=1))} | others
    return {name: np.log((1 - LEAST) * p + LEAST / p.shape[1]) for name, p in probabilities.items()}


def mixed_logits(weights: dict[str, float], members: dict[str, np.ndarray]) -> np.ndarray:
    """Return the logits of the mixture [cells, classes] float32.

    Parameters
    ----------
    weights : from :func:`fit_mixture`
    members : from :func:`log_members`
    """
    return sum(weight * members[name] for name, weight in weights.items()).astype(np.float32)


def check_mixture(weights: dict[str, float], names: Sequence[str]) -> None:
    """Raise ValueError unless each of the members has a finite weight of at least 0, and one of them more."""
    numbers = np.array(list(weights.values()), dtype=np.float64)
    if set(weights) != {OURS, *names} or not (np.isfinite(numbers).all() and (numbers >= 0).all() and numbers.any()):
        raise ValueError(f"the weights of the mixture are {weights}, not a number from 0 for each member")
