"""Describe genes without any trained model: what a gene embedding has to beat."""

import numpy as np
from scipy import sparse
from sklearn.utils.extmath import randomized_svd

N_COMPONENTS = 50
"""Numbers per gene of the random vectors, and the most that the co-expression SVD keeps."""
RANDOM, SUMMARY, SVD = "random vectors", "detection, mean, variance", "co-expression SVD"
UNIT_SVD = "co-expression SVD, unit length"
"""Names of the baselines, as tables show them."""


def random_vectors(n_genes: int, width: int, seed: int) -> np.ndarray:
    """Return [n_genes, width] float32 standard normal numbers: an embedding that knows nothing about genes."""
    return np.random.default_rng(seed).standard_normal((n_genes, width), dtype=np.float32)


def coexpression(values: sparse.csr_matrix, width: int, seed: int) -> np.ndarray:
    """Describe each gene by the cells that express it: its coordinates in a truncated SVD of the values.

    The matrix is not centred: it stays sparse, and the first component holds the mean.

    Parameters
    ----------
    values : [cells, genes] log-normalised values, sparse; use only cells that training may see
    width : numbers per gene; there are fewer if cells or genes are
    seed : seed of the randomised SVD

    Returns
    -------
    [genes, at most width] float32
    """
    values = sparse.csr_matrix(values, dtype=np.float64)
    k = max(1, min(width, min(values.shape) - 1))
    _, scale, components = randomized_svd(values, k, random_state=seed)
    vectors = (components.T * scale).astype(np.float32)
    vectors[np.diff(values.tocsc().indptr) == 0] = 0  # genes that no cell expresses have rounding errors for numbers
    return vectors


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors [genes, k] to length 1; vectors of zeros stay as they are."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)


def coexpression_embedding(values: sparse.csr_matrix, width: int, seed: int) -> np.ndarray:
    """Return [genes, width] co-expression vectors to embed genes with: each number is about as large as a random one.

    Parameters are those of `coexpression`; with few cells or genes, the last columns are zero.
    """
    vectors = unit_length(coexpression(values, width, seed))
    return np.pad(vectors, ((0, 0), (0, width - vectors.shape[1]))) * np.float32(np.sqrt(width))


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
        "co-expression SVD" : [genes, k] see `coexpression`; k is 50 or fewer
        "co-expression SVD, unit length" : the same, which leaves out how strongly a gene is expressed
        All float32.
    """
    values = sparse.csr_matrix(values, dtype=np.float64)
    n_cells, n_genes = values.shape
    mean = np.asarray(values.mean(0)).ravel()
    variance = np.asarray(values.multiply(values).mean(0)).ravel() - mean**2
    detection = np.bincount(values.indices[values.data > 0], minlength=n_genes) / max(n_cells, 1)
    svd = coexpression(values, N_COMPONENTS, seed)
    described = {
        RANDOM: random_vectors(n_genes, N_COMPONENTS, seed),
        SUMMARY: np.column_stack([detection, mean, np.maximum(variance, 0)]),
        SVD: svd,
        UNIT_SVD: unit_length(svd),
    }
    return {name: features.astype(np.float32) for name, features in described.items()}
