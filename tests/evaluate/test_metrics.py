import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, f1_score, roc_auc_score

from utils.errors import UserError
from utils.evaluate import metrics

TRUE = ["T", "T", "T", "T", "B", "B", "NK", "NK"]
PREDICTED = ["T", "T", "T", "B", "B", "B", "T", "mono"]


def test_classification_scores_by_hand():
    scores = metrics.classification_scores(TRUE, PREDICTED)
    # T: 3 of 4 found, 4 called → F1 6/8; B: 2 of 2, 3 called → F1 4/5; NK: none. "mono" is no class of these cells.
    assert scores == {
        "accuracy": 5 / 8,
        "balanced_accuracy": pytest.approx((0.75 + 1 + 0) / 3),
        "macro_f1": pytest.approx((0.75 + 0.8 + 0) / 3),
        "n_cells": 8,
    }


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=1, max_size=60))
def test_classification_scores_agree_with_sklearn(pairs):
    true, predicted = np.array(pairs).T
    scores = metrics.classification_scores(true, predicted)
    assert scores["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sklearn mentions classes that are only predicted
        assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true, predicted))
    macro_f1 = f1_score(true, predicted, labels=np.unique(true), average="macro", zero_division=0)
    assert scores["macro_f1"] == pytest.approx(macro_f1)


def test_per_class_table():
    table = metrics.per_class_table(pd.Categorical(TRUE), PREDICTED)
    assert list(table.index) == ["T", "B", "NK", "mono"]
    assert list(table.columns) == ["precision", "recall", "f1", "support"]
    np.testing.assert_allclose(table.loc["T"], [0.75, 0.75, 0.75, 4])
    np.testing.assert_allclose(table.loc["B"], [2 / 3, 1, 0.8, 2])
    np.testing.assert_allclose(table.loc["mono"], [0, 0, 0, 0])
    assert table.f1[table.support > 0].mean() == pytest.approx(
        metrics.classification_scores(TRUE, PREDICTED)["macro_f1"]
    )


def test_labels_are_checked():
    with pytest.raises(ValueError, match="2 true labels but 1 predicted"):
        metrics.classification_scores(["a", "b"], ["a"])
    with pytest.raises(UserError, match="no labelled cells"):
        metrics.classification_scores([], [])
    with pytest.raises(UserError, match="1 of 3 cells have no label"):
        metrics.classification_scores(pd.Series(["a", None, "b"]), ["a", "a", "b"])


def test_bootstrap_interval_matches_the_binomial():
    n, right = 900, 720
    true = np.array(["T"] * n)
    predicted = np.where(np.arange(n) < right, "T", "B")
    low, high = metrics.bootstrap_interval(true, predicted, "accuracy", n=2000)
    half = 1.96 * np.sqrt(0.8 * 0.2 / n)  # ± 0.026
    assert low == pytest.approx(0.8 - half, abs=0.003)
    assert high == pytest.approx(0.8 + half, abs=0.003)
    by_function = metrics.bootstrap_interval(true, predicted, lambda t, p: np.mean(t == p), n=2000)
    assert by_function == pytest.approx((low, high), abs=0.003)
    assert metrics.bootstrap_interval(true, predicted, "accuracy", n=2000) == (low, high)
    assert metrics.bootstrap_interval(true, predicted, "accuracy", n=2000, seed=1) != (low, high)
    narrow = metrics.bootstrap_interval(true, predicted, "accuracy", n=2000, level=0.5)
    assert low < narrow[0] < 0.8 < narrow[1] < high


def test_bootstrap_keeps_rare_classes():
    """One rare class, always wrong: no resample loses it, so macro-F1 cannot rise above that of the other two."""
    true = ["T"] * 50 + ["B"] * 50 + ["rare"]
    predicted = ["T"] * 45 + ["B"] * 5 + ["B"] * 50 + ["other"]
    low, high = metrics.bootstrap_interval(true, predicted, "macro_f1")
    assert low < metrics.classification_scores(true, predicted)["macro_f1"] < high <= 2 / 3


def accessibility_and_scores(seed=0, shape=(40, 30)):
    rng = np.random.default_rng(seed)
    accessibility = (rng.random(shape) < rng.random(shape[1]) * 0.4).astype(np.float32)
    accessibility[:, 0], accessibility[:, 1] = 0, 1  # an all-closed and an all-open peak
    accessibility[0] = 0  # and an all-closed cell
    accessibility[0, 1] = 1
    scores = np.round(rng.normal(size=shape) + accessibility, 1)  # rounding makes many ties
    return accessibility, scores


def reference(accessibility, scores):
    pairs = zip(accessibility, scores, strict=True)
    return np.array([roc_auc_score(a, s) if 0 < a.sum() < len(a) else np.nan for a, s in pairs])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("block_values", [1, 100, 10**6])
def test_auroc_agrees_with_sklearn_with_ties(dtype, block_values, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_VALUES", block_values)
    accessibility, scores = accessibility_and_scores()
    scores = scores.astype(dtype)
    per_peak = metrics.feature_auroc(sparse.csc_matrix(accessibility), scores)
    assert np.isnan(per_peak[:2]).all() and np.isfinite(per_peak[2:]).any()
    np.testing.assert_allclose(per_peak, reference(accessibility.T, scores.T), rtol=1e-12)
    per_cell = metrics.cell_auroc(sparse.csr_array(accessibility), scores)
    np.testing.assert_allclose(per_cell, reference(accessibility, scores), rtol=1e-12)


def test_auroc_of_functions_integers_and_unclean_matrices():
    accessibility, scores = accessibility_and_scores(1)
    per_peak, per_cell = metrics.feature_auroc(accessibility, scores), metrics.cell_auroc(accessibility, scores)
    np.testing.assert_array_equal(metrics.feature_auroc(accessibility, lambda a, b: scores[:, a:b]), per_peak)
    np.testing.assert_array_equal(metrics.cell_auroc(accessibility, lambda a, b: scores[a:b]), per_cell)
    whole = np.round(10 * scores).astype(int)
    np.testing.assert_allclose(metrics.feature_auroc(accessibility, whole), per_peak)
    # Counts instead of ones, stored zeros, entries stored in two parts: open is what is not zero.
    row, column = np.indices(accessibility.shape).reshape(2, -1)
    values = accessibility.ravel() * 3
    coo = sparse.coo_matrix((np.r_[values, values], (np.r_[row, row], np.r_[column, column])), accessibility.shape)
    unclean = sparse.csc_matrix(accessibility)
    unclean.data[:5] = 0
    stored = unclean.nnz
    np.testing.assert_allclose(metrics.feature_auroc(coo, scores), per_peak)
    np.testing.assert_allclose(metrics.feature_auroc(unclean, scores), reference(unclean.toarray().T, scores.T))
    assert unclean.nnz == stored  # the caller's matrix stays as it was


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_average_precision_agrees_with_sklearn_with_ties(seed):
    accessibility, scores = accessibility_and_scores(seed)
    found = metrics.translation_scores(accessibility, scores, min_open=1)
    for lines, name in (((accessibility.T, scores.T), "peak_ap"), ((accessibility, scores), "cell_ap")):
        pairs = zip(*lines, strict=True)
        expected = [average_precision_score(a, s) for a, s in pairs if 0 < a.sum() < len(a)]
        assert found[name] == pytest.approx(np.mean(expected), rel=1e-12)


def test_auroc_needs_matching_finite_scores():
    accessibility, scores = accessibility_and_scores()
    with pytest.raises(ValueError, match="shape"):
        metrics.feature_auroc(accessibility, scores[:, :-1])
    with pytest.raises(ValueError, match="shape"):
        metrics.cell_auroc(accessibility, lambda a, b: scores[a:b, :-1])
    scores[3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        metrics.feature_auroc(accessibility, scores)


def test_translation_scores():
    rng = np.random.default_rng(0)
    rate = np.repeat([0.02, 0.3, 0.6, 0.99], 50)
    accessibility = sparse.csc_array((rng.random((200, 200)) < rate).astype(np.int8))
    constant = np.broadcast_to(rate, accessibility.shape)
    scores = metrics.translation_scores(accessibility, constant)
    counts = accessibility.sum(axis=0)
    used = (counts >= 10) & (counts <= 190)
    assert scores["n_peaks"] == used.sum() and 100 <= used.sum() < 150
    assert scores["n_cells"] == 200
    assert scores["peak_auroc"] == 0.5  # a constant tells no cell from another…
    assert scores["cell_auroc"] > 0.85  # …and still orders the peaks of each
    perfect = accessibility.toarray().astype(np.float32)
    assert metrics.translation_scores(accessibility, perfect)["peak_auroc"] == 1
    assert metrics.translation_scores(accessibility, 1 - perfect)["cell_auroc"] == 0
    functions = metrics.translation_scores(
        accessibility, lambda a, b: constant[:, a:b], cell_scores=lambda a, b: constant[a:b]
    )
    assert functions == scores
    with pytest.raises(ValueError, match="cell_scores"):
        metrics.translation_scores(accessibility, lambda a, b: constant[:, a:b])
    nothing = metrics.translation_scores(accessibility, constant, min_open=101)
    assert nothing["n_peaks"] == 0 and np.isnan(nothing["peak_auroc"])
