"""Spread labels over near cells: a classifier's predictions for unlabelled cells, made smoother."""

import numpy as np
from sklearn.neighbors import NearestNeighbors

NEIGHBOURS = 10
"""Nearest cells whose mean a cell gets."""
WEIGHT = 0.8
"""Weight of that mean; the rest is the classifier's own prediction for the cell."""
STEPS = 30
"""Steps, after which what is left of the start is 0.8^30 = 0.1%."""
MOST = 20_000
"""Cells among which neighbours are looked for; on larger data the labelled cells and a random part of the others."""


def spread_labels(probability: np.ndarray, points: np.ndarray, known: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return probabilities of classes after they were spread over each cell's nearest neighbours.

    Each step gives a cell `WEIGHT` times the mean of its neighbours and, for the rest, the classifier's probabilities;
    labelled cells keep their label. This is label spreading (Zhou et al. 2004), with a classifier's probabilities as
    the start in place of labels alone, and with means over neighbours (no symmetric graph).

    Parameters
    ----------
    probability : [cells, classes] of a classifier
    points : [cells, width], where near cells are alike: an embedding or principal components
    known : [cells] class numbers of labelled cells, -1 for the others
    seed : of the random part of large data

    Returns
    -------
    [cells, classes]
    """
    start = np.array(probability, dtype=np.float64)
    labelled = np.flatnonzero(known >= 0)
    start[labelled] = np.eye(start.shape[1])[known[labelled]]
    rest = np.random.default_rng(seed).permutation(np.flatnonzero(known < 0))
    inner = np.sort(np.concatenate([labelled, rest[: max(0, MOST - len(labelled))]]))
    k = min(NEIGHBOURS, len(inner) - 1)
    if k < 1:
        return start
    points = np.asarray(points, dtype=np.float32)
    index = NearestNeighbors(n_neighbors=k).fit(points[inner])
    near, own = index.kneighbors(return_distance=False), start[inner]
    among, spread = known[inner] >= 0, own
    for _ in range(STEPS):
        spread = (1 - WEIGHT) * own + WEIGHT * spread[near].mean(1)
        spread[among] = own[among]
    out = start
    outer = np.setdiff1d(np.arange(len(start)), inner)
    if len(outer):
        near = index.kneighbors(points[outer], return_distance=False)
        out[outer] = (1 - WEIGHT) * start[outer] + WEIGHT * spread[near].mean(1)
    out[inner] = spread
    return out
