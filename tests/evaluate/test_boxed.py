"""Boxed baselines and markers: what they find in cells whose types are known, and what a folder may hold."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from utils.evaluate import boxed
from utils.evaluate.markers import markers


@pytest.fixture(scope="module")
def made():
    """300 cells of three types; features 0 to 8 belong to a type each, the other 11 to none."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2], [200, 80, 20]))
    own = np.arange(20) // 3 == labels[:, None]
    return csr_matrix(rng.poisson(np.where(own, 2.0, 0.2)).astype(np.float32)), labels


@pytest.fixture(scope="module")
def arrays(made):
    x, labels = made
    return boxed.fit_boxed(x[:200], labels[:200], x[200:250], labels[200:250])


def test_each_baseline_finds_the_types_of_other_cells(made, arrays):
    x, labels = made
    found = boxed.boxed_types(arrays, x[250:])
    assert found.shape == (len(boxed.NAMES), 50)
    assert ((found == labels[250:]).mean(1) > 0.9).all()
    together = boxed.agreement(arrays, x[250:], labels[250:])
    np.testing.assert_allclose(together, (1 + (found == labels[250:]).sum(0)) / 4)
    assert boxed.agreement(arrays, x[250:], np.full(50, 7)).max() == 0.25


def test_logistic_regression_is_that_of_scikit_learn(made, arrays):
    """Half precision changes no type here."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import MaxAbsScaler

    x, labels = made
    scaler = MaxAbsScaler().fit(x[:200])
    found = set()
    for c in boxed.PENALTIES:
        model = LogisticRegression(C=c, class_weight="balanced", max_iter=500)
        found.add(tuple(model.fit(scaler.transform(x[:200]), labels[:200]).predict(scaler.transform(x))))
    assert tuple(boxed.boxed_types(arrays, x)[0]) in found


def test_on_components_it_is_that_of_scikit_learn(made, arrays):
    """Whitened or not; the weights of components, folded into weights of features, give the same types."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    x, labels = made
    pca, found = PCA(19, svd_solver="full").fit(x[:200].toarray()), set()
    z, every = pca.transform(x[:200].toarray()), pca.transform(x.toarray())
    for scale in (z.std(0), np.sqrt(z.var(0).mean())):
        for c in boxed.PENALTIES:
            model = LogisticRegression(C=c, class_weight="balanced", tol=1e-3).fit(z / scale, labels[:200])
            found.add(tuple(model.predict(every / scale)))
    assert tuple(boxed.boxed_types(arrays, x)[boxed.NAMES.index(boxed.COMPONENTS)]) in found


def test_a_folder_with_correlations_is_read_as_before(made, arrays):
    """As folders had them before there were principal components: they give types, and no probabilities."""
    x, _ = made
    renamed = lambda name: name.replace(boxed.COMPONENTS, boxed.CORRELATION)
    older = {renamed(name): values for name, values in arrays.items()}
    names = boxed.names_in(older)
    assert names == ("logistic regression", "correlation with type means", "MLP")
    boxed.check_boxed(older, names, 20, 3)
    np.testing.assert_array_equal(boxed.boxed_types(older, x), boxed.boxed_types(arrays, x))
    assert set(boxed.boxed_probabilities(older, x, 3)) == {"logistic regression", "MLP"}
    assert set(boxed.boxed_probabilities(arrays, x, 3)) == set(boxed.NAMES)
    with pytest.raises(ValueError, match="shapes"):
        boxed.check_boxed(older, boxed.NAMES, 20, 3)


def test_blocks_change_nothing(made, arrays, monkeypatch):
    x, _ = made
    whole = boxed.boxed_types(arrays, x)
    monkeypatch.setattr(boxed, "BLOCK", 7)
    np.testing.assert_array_equal(boxed.boxed_types(arrays, x), whole)


def test_few_features_and_cells_are_enough(made, monkeypatch):
    x, labels = made
    monkeypatch.setattr(boxed, "MOST_FEATURES", 9)
    monkeypatch.setattr(boxed, "MOST_CELLS", 60)
    small = boxed.fit_boxed(x[:200], labels[:200], x[200:250], labels[200:250])
    assert list(small["features"]) == list(range(9))  # those that differ between the types vary most
    assert (boxed.boxed_types(small, x[250:]) == labels[250:]).mean() > 0.9


def test_rows_are_drawn_from_the_classes_in_turn():
    labels = np.repeat([0, 1, 2], [100, 30, 4])
    rows = boxed.even_rows(labels, 40, 0)
    assert list(np.bincount(labels[rows])) == [18, 18, 4]
    assert list(boxed.even_rows(labels, 500, 0)) == list(range(134))


def test_two_classes_and_classes_without_cells(made):
    x, labels = made
    two = boxed.fit_boxed(x, np.where(labels == 0, 1, 4), x[:0], labels[:0])
    boxed.check_boxed(two, boxed.NAMES, 20, 5)
    assert (boxed.boxed_types(two, x) == np.where(labels == 0, 1, 4)).mean() > 0.9
    assert boxed.fit_boxed(x, np.zeros(300, dtype=int), x[:0], labels[:0]) == {}


@pytest.mark.parametrize(("n_features", "n_classes"), [(19, 3), (20, 2)])
def test_arrays_of_another_model_are_refused(n_features, n_classes, arrays):
    boxed.check_boxed(arrays, boxed.NAMES, 20, 3)
    with pytest.raises(ValueError, match=r"features|classes"):
        boxed.check_boxed(arrays, boxed.NAMES, n_features, n_classes)


def test_markers_are_the_features_of_the_type(made):
    x, labels = made
    found = markers(x, labels, [f"g{i}" for i in range(20)], ["a", "b", "c", "empty"], top=3)
    assert {name: set(genes) for name, genes in found.items()} == {
        "a": {"g0", "g1", "g2"},
        "b": {"g3", "g4", "g5"},
        "c": {"g6", "g7", "g8"},
    }
    assert markers(x, np.zeros(300, dtype=int), [f"g{i}" for i in range(20)], ["a"]) == {}
