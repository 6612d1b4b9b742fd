"""Baselines for genes: the numbers they promise, from sparse values."""

import numpy as np
from scipy.sparse import csr_matrix

from utils.evaluate.gene_features import RANDOM, SUMMARY, SVD, UNIT_SVD, coexpression_embedding, gene_baselines


def make_counts(n_cells: int = 80, n_genes: int = 30) -> np.ndarray:
    """Counts in which the first and the last ten genes are expressed by different halves of the cells."""
    rng = np.random.default_rng(0)
    rate = np.full((n_cells, n_genes), 0.5)
    rate[: n_cells // 2, :10] = rate[n_cells // 2 :, -10:] = 4
    return rng.poisson(rate).astype(np.float32)


def test_the_statistics_are_those_of_dense_values():
    counts = make_counts()
    counts[3] = 0  # a cell without counts
    values = np.log1p(counts / np.maximum(counts.sum(1, keepdims=True), 1) * 1e4)
    found = gene_baselines(csr_matrix(values), 0)["detection, mean, variance"]
    expected = np.column_stack([(counts > 0).mean(0), values.mean(0), values.var(0)])
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_svd_reproduces_the_inner_products_of_genes():
    counts = make_counts()
    values = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    found = gene_baselines(csr_matrix(values), 0)["co-expression SVD"]
    assert found.shape == (30, 29)
    product = values.T @ values
    assert np.abs(found @ found.T - product).max() < 0.02 * product.max()
    direction = found / np.linalg.norm(found, axis=1, keepdims=True)
    alike = direction @ direction.T
    assert alike[:10, :10].mean() > alike[:10, -10:].mean() + 0.05  # genes of the same cells lie together


def test_baselines_follow_from_the_seed_and_fit_any_size():
    values = csr_matrix(make_counts(6, 4))
    one, same, other = (gene_baselines(values, seed) for seed in (0, 0, 1))
    assert list(one) == [RANDOM, SUMMARY, SVD, UNIT_SVD]
    for name, features in one.items():
        assert features.dtype == np.float32 and len(features) == 4 and np.isfinite(features).all()
        np.testing.assert_array_equal(features, same[name])
    assert not np.array_equal(one["random vectors"], other["random vectors"])
    assert np.isfinite(gene_baselines(csr_matrix((5, 4)), 0)["co-expression SVD"]).all()


def test_the_embedding_has_the_width_asked_for_and_vectors_of_one_length():
    counts = make_counts()
    counts[:, 5] = 0  # a gene that no cell expresses
    found = coexpression_embedding(csr_matrix(counts), 40, seed=0)
    assert found.shape == (30, 40) and found.dtype == np.float32
    length = np.linalg.norm(found, axis=1)
    assert length[5] == 0
    np.testing.assert_allclose(np.delete(length, 5), np.sqrt(40), rtol=1e-5)
    alike = found @ found.T / 40
    assert alike[:5, :5].mean() > alike[:5, -10:].mean() + 0.05
