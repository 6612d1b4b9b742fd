"""A method against the best baseline: the difference, and an interval that pairs the cells."""

import numpy as np
import pytest

from utils.evaluate.comparison import compare_types
from utils.evaluate.metrics import classification_scores


def test_the_best_baseline_is_compared_on_the_same_cells():
    draw = np.random.default_rng(0)
    true = draw.choice(["a", "b", "c"], 600, p=[0.6, 0.3, 0.1]).astype(object)
    mistaken = lambda labels, rows: np.where(rows, "a", labels)
    wrong = draw.random(600)
    predicted = {"ours": mistaken(true, wrong < 0.2), "bad": mistaken(true, wrong < 0.9)}
    predicted |= {"good": mistaken(true, wrong < 0.25)}
    found = compare_types(true, predicted, "ours", ["bad", "good"])
    assert [row["score"] for row in found] == ["accuracy", "macro_f1"]
    for row in found:
        ours, theirs = (classification_scores(true, predicted[name])[row["score"]] for name in ("ours", "good"))
        assert row["baseline"] == "good" and row["ours"] == ours and row["theirs"] == theirs
        low, high = row["difference_95%"]
        assert row["difference"] == pytest.approx(ours - theirs) and 0 < low < row["difference"] < high
    # Paired: both err on the same cells, so the interval is far narrower than that of independent errors.
    independent = predicted | {"good": mistaken(true, draw.random(600) < 0.25)}
    wide = compare_types(true, independent, "ours", ["bad", "good"])[0]["difference_95%"]
    assert wide[1] - wide[0] > 1.5 * np.diff(found[0]["difference_95%"]).item()
    assert compare_types(true, predicted, "ours", ["good"]) == found[:2]
    same = compare_types(true, predicted | {"good": predicted["ours"]}, "ours", ["good"])
    assert all(row["difference_95%"] == (0, 0) for row in same)
