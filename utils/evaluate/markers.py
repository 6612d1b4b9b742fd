"""Markers: the features that the training cells of a type have more of, and more often, than those of other types."""

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

LEAST_SHARE = 0.05
"""A difference of shares counts as at least this, so that features that all cells have can be markers, too."""
BLOCK = 4096


def marker_scores(means: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how far each type's mean lies above that of the others, and the score by which markers are ranked.

    The score is the difference of the means, times the difference of the shares: it prefers features that a type has
    and others lack to features that all cells have in varying amounts. Each type weighs the same, whatever its size.

    Parameters
    ----------
    means : [types, features] mean log value of each type
    shares : [types, features] share of its cells with a value above zero

    Returns
    -------
    above, score : [types, features] each
    """
    above, more_cells = (table - (table.sum(axis=0) - table) / (len(table) - 1) for table in (means, shares))
    return above, above * np.maximum(more_cells, LEAST_SHARE)


def markers(x, labels: np.ndarray, features, types: list[str], top: int = 10) -> dict[str, list[str]]:
    """Return the markers of each type, the best first; fewer than `top` where fewer features are higher.

    Parameters
    ----------
    x : log values [cells, features], sparse or read from disk by rows; read once, in blocks
    labels : [cells] class numbers
    features : [features] names
    types : names of the classes
    top : markers per type
    """
    n = len(types)
    sums, open_cells = np.zeros((2, n, len(features)))
    for start in range(0, len(labels), BLOCK):
        block, mine = csr_matrix(x[start : start + BLOCK]), labels[start : start + BLOCK]
        of_type = csr_matrix((np.ones(len(mine)), (mine, np.arange(len(mine)))), shape=(n, len(mine)))
        sums += (of_type @ block).toarray()
        open_cells += (of_type @ (block > 0)).toarray()
    sizes = np.bincount(labels, minlength=n)
    seen = np.flatnonzero(sizes)
    if len(seen) < 2:
        return {}
    above, score = marker_scores(sums[seen] / sizes[seen, None], open_cells[seen] / sizes[seen, None])
    found = {}
    for at, number in enumerate(seen):
        best = np.argsort(-score[at], kind="stable")[:top]
        found[types[number]] = [str(features[i]) for i in best[above[at, best] > 0]]
    return found


def marker_table(found: dict[str, list[str]]) -> pd.DataFrame:
    """Return markers as a table, a row per rank and a column per type; empty text where a type has fewer."""
    rows = max(map(len, found.values()), default=0)
    return pd.DataFrame({name: genes + [""] * (rows - len(genes)) for name, genes in found.items()})
