"""New cells are read when they are asked for: any of them, in any order, with the values that all have together."""

import numpy as np
import pytest

from utils.cells.config import IngestConfig
from utils.cells.preprocessed import read_raw
from utils.files import disk_matrix
from utils.predict import query as module
from utils.predict.query import read_query
from utils.train.model_folder import load_model


@pytest.fixture
def query(raw_file, runs):
    with read_raw(raw_file) as file:
        yield read_query(file, load_model(runs["multimodal"], "multimodal"), IngestConfig())


def test_cells_in_any_order_have_their_values(query, cells, monkeypatch):
    monkeypatch.setattr(disk_matrix, "BLOCK", 300)  # several blocks of the file
    rows = np.random.default_rng(0).permutation(len(query))[:31]
    part = query.take(rows).take(np.arange(20))
    dataset = part.dataset()
    assert list(dataset.barcodes) == list(query.barcodes[rows[:20]]) and part.empty.shape == (20,)
    for name in ("rna", "atac"):
        at = cells.obs.index.get_indexer(dataset.barcodes)
        np.testing.assert_array_equal(dataset.values[name].toarray(), cells.values[name][at].toarray())


def test_no_cells(query):
    nothing = query.take(np.array([], dtype=int))
    assert nothing.values("rna").shape == (0, 60) and len(nothing.dataset()) == 0
    assert len(nothing) == 0 and nothing.blocks() == [] and not nothing.empty.any()


@pytest.mark.parametrize(
    ("size", "n_shares", "sizes"), [(4096, 1, {96}), (50, 1, {48}), (7, 2, {7, 5}), (96, 5, {20, 16})]
)
def test_blocks_hold_every_cell_once_and_are_alike(size, n_shares, sizes, query, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_CELLS", size)
    blocks = query.blocks(n_shares)
    np.testing.assert_array_equal(np.concatenate(blocks), np.arange(96))
    assert {len(block) for block in blocks} == sizes and len(blocks) % n_shares in (0, n_shares - 1)


def test_cells_with_many_values_come_in_smaller_blocks(query, monkeypatch):
    whole = len(query.blocks())
    monkeypatch.setattr(disk_matrix, "BLOCK", 100)  # values, of which each cell has about 30
    assert len(query.blocks()) > 4 * whole
