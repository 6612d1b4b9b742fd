"""Calibration across batches: folds, and what sets hold in batches left out."""

import numpy as np
import pytest

from utils.errors import UserError
from utils.evaluate.across import LeftOut, batch_folds, coverage_across, coverage_by_place, coverage_text


def test_batches_are_shared_among_three_folds_of_about_equal_size():
    batches = np.repeat(["a", "b", "c", "d", "e"], [50, 30, 20, 15, 10])
    folds = batch_folds(batches, "--flag")
    assert sorted(name for fold in folds for name in fold) == ["a", "b", "c", "d", "e"]
    sizes = [sum((batches == name).sum() for name in fold) for fold in folds]
    assert len(folds) == 3 and max(sizes) - min(sizes) <= 20
    assert batch_folds(np.array(["x", "y", "x"]), "--flag") == [["x"], ["y"]]


@pytest.mark.parametrize("batches", [["x", "x"], []])
def test_one_batch_is_refused(batches):
    with pytest.raises(UserError, match="--calibrate_across batch"):
        batch_folds(np.array(batches, dtype=object), "--calibrate_across batch")


@pytest.fixture
def left_out():
    """20 cells of fold 0 (batch a) and 30 of fold 1 (batches b and c), with two types."""
    fold, batch = np.repeat([0, 1], [20, 30]), np.repeat(["a", "b", "c"], [20, 20, 10])
    labels = np.arange(50) % 2
    return LeftOut("batch", batch, fold, np.eye(2)[labels], labels, np.zeros(0))


def test_sets_of_a_fold_come_from_the_other_folds(left_out):
    """Each set holds the number of cells that it was fitted on: sets from one's own fold would hold another."""
    seen = []

    def sets_from(logits, labels, others):
        seen.append((len(labels), len(others)))
        return others > 0 if len(labels) == 30 else np.ones_like(others, dtype=bool)

    over_all, by_batch = coverage_across(left_out, sets_from)
    assert seen == [(30, 20), (20, 30)]
    assert over_all == {"n_cells": 50, "set_coverage": 1.0, "set_size": pytest.approx((20 + 60) / 50)}
    assert [(row["batch"], row["n_cells"], row["set_size"]) for row in by_batch] == [
        ("a", 20, 1),
        ("b", 20, 2),
        ("c", 10, 2),
    ]
    assert coverage_across(left_out, lambda *_: None) == ({}, [])


def test_coverage_within_and_across():
    sets, labels = np.array([[True, False]] * 8), np.array([0, 0, 0, 1, 0, 1, 1, -1])
    known = np.array([True] * 4 + [False] * 4)
    assert coverage_by_place(sets, labels, known) == {"set_coverage_within": 0.75, "set_coverage_across": 0.25}
    assert coverage_by_place(sets, labels, np.ones(8, bool)) == {"set_coverage_within": 0.5}


def test_the_text_names_both_coverages_and_the_worst_batch(left_out):
    over_all, by_batch = coverage_across(left_out, lambda logits, labels, others: others > 0)
    by_batch[1]["set_coverage"] = 0.7
    within = {"n_cells": 9, "set_coverage": 0.98, "set_size": 1.5}
    text = coverage_text(
        {"column": "batch", "coverage": 0.9, "within": within, "across": over_all, "batches": by_batch}
    )
    assert all(word in text for word in ("98.0%", "100.0%", "50", "b (70.0%)"))
