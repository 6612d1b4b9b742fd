"""Score a cell embedding: whether cells of a type lie together and whether batches mix.

Silhouettes are defined as in scib (Luecken et al., Nature Methods 2022). ARI and NMI
compare k-means clusters with types.
"""

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_samples

MAX_CELLS = 5_000
"""Larger embeddings are subsampled to this many cells, since silhouettes compare every cell with every other."""


def embedding_scores(embedding: np.ndarray, labels, batches=None, seed: int = 0) -> dict[str, float]:
    """Score an embedding.

    Parameters
    ----------
    embedding : [cells, D]
    labels : cell types [cells]
    batches : batches [cells], or None
    seed : random seed of k-means and of the subsample

    Returns
    -------
    dict
        `ari` and `nmi` : agreement of the types with k-means clusters, of which there are as many as types
        `silhouette` : mean silhouette of the types, scaled to 0…1
        `batch_mixing` : 1 - |silhouette of batches| (0…1) within a type, mean over the types that have at least ten
        cells and two batches
        A score is NaN if there are too few cells, types or batches.
    """
    labels = np.asarray(labels).astype(str)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(labels))[:MAX_CELLS])
    embedding, labels = np.asarray(embedding, dtype=np.float64)[rows], labels[rows]
    types = np.unique(labels)
    scores = dict.fromkeys(("ari", "nmi", "silhouette", "batch_mixing"), float("nan"))
    if 2 <= len(types) < len(labels):
        clusters = KMeans(len(types), n_init=10, random_state=seed).fit_predict(embedding)
        scores["ari"] = float(adjusted_rand_score(labels, clusters))
        scores["nmi"] = float(normalized_mutual_info_score(labels, clusters))
        scores["silhouette"] = float((silhouette_samples(embedding, labels).mean() + 1) / 2)
    if batches is not None:
        batches, mixing = np.asarray(batches).astype(str)[rows], []
        for name in types:
            mine = np.flatnonzero(labels == name)
            if len(mine) >= 10 and 2 <= len(np.unique(batches[mine])) < len(mine):
                mixing.append(np.mean(1 - np.abs(silhouette_samples(embedding[mine], batches[mine]))))
        scores["batch_mixing"] = float(np.mean(mixing)) if mixing else float("nan")
    return scores
