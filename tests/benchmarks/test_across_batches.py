"""benchmarks.across_batches: the rows of its table."""

import json

import numpy as np
import pytest

from benchmarks.across_batches import pooled, scores


def test_rows_are_those_of_the_evaluation(tmp_path):
    """The baseline has one row per test batch, and what it lacks stays empty."""
    found = {"n_cells": 9, "scmomer": {"accuracy": 0.9, "novel": 0.1}, "logistic regression": {"accuracy": 0.8}}
    (tmp_path / "evaluation_test.json").write_text(json.dumps(found))
    model, baseline = scores(tmp_path, "3pv1", "")
    assert (model["method"], model["accuracy"], model["novel"], model["cells"]) == ("scMomer", 0.9, 0.1, 9)
    assert (baseline["method"], baseline["accuracy"], baseline["novel"]) == ("logistic regression", 0.8, None)
    (across,) = scores(tmp_path, "3pv1", "--calibrate_across batch")
    assert across["method"] == "scMomer, across"


def test_doubts_are_pooled_over_batches():
    """Agreement knows the errors of one batch and confidence those of the other; only both know all."""
    wrong = np.array([True, True, False, False, False, False])
    known, flat = np.where(wrong, 0.5, 1.0), np.full(6, 1.0)
    found = pooled({"x": (wrong, flat, known), "y": (wrong, known, flat)}, seed=0)
    assert found["both"]["auroc"] == 1 and found["agreement"]["auroc"] == found["confidence"]["auroc"] == 0.75
    assert found["accuracy at 0.5"] == [0.0, 2] and found["accuracy at 1"] == [pytest.approx(0.8), 10]
    assert found["agreement"]["95%"][0] < 0.75 < found["agreement"]["95%"][1]
