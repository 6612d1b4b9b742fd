"""Learning from few labels: which cells keep theirs."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from utils.cells.labels import limit_labels

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
