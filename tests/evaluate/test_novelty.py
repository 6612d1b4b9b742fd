"""p-values of novelty are uniform for exchangeable cells, and small for cells of a kind that was not trained on."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from utils.evaluate.novelty import (
    BLOCK,
    MIN_CELLS,
    N_REFERENCE,
    N_SCORES,
    check_novelty,
    energy,
    fit_novelty,
    mahalanobis_distance,
    neighbour_distance,
    novelty_p_values,
    p_values,
    unit,
)

CENTRES = np.random.default_rng(99).normal(size=(5, 16)) * 3


def made(n: int, seed: int, kinds=(0, 1, 2)) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [n, 16] around the centres of some kinds, and the kinds [n]."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(kinds, n)
    return (CENTRES[labels] + rng.normal(size=(n, 16))).astype(np.float32), labels


def test_p_values_are_uniform_for_exchangeable_cells():
    fitted = fit_novelty(made(3000, 0)[0], made(900, 1)[0])
    p = novelty_p_values(fitted, made(5000, 2)[0])
    for level in (0.05, 0.2, 0.5, 0.8):
        assert abs((p <= level).mean() - level) < 4 * np.sqrt(level * (1 - level) * (1 / 900 + 1 / 5000))
    assert p.min() >= 1 / 901 and p.max() <= 1


def test_p_values_are_small_for_a_planted_cluster():
    fitted = fit_novelty(made(600, 0)[0], made(300, 1)[0])
    p = novelty_p_values(fitted, made(400, 2, kinds=(3, 4))[0])
    assert (p < 0.05).mean() > 0.9


def test_few_held_out_cells_are_never_surprised_too_often():
    """Valid for any number of held-out cells, on average over draws of them."""
    rng = np.random.default_rng(0)
    for n in (1, 5, 30):
        p = np.concatenate([p_values(rng.random(n), rng.random(50)) for _ in range(400)])
        for level in (0.05, 0.3):
            assert (p <= level).mean() <= level + 0.02


def test_ties_count_against_novelty():
    np.testing.assert_allclose(p_values(np.ones(9), np.array([1.0, 0.5, 2.0])), [1, 1, 0.1])


@pytest.mark.parametrize(("n_train", "n_val"), [(100, 0), (100, 1), (100, MIN_CELLS - 1), (0, 100)])
def test_too_few_cells_fit_nothing(n_train, n_val):
    assert fit_novelty(made(n_train, 0)[0], made(n_val, 1)[0]) is None


def test_what_is_kept_is_small_and_survives_json():
    fitted = json.loads(json.dumps(fit_novelty(made(5000, 0)[0], made(4000, 1)[0]), allow_nan=False))
    assert fitted["shape"] == [N_REFERENCE, 16] and len(fitted["held_out"]) == fitted["n_cells"] == N_SCORES
    check_novelty(fitted)
    assert len(json.dumps(fitted)) < 80_000
    for damage in ({"held_out": [1.0]}, {"held_out": [float("nan")] * 30}, {"shape": [3, 3]}, {"reference": "?"}):
        with pytest.raises(ValueError):
            check_novelty(fitted | damage)


def test_bytes_are_precise_enough():
    train, val, new = made(1000, 0)[0], made(300, 1)[0], made(500, 2, kinds=(0, 1, 3))[0]
    exact = p_values(neighbour_distance(unit(train), unit(val)), neighbour_distance(unit(train), unit(new)))
    assert np.abs(novelty_p_values(fit_novelty(train, val), new) - exact).max() < 0.03


def test_a_cells_p_value_does_not_depend_on_the_others():
    fitted = fit_novelty(made(300, 0)[0], made(100, 1)[0])
    new = made(BLOCK + 100, 2)[0]
    expected = novelty_p_values(fitted, new)
    for rows in ([0], [5, 3], np.arange(BLOCK, BLOCK + 100), np.random.default_rng(0).permutation(len(new))):
        np.testing.assert_array_equal(novelty_p_values(fitted, new[rows]), expected[rows])


def test_a_known_cell_ties_with_itself_wherever_it_stands():
    """Of 300 held-out cells of width 128, the i-th nearest has the p-value (1 + those at least as far) / 301."""
    train, val = np.random.default_rng(0).normal(size=(2, 300, 128)).astype(np.float32)
    fitted = fit_novelty(train, val)
    p = novelty_p_values(fitted, val)
    np.testing.assert_allclose(np.sort(p), np.arange(2, 302) / 301)
    turned = np.random.default_rng(1).permutation(300)
    np.testing.assert_array_equal(novelty_p_values(fitted, val[turned]), p[turned])
    np.testing.assert_array_equal([novelty_p_values(fitted, val[i : i + 1])[0] for i in range(300)], p)


def test_neighbours_are_those_of_a_plain_search():
    train, new = made(50, 0)[0], made(20, 1)[0]
    distance = np.sort(np.linalg.norm(new[:, None] - train, axis=2), axis=1)
    np.testing.assert_allclose(neighbour_distance(train, new, 4), distance[:, :4].mean(1), rtol=1e-5)
    two = np.linalg.norm(new[:, None] - train[:2], axis=2).mean(1)
    np.testing.assert_allclose(neighbour_distance(train[:2], new, 4), two, rtol=1e-5)  # fewer cells than neighbours


def test_every_score_finds_a_planted_cluster():
    train, labels = made(600, 0)
    known, novel = made(300, 1)[0], made(300, 2, kinds=(3, 4))[0]
    cells, truth = np.vstack([known, novel]), np.repeat([0, 1], 300)
    logits = -np.square(cells[:, None] - CENTRES[:3]).sum(2) / 2
    for score in (
        neighbour_distance(train, cells),
        mahalanobis_distance(train, labels, cells),
        energy(logits),
    ):
        assert roc_auc_score(truth, score) > 0.95
