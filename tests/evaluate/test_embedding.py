"""Embedding scores: high where types lie apart and batches mix, low where not."""

import numpy as np
import pytest

from utils.evaluate.embedding import embedding_scores


def embedding(type_distance: float, batch_distance: float, n: int = 300):
    rng = np.random.default_rng(0)
    labels, batches = rng.integers(0, 3, n), rng.integers(0, 2, n)
    centres = np.eye(5)[:3] * type_distance
    return rng.normal(size=(n, 5)) + centres[labels] + batch_distance * np.eye(5)[4] * batches[:, None], labels, batches


def test_types_apart_and_batches_mixed_score_high():
    good, poor = embedding_scores(*embedding(12, 0)), embedding_scores(*embedding(0, 12))
    assert good["ari"] == good["nmi"] == 1 and good["silhouette"] > 0.85 and good["batch_mixing"] > 0.95
    assert poor["ari"] < 0.1 and poor["nmi"] < 0.1 and poor["silhouette"] < 0.55 and poor["batch_mixing"] < 0.4


def test_scores_do_not_depend_on_names_or_order():
    points, labels, batches = embedding(4, 1)
    order = np.random.default_rng(1).permutation(len(labels))
    named = np.array(["c", "a", "b"])[labels]
    ours, theirs = (
        embedding_scores(points, labels, batches),
        embedding_scores(points[order], named[order], batches[order]),
    )
    for name, value in ours.items():
        assert theirs[name] == pytest.approx(value, abs=0.02)


@pytest.mark.parametrize(
    ("labels", "batches"), [([0] * 20, None), (range(20), [0] * 20)], ids=["one type", "one batch"]
)
def test_what_cannot_be_scored_is_nan(labels, batches):
    scores = embedding_scores(np.random.default_rng(0).normal(size=(20, 3)), list(labels), batches)
    assert all(np.isnan(value) for value in scores.values())


def test_many_cells_are_sampled(monkeypatch):
    points, labels, batches = embedding(6, 0, n=2000)
    whole = embedding_scores(points, labels, batches)
    monkeypatch.setattr("utils.evaluate.embedding.MAX_CELLS", 500)
    part = embedding_scores(points, labels, batches)
    assert part != whole
    assert all(part[name] == pytest.approx(value, abs=0.05) for name, value in whole.items())
