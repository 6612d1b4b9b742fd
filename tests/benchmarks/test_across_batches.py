"""benchmarks.across_batches: the rows of its table."""

import json

from benchmarks.across_batches import scores


def test_rows_are_those_of_the_evaluation(tmp_path):
    """The baseline has one row per test batch, and what it lacks stays empty."""
    found = {"n_cells": 9, "scmomer": {"accuracy": 0.9, "novel": 0.1}, "logistic regression": {"accuracy": 0.8}}
    (tmp_path / "evaluation_test.json").write_text(json.dumps(found))
    model, baseline = scores(tmp_path, "3pv1", "")
    assert (model["method"], model["accuracy"], model["novel"], model["cells"]) == ("scMomer", 0.9, 0.1, 9)
    assert (baseline["method"], baseline["accuracy"], baseline["novel"]) == ("logistic regression", 0.8, None)
    (across,) = scores(tmp_path, "3pv1", "--calibrate_across batch")
    assert across["method"] == "scMomer, across"
