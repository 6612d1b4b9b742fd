"""Spreading a classifier's probabilities over near cells."""

import numpy as np
import pytest

from utils.evaluate import label_spreading
from utils.evaluate.label_spreading import NEIGHBOURS, STEPS, WEIGHT, spread_labels


def clusters(n: int = 300, seed: int = 0):
    """Two clusters of cells, a classifier's noisy probabilities, and five labels of each."""
    draw = np.random.default_rng(seed)
    truth = np.repeat([0, 1], n)
    points = draw.normal(size=(2 * n, 4)) + 4 * truth[:, None]
    p = np.clip(0.5 + 0.15 * (2 * truth - 1) + draw.normal(scale=0.25, size=2 * n), 0.01, 0.99)
    known = np.full(2 * n, -1)
    known[[*range(5), *range(n, n + 5)]] = [0] * 5 + [1] * 5
    return points, np.stack([1 - p, p], axis=1), known, truth


def test_each_step_is_the_formula_and_labels_stay():
    """The same as with a dense matrix of neighbours."""
    points, start, known, _ = clusters(30)
    start[known >= 0] = np.eye(2)[known[known >= 0]]
    distance = np.square(points[:, None] - points).sum(2) + np.diag(np.full(len(points), np.inf))
    near = np.zeros((len(points), len(points)))
    np.put_along_axis(near, distance.argsort(1)[:, :NEIGHBOURS], 1 / NEIGHBOURS, axis=1)
    expected = start
    for _ in range(STEPS):
        expected = (1 - WEIGHT) * start + WEIGHT * near @ expected
        expected[known >= 0] = start[known >= 0]
    found = spread_labels(start, points, known)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_allclose(found.sum(1), 1)
    np.testing.assert_array_equal(found[known >= 0], np.eye(2)[known[known >= 0]])


@pytest.mark.parametrize("most", [20_000, 200])
def test_clusters_mend_what_a_classifier_gets_wrong(most, monkeypatch):
    """Also where neighbours are looked for among a part of the cells, which then get the others' labels, too."""
    monkeypatch.setattr(label_spreading, "MOST", most)
    points, start, known, truth = clusters()
    right = lambda p: (p.argmax(1) == truth)[known < 0].mean()
    assert right(start) < 0.8 < 0.99 <= right(spread_labels(start, points, known))
    np.testing.assert_array_equal(spread_labels(start, points, known), spread_labels(start, points, known))


def test_one_cell_and_cells_without_any_label():
    points, start, known, truth = clusters()
    np.testing.assert_array_equal(spread_labels(start[:1], points[:1], np.array([-1])), start[:1])
    assert (spread_labels(start, points, np.full(len(known), -1)).argmax(1) == truth).mean() > 0.99
