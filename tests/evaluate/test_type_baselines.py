"""Baselines of cell types: each finds a planted signal and none in noise, on equal budgets, blind to test cells."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from tests.evaluate.marked_cells import cells
from utils.errors import UserError
from utils.evaluate import tuning
from utils.evaluate import type_baselines as baselines
from utils.evaluate.metrics import classification_scores
from utils.evaluate.type_baselines import FEW_LABEL_BASELINES, TYPE_BASELINES, Unlabelled, fewer, fit_all, own_labels

FITS = {name: fit for name, fit in (TYPE_BASELINES | FEW_LABEL_BASELINES).items() if name != "majority class"}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few settings and few steps, so that the tests are quick."""
    monkeypatch.setattr(tuning, "BUDGET", 6)
    monkeypatch.setattr("utils.evaluate.dropout_mlp.DENOISER_STEPS", 200)
    for axes, start in (
        (baselines.MLP_AXES, baselines.MLP_START),
        (baselines.DENOISER_AXES, baselines.DENOISER_START),
    ):
        monkeypatch.setitem(axes, "steps", (25, 50, 100))
        monkeypatch.setitem(start, "steps", 50)


@pytest.fixture(params=FITS)
def fit(request):
    return FITS[request.param]


def test_each_finds_the_markers_and_its_setting_is_the_best_it_tried(fit, monkeypatch):
    (x, y), (x_val, y_val), (x_test, y_test) = cells(600, 0), cells(300, 1), cells(600, 2)
    scored = []
    monkeypatch.setattr(
        baselines, "classification_scores", lambda *a: scored.append(classification_scores(*a)) or scored[-1]
    )
    model, tuned = fit(x, y, x_val, y_val)
    assert np.mean(model.predict(x_test) == y_test) > 0.9
    np.testing.assert_allclose(model.predict_proba(x_test).sum(axis=1), 1, rtol=1e-5)
    assert tuned.tried == 6 == len(scored)  # the same budget for each
    ours = classification_scores(y_val, model.predict(x_val))
    total = lambda scores: scores["accuracy"] + scores["macro_f1"]
    assert total(ours) == pytest.approx(max(map(total, scored)))


def test_permuted_labels_leave_chance(fit):
    (x, y), (x_val, y_val), (x_test, y_test) = cells(600, 0), cells(300, 1), cells(2000, 2)
    shuffle = np.random.default_rng(0).permutation
    model, _ = fit(x, shuffle(y), x_val, shuffle(y_val))
    per_type = classification_scores(y_test, model.predict(x_test))["balanced_accuracy"]
    assert 0.2 < per_type < 0.3  # of four types


def test_equal_seeds_give_equal_bits(fit):
    (x, y), (x_val, y_val), (x_test, _) = cells(200, 0), cells(100, 1), cells(100, 2)
    one, same = (fit(x, y, x_val, y_val)[0].predict_proba(x_test) for _ in range(2))
    assert (one == same).all()


@pytest.mark.parametrize("validation", ["none", "empty", "one class"])
def test_without_useful_validation_cells_the_start_is_taken(fit, validation):
    x, y = cells(60, 0)
    x_val, y_val = {"none": (None, None), "empty": (x[:0], y[:0]), "one class": (x[y == "T"], y[y == "T"])}[validation]
    model, tuned = fit(x, y, x_val, y_val)
    assert tuned.tried == 0 and set(model.predict(x)) <= set(y)


def test_odd_shapes(fit):
    x, y = cells(12, 3)
    model, tuned = fit(x, y, x, np.where(np.arange(12) < 6, "a type that training never saw", y))
    assert set(model.predict(x)) <= set(y) and tuned.tried > 0
    with pytest.raises(UserError, match="two cell types"):
        fit(x, ["T"] * 12)


def test_sparse_and_dense_values_give_the_same():
    (x, y), (x_val, y_val), (x_test, _) = cells(300, 0), cells(100, 1), cells(50, 2)
    for fit in (baselines.logistic_regression, baselines.pca_logistic_regression):
        (sparse_fit, one), (dense_fit, two) = fit(x, y, x_val, y_val), fit(x.toarray(), y, x_val.toarray(), y_val)
        assert one.setting == two.setting
        np.testing.assert_allclose(sparse_fit.predict_proba(x_test), dense_fit.predict_proba(x_test), atol=1e-3)


def test_balanced_weights_find_rare_types():
    """Rare types are found more often where the validation cells ask for it."""
    (x, y), (x_val, y_val) = cells(150, 0, noise=4), cells(3000, 1, noise=4)
    even = np.concatenate([np.flatnonzero(y_val == kind)[:60] for kind in np.unique(y_val)])
    _, for_even = baselines.logistic_regression(x, y, x_val[even], y_val[even])
    assert for_even.setting["balance"] >= 0.5


def test_a_best_number_of_neighbours_at_the_end_is_noted():
    (x, y), (x_val, y_val) = cells(60, 0, noise=3), cells(400, 1, noise=3)
    lines = []
    fits, _ = fit_all(x, y, x_val, y_val, say=lines.append)
    tuned = fits["nearest neighbours"][1]
    assert ("k" in tuned.at_end) == (tuned.setting["k"] in (1, 50))
    assert ("at an end" in lines[0]) == bool(tuned.at_end)


def test_all_rows_with_few_labels_and_without_unlabelled_cells():
    (x, y), (x_val, y_val), (x_test, y_test) = cells(800, 0), cells(300, 1), cells(600, 2)
    few = np.concatenate([np.flatnonzero(y == kind)[:6] for kind in np.unique(y)])
    rest, lines = np.setdiff1d(np.arange(len(y)), few), []
    fits, unlabelled = fit_all(x[few], y[few], x_val, y_val, x[rest], say=lines.append)
    assert fits.keys() == {"majority class"} | FITS.keys() | {f"{name}, self-trained" for name in FITS}
    assert len(lines) == len(fits) - 1 and unlabelled.x.shape[0] == 800
    right = {name: baselines._score(y_test, model.predict(x_test)) for name, (model, _) in fits.items()}
    assert min(right[name] for name in right if name.endswith("self-trained")) > 2 * right["majority class"]
    assert right["denoiser + MLP"] > right["MLP"]
    # A self-trained row learned from what the plain row predicts for the other cells. It was tuned for these labels as
    # they are and made better, and the better one on validation cells was kept.
    both, fit = sparse.vstack([x[few], x[rest]]), baselines.logistic_regression
    choices = own_labels(fits["logistic regression"][0], y[few], x_val, y_val, unlabelled)
    each = [fit(both, np.concatenate([y[few], own]), x_val, y_val) for own in choices]
    assert len(each) == 2 and each[0][1].score != each[1][1].score
    expected, best = max(each, key=lambda one: one[1].score)
    assert best.score == baselines._score(y_val, expected.predict(x_val))
    found, tuned = fits["logistic regression, self-trained"]
    assert tuned.tried == sum(one.tried for _, one in each) and tuned.setting == best.setting
    np.testing.assert_allclose(found.predict_proba(x_test), expected.predict_proba(x_test), atol=1e-6)
    assert fit_all(x[few], y[few], x_val, y_val, say=lines.append)[0].keys() == TYPE_BASELINES.keys()


def test_small_types_keep_their_cells_and_others_their_shares():
    _, y = cells(2000, 0)
    y[:3] = "rare"
    drawn = y[fewer(y, 300)]
    assert len(drawn) == 300 and (drawn == "rare").sum() == 3
    assert np.mean(drawn == "T") == pytest.approx(np.mean(y == "T"), abs=0.06)
    assert (fewer(y, 300) == fewer(y, 300)).all() and (fewer(y, 2000) == np.arange(2000)).all()


def test_majority_class():
    (x, y), (x_test, _) = cells(100, 0), cells(20, 1)
    model, setting = baselines.majority_class(x, y)
    assert set(model.predict(x_test)) == {"T"} and setting is None


@pytest.mark.parametrize("n_labelled", [60, 600])
def test_tuned_components_are_no_worse_than_the_usual_ones(n_labelled, monkeypatch):
    """A large spread without meaning hides the markers; whitened components and a grid of penalties find them."""
    monkeypatch.setattr(tuning, "BUDGET", 16)
    draw = np.random.default_rng(0)
    nuisance = draw.normal(size=120)

    def with_nuisance(x):
        return sparse.csr_matrix(np.maximum(x.toarray() + 3 * draw.normal(size=(x.shape[0], 1)) * nuisance, 0))

    (x_all, y_all), (x_val, y_val) = cells(600, 0), cells(300, 1)
    x_all, x_val = with_nuisance(x_all), with_nuisance(x_val)
    x, y, unlabelled = x_all[:n_labelled], y_all[:n_labelled], Unlabelled(x_all)
    _, tuned = baselines.pca_logistic_regression(x, y, x_val, y_val, unlabelled=unlabelled)
    total = lambda model: sum(classification_scores(y_val, model.predict(x_val))[n] for n in ("accuracy", "macro_f1"))
    setting = {"components": 50, "whitened": True, "balance": 0.5}
    transform = baselines._components(unlabelled.pca, x, setting)
    usual = [
        baselines.Fitted(
            transform, baselines._fit_logistic(LogisticRegression(max_iter=2000), transform(x), y, setting | {"C": c})
        )
        for c in baselines.C_GRID
    ]
    assert total(tuned.fit) >= max(map(total, usual)) > 1.2


def test_own_labels_are_also_corrected_for_the_shares_of_validation_cells():
    """Labels are even and cells are not: corrected labels are right more often than with the shares of the labels."""
    (x, y), (x_val, y_val) = cells(3000, 0, noise=2), cells(3000, 1, noise=2)
    kinds = np.unique(y)
    few = np.concatenate([np.flatnonzero(y == kind)[:10] for kind in kinds])
    drawn = lambda y: np.concatenate([np.flatnonzero(y == kind)[: 300 if kind == kinds[0] else 15] for kind in kinds])
    rest, val = np.setdiff1d(drawn(y), few), drawn(y_val)
    even = np.concatenate([np.flatnonzero(y_val == kind)[:60] for kind in kinds])
    fitted, _ = baselines.logistic_regression(x[few], y[few])
    unlabelled = Unlabelled(sparse.vstack([x[few], x[rest]]))

    def right(x_known, y_known) -> list[float]:
        choices = own_labels(fitted, y[few], x_known, y_known, unlabelled)
        np.testing.assert_array_equal(choices[0], fitted.predict(x[rest]))
        return [(own == y[rest]).mean() for own in choices]

    plain, with_shares = right(x_val[val], y_val[val])
    assert with_shares > plain + 0.05
    for x_known, y_known in ((x_val[even], y_val[even]), (x_val[:0], y_val[:0]), (None, None)):
        assert right(x_known, y_known)[-1] < with_shares - 0.02
