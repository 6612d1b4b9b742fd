"""Learning from few labels: which cells keep theirs."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from utils.cells.labels import limit_labels, share_ratios

SIZES = {0: 60, 1: 12, 2: 3}


@pytest.fixture
def codes() -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat([*SIZES, -1], [*SIZES.values(), 10]))


def cells(codes, order=slice(None)):
    """Two thirds are training cells, drawn by barcode."""
    barcodes = np.array([f"cell{i}" for i in range(len(codes))])
    split = np.where(np.arange(len(codes)) % 3 == 0, "test", "train")[order]
    return SimpleNamespace(obs=pd.DataFrame(index=barcodes[order]), rows=lambda name: np.flatnonzero(split == name))


@pytest.mark.parametrize("per_type", [1, 5, 30])
def test_at_most_so_many_training_cells_of_a_type_keep_their_label(codes, per_type):
    kept = limit_labels(codes, cells(codes), per_type, 0)
    train, test = cells(codes).rows("train"), cells(codes).rows("test")
    for code in SIZES:
        assert (kept[train] == code).sum() == min(per_type, (codes[train] == code).sum())
    assert ((kept == codes) | (kept == -1)).all() and (kept[test] == codes[test]).all()


def test_zero_is_all(codes):
    assert limit_labels(codes, cells(codes), 0, 0) is codes


def test_the_draw_follows_the_seed_and_the_barcodes_alone(codes):
    kept = limit_labels(codes, cells(codes), 5, 0)
    assert not np.array_equal(kept, limit_labels(codes, cells(codes), 5, 1))
    order = np.random.default_rng(1).permutation(len(codes))
    assert np.array_equal(limit_labels(codes[order], cells(codes, order), 5, 0), kept[order])


def test_ratios_of_shares_by_hand():
    """Half of 20 training cells are of each class, and 90 and 8 of 98 validation cells; two more are half and half."""
    train, val = np.repeat([0, 1], 10), np.repeat([0, 1], [90, 8])
    np.testing.assert_allclose(share_ratios(train, val, 2), [0.91 / 0.5, 0.09 / 0.5])
    np.testing.assert_allclose(share_ratios(train, val[:0], 2), 1)
    np.testing.assert_allclose(share_ratios(train, train, 2), 1)


def test_ratios_of_shares_make_a_classifier_right_where_classes_have_other_shares():
    """Bayes' rule: probabilities learned on even classes, times the ratios, are those of the uneven ones."""
    density = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])  # of three values, in two classes
    even = density / density.sum(0)
    uneven = density * [[0.8], [0.2]] / (density * [[0.8], [0.2]]).sum(0)
    ratios = share_ratios(np.repeat([0, 1], 50), np.repeat([0, 1], [80_000, 20_000]), 2)
    corrected = even * ratios[:, None]
    np.testing.assert_allclose(corrected / corrected.sum(0), uneven, atol=1e-4)
