import warnings

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from utils.errors import UserError
from utils.evaluate import baselines
from utils.evaluate.metrics import feature_auroc
from utils.evaluate.translation import product
from utils.evaluate.translation_scores import auroc_within_depth

FITS = [baselines.logistic_regression, baselines.pca_logistic_regression]


def cells(n, seed, noise=1.0):
    """Sparse log values [n, 120] of four cell types; each has 12 marker genes."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, size=n, p=[0.5, 0.3, 0.15, 0.05])
    rate = np.full((4, 120), 0.3 * noise)
    for k in range(4):
        rate[k, 12 * k : 12 * k + 12] += 0.6
    values = np.log2(1 + rng.poisson(rate[kind])).astype(np.float32)
    return sparse.csr_matrix(values), np.array(["T", "B", "NK", "mono"], dtype=object)[kind]


@pytest.mark.parametrize("fit", FITS)
def test_fit_tunes_on_validation_cells(fit):
    (x, y), (x_val, y_val), (x_test, y_test) = cells(600, 0), cells(300, 1), cells(600, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fit that does not converge would be a handicapped baseline
        model, c = fit(x, y, x_val, y_val, seed=0)
    assert c in baselines.C_GRID and c == model[-1].C
    assert np.mean(model.predict(x_test) == y_test) > 0.9
    np.testing.assert_allclose(model.predict_proba(x_test).sum(axis=1), 1, rtol=1e-5)
    # The chosen fit is the one that is returned, and the same fit made alone agrees: warm starts save time only.
    again, _ = fit(x, y, None, None, seed=0)
    alone = again.set_params(classify__C=c, classify__warm_start=False).fit(x, y)
    np.testing.assert_allclose(model.predict_proba(x_test), alone.predict_proba(x_test), atol=0.01)


@pytest.mark.parametrize("fit", FITS)
def test_chosen_c_is_the_best_on_validation(fit, monkeypatch):
    (x, y), (x_val, y_val) = cells(150, 0, noise=2), cells(400, 1, noise=2)
    _, chosen = fit(x, y, x_val, y_val, seed=0)
    score = {}
    for c in baselines.C_GRID:
        monkeypatch.setattr(baselines, "C_GRID", (c,))
        model, _ = fit(x, y, x_val, y_val, seed=0)
        result = baselines.classification_scores(y_val, model.predict(x_val))
        score[c] = (result["accuracy"] + result["macro_f1"]) / 2
    assert score[chosen] >= max(score.values()) - 0.01  # warm starts may move a single cell
    assert max(score.values()) - min(score.values()) > 0.05  # so there was something to choose


def test_self_training_learns_from_unlabelled_cells_what_it_said_of_them():
    (x, y), (x_val, y_val), (x_test, _) = cells(800, 0, noise=2), cells(300, 1, noise=2), cells(600, 2, noise=2)
    few = np.concatenate([np.flatnonzero(y == kind)[:5] for kind in np.unique(y)])
    first, _ = baselines.logistic_regression(x[few], y[few], x_val, y_val)
    model, c = baselines.self_trained_logistic_regression(x[few], y[few], x_val, y_val, x_all=x)
    both = sparse.vstack([x[few], x], format="csr"), np.concatenate([y[few], first.predict(x)])
    expected, expected_c = baselines.logistic_regression(*both, x_val, y_val)
    assert c == expected_c
    np.testing.assert_allclose(model.predict_proba(x_test), expected.predict_proba(x_test), atol=1e-6)
    assert np.abs(model.predict_proba(x_test) - first.predict_proba(x_test)).max() > 0.1


@pytest.mark.parametrize("fit", FITS)
def test_sparse_dense_and_order_of_validation_do_not_matter(fit):
    (x, y), (x_val, y_val), (x_test, _) = cells(300, 0), cells(100, 1), cells(50, 2)
    from_sparse, c = fit(x, y, x_val, y_val, seed=0)
    from_dense, c_dense = fit(x.toarray(), list(y), x_val.toarray()[::-1], y_val[::-1], seed=0)
    assert c == c_dense
    np.testing.assert_allclose(from_sparse.predict_proba(x_test), from_dense.predict_proba(x_test.toarray()), atol=1e-3)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("validation", ["none", "empty", "one class"])
def test_without_useful_validation_cells_c_is_one(fit, validation):
    x, y = cells(60, 0)
    x_val, y_val = {"none": (None, None), "empty": (x[:0], y[:0]), "one class": (x[y == "T"], y[y == "T"])}[validation]
    _, c = fit(x, y, x_val, y_val, seed=0)
    assert c == 1.0


@pytest.mark.parametrize("fit", FITS)
def test_odd_shapes(fit):
    x, y = cells(12, 3)
    model, _ = fit(x, y, seed=0)  # fewer cells than components
    assert set(model.predict(x)) <= set(y)
    unseen = np.where(np.arange(12) < 6, "a type that training never saw", y)
    _, c = fit(x, y, x, unseen, seed=0)
    assert c in baselines.C_GRID
    with pytest.raises(UserError, match="two cell types"):
        fit(x, ["T"] * 12, seed=0)


def test_majority_class():
    (x, y), (x_test, _) = cells(100, 0), cells(20, 1)
    model, setting = baselines.majority_class(x, y)
    assert set(model.predict(x_test)) == {"T"} and setting is None


def test_nearest_neighbours_are_tuned_on_validation_cells():
    (x, y), (x_val, y_val), (x_test, y_test) = cells(600, 0), cells(300, 1), cells(600, 2)
    model, k = baselines.nearest_neighbours(x, y, x_val, y_val)
    assert k in baselines.NEIGHBOURS and model["classify"].n_neighbors == k
    assert np.mean(model.predict(x_test) == y_test) > 0.85
    assert baselines.nearest_neighbours(x, y)[1] == 15
    few, k = baselines.nearest_neighbours(x[:8], y[:8])
    assert k == 5 and len(few.predict(x_test)) == 600


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
