"""Novelty of cells: how far an embedding is from those of the training cells, as a conformal p-value.

Two standard methods on embeddings: the distance to the nearest training cells (Sun et al., ICML 2022), and the
Mahalanobis distance to the nearest class mean with one shrunk covariance for all classes (Lee et al., NeurIPS 2018).
Two that read the classifier alone stand beside them: one minus the largest probability (Hendrycks and Gimpel, ICLR
2017) and the energy of the logits (Liu et al., NeurIPS 2020). `benchmarks/novelty.py` compares them.
"""

import base64

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

N_REFERENCE = 2000
"""Training cells that a model folder keeps."""
N_SCORES = 1000
"""Held-out scores that a model folder keeps; a p-value needs no more, and a random part of them is as valid as all."""
NEIGHBOURS = 10
"""The distance is the mean over so many nearest training cells."""
MIN_CELLS = 20
"""With fewer held-out cells no p-value could be below 0.05."""
BLOCK = 512
"""Cells whose distances are in memory at once."""
LEVELS_OF_BYTE = 127


def unit(embedding: np.ndarray) -> np.ndarray:
    """Return embeddings [cells, width] float32, scaled to length 1."""
    embedding = np.asarray(embedding, dtype=np.float32)
    return embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-12)


def neighbour_distance(reference: np.ndarray, embedding: np.ndarray, k: int = NEIGHBOURS) -> np.ndarray:
    """Return the mean Euclidean distance of each cell to its k nearest reference cells [cells] float32.

    Each pair of cells is summed alone, in one order. A matrix product would be faster, but on some processors its
    rounding depends on the place of a cell among the others, and ties with known cells would fall either way.

    Parameters
    ----------
    reference : [n, width]
    embedding : [cells, width]
    """
    k, out = min(k, len(reference)), np.empty(len(embedding), dtype=np.float32)
    for start in range(0, len(embedding), BLOCK):
        distance = cdist(embedding[start : start + BLOCK], reference)
        out[start : start + BLOCK] = np.partition(distance, k - 1, axis=1)[:, :k].mean(1)
    return out


def mahalanobis_distance(train: np.ndarray, labels: np.ndarray, embedding: np.ndarray) -> np.ndarray:
    """Return the smallest Mahalanobis distance of each cell to a class mean [cells].

    Parameters
    ----------
    train, labels : embeddings [n, width] of training cells, and their class numbers [n]
    embedding : [cells, width]
    """
    from sklearn.covariance import LedoitWolf  # slow to import, and only the comparison needs it

    means = np.stack([train[labels == number].mean(0) for number in np.unique(labels)])
    centred = train - means[np.searchsorted(np.unique(labels), labels)]
    whiten = np.linalg.cholesky(LedoitWolf(assume_centered=True).fit(centred).precision_)
    cells, means = embedding @ whiten, means @ whiten
    return np.sqrt(np.square(cells[:, None] - means).sum(2).min(1))


def energy(logits: np.ndarray) -> np.ndarray:
    """Return minus the logarithm of the summed exponentials of the logits [cells]; high for novel cells."""
    return -logsumexp(logits, axis=1)


def p_values(held_out: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the share of held-out scores, counting the cell itself, that are at least a cell's score [cells].

    For cells that are exchangeable with the held-out ones, p is at most a with a probability of at most a.
    """
    held_out = np.sort(held_out)
    at_least = len(held_out) - np.searchsorted(held_out, scores, side="left")
    return (1 + at_least) / (1 + len(held_out))


def fit_novelty(train: np.ndarray, val: np.ndarray) -> dict | None:
    """Fit novelty by the distance to the nearest training cells.

    Parameters
    ----------
    train : [n, width] embeddings of training cells, of which at most `N_REFERENCE` are kept
    val : [cells, width] embeddings of held-out cells

    Returns
    -------
    Plain numbers and text for :func:`novelty_p_values`: method, n_cells, reference (bytes in base64), scale, shape,
    held_out (sorted distances). None with fewer than `MIN_CELLS` held-out cells or without training cells.
    """
    if len(val) < MIN_CELLS or not len(train):
        return None
    rng = np.random.default_rng(0)
    draw = lambda cells, n: cells if len(cells) <= n else cells[np.sort(rng.permutation(len(cells))[:n])]
    # A component of a vector of length 1 lies between -1 and 1: a byte is precise to 0.004 of the largest component.
    reference = unit(draw(train, N_REFERENCE))
    scale = float(np.abs(reference).max()) / LEVELS_OF_BYTE or 1.0
    reference = np.round(reference / scale).astype(np.int8)
    k = min(NEIGHBOURS, len(reference))
    fitted = {
        "method": f"mean distance to the {k} nearest of {len(reference):,} training cells",
        "n_cells": min(len(val), N_SCORES),
        "shape": list(reference.shape),
        "scale": scale,
        "reference": base64.b64encode(reference.tobytes()).decode(),
    }
    return fitted | {"held_out": np.sort(_distance(fitted, draw(val, N_SCORES))).astype(float).tolist()}


def with_held_out(fitted: dict, distances: np.ndarray) -> dict:
    """Return what :func:`fit_novelty` returned with the distances of other held-out cells, of which it keeps some."""
    if len(distances) < MIN_CELLS:
        return fitted
    some = np.sort(np.random.default_rng(0).permutation(distances)[:N_SCORES])
    return fitted | {"n_cells": len(some), "held_out": some.tolist()}


def _reference(fitted: dict) -> np.ndarray:
    """Return the training cells of a model folder [n, width] float32."""
    cells = np.frombuffer(base64.b64decode(fitted["reference"], validate=True), dtype=np.int8)
    return cells.reshape(fitted["shape"]).astype(np.float32) * np.float32(fitted["scale"])


def _distance(fitted: dict, embedding: np.ndarray) -> np.ndarray:
    return neighbour_distance(_reference(fitted), unit(embedding))


def check_novelty(fitted: dict) -> None:
    """Raise ValueError if what :func:`fit_novelty` returned was damaged."""
    held_out = np.asarray(fitted["held_out"], dtype=np.float64)
    if held_out.ndim != 1 or len(held_out) < MIN_CELLS or not np.isfinite(held_out).all():
        raise ValueError(f"the held-out distances of novelty are not at least {MIN_CELLS} finite numbers")
    if not np.isfinite(_reference(fitted)).all():
        raise ValueError("the training cells of novelty are not finite")


def novelty_p_values(fitted: dict, embedding: np.ndarray) -> np.ndarray:
    """Return the p-value of each cell [cells]; novelty is 1 - p.

    Parameters
    ----------
    fitted : from :func:`fit_novelty`
    embedding : [cells, width]
    """
    return p_values(np.asarray(fitted["held_out"], dtype=np.float32), _distance(fitted, embedding))
