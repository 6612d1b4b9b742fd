import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from tests.evaluate.marked_cells import cells
from utils.errors import UserError
from utils.evaluate import translation_baselines as baselines
from utils.evaluate.metrics import feature_auroc
from utils.evaluate.translation import product
from utils.evaluate.translation_scores import auroc_within_depth

RIDGE_SETTINGS = {
    f"{k} components, penalty {alpha:g}": (k, alpha)
    for k in baselines.COMPONENTS_GRID
    for alpha in baselines.ALPHA_GRID
}


def paired(n, seed):
    """RNA as above, and peaks of which every type opens its own."""
    rna, kind = cells(n, seed)
    rate = np.full((n, 60), 0.05)
    for i, name in enumerate(["T", "B", "NK", "mono"]):
        rate[np.ix_(kind == name, range(15 * i, 15 * i + 15))] = 0.6
    return rna, sparse.csr_matrix(np.random.default_rng(seed).random((n, 60)) < rate, dtype=np.float32)


@pytest.mark.parametrize("fit", [baselines.ridge_translation, baselines.neighbour_translation])
def test_translation_is_learned_and_tuned(fit):
    (x, y), (x_val, y_val), (x_test, y_test) = paired(500, 0), paired(200, 1), paired(300, 2)
    left, right, setting = fit(x, y, x_val, y_val, x_test)
    predicted = product(left, right)
    assert setting in (*RIDGE_SETTINGS, *baselines.NEIGHBOURS)
    assert predicted.shape == (300, 60)
    errors = {
        name: np.square(p - y_test.toarray()).mean() for name, p in (("ours", predicted), ("mean", y.toarray().mean(0)))
    }
    assert errors["ours"] < 0.85 * errors["mean"]


@pytest.mark.parametrize("fit", [baselines.ridge_translation, baselines.neighbour_translation])
def test_translation_without_validation_cells(fit):
    (x, y), (x_test, _) = paired(60, 0), paired(10, 1)
    left, right, setting = fit(x, y, x[:0], y[:0], x_test)
    assert product(left, right).shape == (10, 60) and setting in ("50 components, penalty 100", 15)
    with pytest.raises(UserError, match="fewer than two"):
        fit(x[:1], y[:1], x[:0], y[:0], x_test)


def test_ridge_is_sklearns():
    (x, y), (x_test, _) = paired(300, 0), paired(50, 1)
    left, right, setting = baselines.ridge_translation(x, y, x, y, x_test)
    k, alpha = RIDGE_SETTINGS[setting]
    pca = PCA(50, svd_solver="arpack", random_state=0).fit(x)
    theirs = Ridge(alpha).fit(pca.transform(x)[:, :k], y.toarray()).predict(pca.transform(x_test)[:, :k])
    np.testing.assert_allclose(product(left, right), theirs, atol=1e-3)


def test_ridge_is_tuned_by_the_ranking_of_validation_peaks():
    (x, y), (x_val, y_val), (x_test, y_test) = paired(300, 0), paired(200, 1), paired(300, 2)
    _, _, setting = baselines.ridge_translation(x, y, x_val, y_val, x_val, ranking=True)
    found = {}
    for choice, (k, alpha) in RIDGE_SETTINGS.items():
        pca = PCA(50, svd_solver="arpack", random_state=0).fit(x)
        fit = Ridge(alpha).fit(pca.transform(x)[:, :k], y.toarray())
        found[choice] = np.nanmean(feature_auroc(y_val, fit.predict(pca.transform(x_val)[:, :k]), 10))
    assert found[setting] == pytest.approx(max(found.values()), abs=1e-3)
    permuted = y[np.random.default_rng(0).permutation(300)]
    for truth, low, high in ((y, 0.65, 1), (permuted, 0.4, 0.6)):
        left, right, _ = baselines.ridge_translation(x, truth, x_val, y_val, x_test, ranking=True)
        assert low < np.nanmean(feature_auroc(y_test, product(left, right))) < high


def by_depth(n, seed):
    """Detected genes of cells, types, and peaks that are open more often in deeper cells; a type opens half of them."""
    draw = np.random.default_rng(seed)
    detected, types = draw.integers(100, 1000, n), draw.choice(["a", "b"], n).astype(object)
    rate = np.tile(0.0004 * detected[:, None], (1, 40))
    rate[:, :20] *= np.where(types == "a", 1.6, 0.4)[:, None]
    return detected, types, sparse.csr_matrix(draw.random((n, 40)) < rate, dtype=np.float32)


def test_depth_alone_ranks_cells():
    (n, types, y), (n_test, types_test, y_test) = by_depth(600, 0), by_depth(400, 1)
    score = lambda factors, truth=y_test: np.nanmean(feature_auroc(truth, product(*factors[:2])))
    depth = baselines.depth_translation(n, y, n_test)
    both = baselines.depth_translation(n, y, n_test, types, types_test)
    assert 0.6 < score(depth) < score(both)
    shuffled = y_test[np.random.default_rng(0).permutation(400)]
    assert 0.47 < score(depth, shuffled) < 0.53 and 0.47 < score(both, shuffled) < 0.53
    within = np.nanmean(auroc_within_depth(*depth[:2], y_test, n_test))
    assert 0.47 < within < score(depth) - 0.05  # cells of similar depth cannot be told apart by it
    assert np.nanmean(auroc_within_depth(*both[:2], y_test, n_test)) > within + 0.05
    np.testing.assert_allclose(product(*depth[:2]).mean(), y.mean(), rtol=0.1)
    unknown = baselines.depth_translation(n, y, n_test, types, np.full(400, None, dtype=object))
    np.testing.assert_allclose(product(*unknown[:2]), product(*depth[:2]), rtol=1e-5)
