"""Describe genes without any trained model: what a gene embedding has to beat."""

import numpy as np
from scipy import sparse
from sklearn.utils.extmath import randomized_svd

N_COMPONENTS = 50
"""Numbers per gene of the random vectors, and the most that the co-expression SVD keeps."""
RANDOM, SUMMARY, SVD = "random vectors", "detection, mean, variance", "co-expression SVD"
"""Names of the baselines, as tables show them."""


def random_vectors(n_genes: int, width: int, seed: int) -> np.ndarray:
    """Return [n_genes, width] float32 standard normal numbers: an embedding that knows nothing about genes."""
    return np.random.default_rng(seed).standard_normal((n_genes, width), dtype=np.float32)


def gene_baselines(values: sparse.csr_matrix, seed: int) -> dict[str, np.ndarray]:
    """Describe each gene by random numbers, by simple statistics, and by the cells that express it.

    Parameters
    ----------
    values : [cells, genes] log-normalised values, sparse; use only cells that training may see
    seed : seed of the random vectors and of the SVD

    Returns
    -------
    dict
        "random vectors" : [genes, 50]
        "detection, mean, variance" : [genes, 3] share of the cells that express the gene, and mean and variance of its
        values
        "co-expression SVD" : [genes, k] coordinates of the genes in a truncated SVD of the values, k is
        50 or fewer
        All float32.
    """
    values = sparse.csr_matrix(values, dtype=np.float64)
    n_cells, n_genes = values.shape
    mean = np.asarray(values.mean(0)).ravel()
    variance = np.asarray(values.multiply(values).mean(0)).ravel() - mean**2
    detection = np.bincount(values.indices[values.data > 0], minlength=n_genes) / max(n_cells, 1)
    # The matrix is not centred: it stays sparse, and the first component holds the mean, which helps the baseline.
    k = max(1, min(N_COMPONENTS, min(values.shape) - 1))
    _, scale, components = randomized_svd(values, k, random_state=seed)
    described = {
        RANDOM: random_vectors(n_genes, N_COMPONENTS, seed),
        SUMMARY: np.column_stack([detection, mean, np.maximum(variance, 0)]),
        SVD: components.T * scale,
    }
    return {name: features.astype(np.float32) for name, features in described.items()}
