"""Prediction sets hold the truth as often as they promise, on cells that are exchangeable with the held-out ones."""

import json

import numpy as np
import pytest

from utils.evaluate.conformal import (
    ENOUGH_TO_CHOOSE,
    MIN_CELLS,
    MIN_PER_CLASS,
    check_sets,
    fit_sets,
    nonconformity,
    prediction_sets,
    quantile,
    set_scores,
    sets_as_text,
    types_of,
)


def made(n: int, seed: int, n_classes: int = 4, size=None, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of an over-confident classifier [n, classes], and labels [n]; class 0 is the hardest."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(n_classes, n, p=size)
    logits = rng.normal(size=(n, n_classes)) * noise
    logits[np.arange(n), labels] += np.where(labels == 0, 0.5, 3.0)
    share = np.exp(3 * logits)
    return (share / share.sum(1, keepdims=True)).astype(np.float32), labels


def within(share: float, level: float, n_held_out: int, n_new: int) -> bool:
    """Whether a coverage is within four standard errors, of the held-out and of the new cells, of its level."""
    return abs(share - level) < 4 * np.sqrt(level * (1 - level) * (1 / n_held_out + 1 / n_new)) + 1 / n_held_out


@pytest.mark.parametrize("level", [0.6, 0.9, 0.95])
@pytest.mark.parametrize("score", ["probability", "cumulated"])
def test_coverage_is_the_level(level, score):
    probability, labels = made(1000, 0)
    found = nonconformity(probability, score)[np.arange(1000), labels]
    new, truth = made(20_000, 1)
    holds = nonconformity(new, score)[np.arange(20_000), truth] <= quantile(found, level)
    assert within(holds.mean(), level, 1000, 20_000)


@pytest.mark.parametrize("level", [0.6, 0.9])
def test_coverage_of_the_sets(level):
    """As promised without the most likely class; with it, at least that, and no set is empty."""
    fitted = fit_sets(*made(2000, 0))
    new, truth = made(20_000, 1)
    bare = prediction_sets(fitted, new, level, keep_best=False)
    assert fitted["n_cells"] == 1000 and within(set_scores(bare, truth)["set_coverage"], level, 1000, 20_000)
    full = prediction_sets(fitted, new, level)
    assert full.any(1).all() and full[np.arange(20_000), new.argmax(1)].all() and (full >= bare).all()
    assert set_scores(full, truth)["set_coverage"] >= set_scores(bare, truth)["set_coverage"]


def test_coverage_per_class_where_the_marginal_one_fails():
    fitted = fit_sets(*made(4000, 0))
    new, truth = made(20_000, 1)
    marginal, own = (prediction_sets(fitted, new, 0.9, per_class=per_class) for per_class in (False, True))
    assert set_scores(marginal, truth)["least_type_coverage"] < 0.85
    bare = prediction_sets(fitted, new, 0.9, per_class=True, keep_best=False)
    for number in range(4):
        mine = truth == number
        assert within(bare[mine, number].mean(), 0.9, 450, mine.sum())
    assert set_scores(own, truth)["least_type_coverage"] > 0.85


def test_coverage_is_exact_on_average_with_few_cells():
    """Nine cells at level 0.9: the largest score is the threshold, and one cell in ten exceeds it."""
    rng = np.random.default_rng(0)
    scores, new = rng.random((4000, 9)), rng.random(4000)
    holds = [value <= quantile(row, 0.9) for row, value in zip(scores, new, strict=True)]
    assert within(np.mean(holds), 0.9, 10**9, 4000)
    assert quantile(scores[0], 0.9) == scores[0].max() and quantile(scores[0], 0.91) == 1
    assert quantile(scores[0][:0], 0.5) == 1


def test_ties_only_add_types():
    """A coarse classifier gives few different probabilities: coverage may be higher, never lower."""
    coarse = lambda data: (np.round(data[0] * 4) / 4, data[1])
    fitted = fit_sets(*coarse(made(1000, 0)))
    sets = prediction_sets(fitted, coarse(made(10_000, 1))[0], 0.9)
    assert set_scores(sets, made(10_000, 1)[1])["set_coverage"] > 0.87
    equal = np.full((50, 4), 0.25)
    fitted = fit_sets(equal, np.arange(50) % 4)
    assert prediction_sets(fitted, equal, 0.9).all()  # nothing distinguishes the classes


@pytest.mark.parametrize("n", [0, 1, MIN_CELLS - 1])
def test_too_few_cells_fit_nothing(n):
    assert fit_sets(*made(n, 0)) is None


def test_fewer_cells_than_classes():
    probability, labels = made(MIN_CELLS, 0, n_classes=30)
    fitted = fit_sets(probability, labels)
    assert not fitted["class_threshold"]
    assert prediction_sets(fitted, made(5, 1, 30)[0], 0.99).all()  # ten cells cannot promise 0.99


def test_a_class_of_one_cell_has_the_threshold_of_all():
    probability, labels = made(150, 0, size=[0.0, 0.5, 0.5, 0.0])
    labels[0] = 0
    fitted = fit_sets(probability, labels)
    assert set(fitted["class_threshold"]) == {"1", "2"}
    sets = [prediction_sets(fitted, probability, 0.9, own, keep_best=False)[:, [0, 3]] for own in (False, True)]
    np.testing.assert_array_equal(*sets)


def test_the_score_is_chosen_on_other_cells_than_the_thresholds():
    for n, used in ((ENOUGH_TO_CHOOSE - 1, ENOUGH_TO_CHOOSE - 1), (ENOUGH_TO_CHOOSE, ENOUGH_TO_CHOOSE // 2)):
        assert fit_sets(*made(n, 0))["n_cells"] == used
    probability, labels = made(1000, 0)
    assert fit_sets(probability, labels) == fit_sets(probability, labels)


def test_what_was_fitted_survives_json_and_damage_is_found():
    fitted = json.loads(json.dumps(fit_sets(*made(400, 0)), allow_nan=False))
    check_sets(fitted)
    assert len(fitted["class_threshold"]) == 4 and MIN_PER_CLASS <= 50
    for damage in ({"score": "luck"}, {"threshold": [2.0] * 50}, {"threshold": [0.5]}, {"class_threshold": {"0": [0]}}):
        with pytest.raises(ValueError, match="prediction sets"):
            check_sets(fitted | damage)


def test_larger_levels_have_larger_sets():
    fitted, new = fit_sets(*made(400, 0)), made(500, 1)[0]
    sizes = [prediction_sets(fitted, new, level).sum() for level in (0.5, 0.7, 0.9, 0.901, 0.91, 0.99)]
    assert sizes == sorted(sizes) and sizes[3] == sizes[4]  # between two kept levels, the higher


def test_a_type_that_the_model_lacks_is_never_covered():
    sets = np.ones((4, 3), dtype=bool)
    assert set_scores(sets, np.array([0, -1, -1, 2]))["set_coverage"] == 0.5


@pytest.mark.parametrize(
    "names", [["B", "T, naive", "NK/T"], ["B; memory", "T", "x"], ["B\nnaive", "T", "x" * 200], ["[B", " T", '"q"']]
)
def test_sets_are_readable_back(names):
    probability = np.array([[0.2, 0.5, 0.3], [0.8, 0.1, 0.1], [0.1, 0.3, 0.6]])
    sets = np.array([[True, True, False], [True, False, False], [True, True, True]])
    read = [types_of(text) for text in sets_as_text(sets, probability, names)]
    assert read == [[names[1], names[0]], [names[0]], [names[2], names[1], names[0]]]
    assert types_of("") == []
    assert ("; " in sets_as_text(sets, probability, names)[0]) == (names[0] == "B" or names[0] == "B; memory")
