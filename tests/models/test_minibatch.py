"""Sparse cells: the ragged form against scipy."""

import numpy as np
import pytest
import torch
from scipy import sparse

from tests.models.helpers import (
    N_GENES,
    expression,
    minibatch,
    ragged,
)


@pytest.mark.parametrize(
    "lengths", [(3, 0, 5), (0, 4), (4, 0), (0,), (0, 0), (6,), ()], ids=lambda lengths: "-".join(map(str, lengths))
)
def test_ragged_agrees_with_scipy(lengths):
    dense = expression(lengths, 6)
    cells, csr = ragged(dense), sparse.csr_matrix(dense)
    assert len(cells) == len(lengths)
    assert cells.lengths.tolist() == list(lengths)
    assert cells.rows.tolist() == csr.tocoo().row.tolist()
    assert torch.equal(cells.dense(), torch.from_numpy(dense))

    indices, values, valid = cells.padded()
    assert indices.shape == values.shape == valid.shape == (len(lengths), max([1, *lengths]))
    assert valid.sum(1).tolist() == list(lengths)
    for b in range(len(lengths)):
        row = csr[b]
        assert indices[b, valid[b]].tolist() == row.indices.tolist()
        assert values[b, valid[b]].tolist() == row.data.tolist()
        assert (indices[b, ~valid[b]] == 0).all()
        assert (values[b, ~valid[b]] == 0).all()

    kept = cells.keep(cells.values > 3)
    assert torch.equal(kept.dense(), torch.from_numpy(np.where(dense > 3, dense, 0)))
    assert kept.offsets.tolist() == sparse.csr_matrix(np.where(dense > 3, dense, 0)).indptr.tolist()
    assert torch.equal(cells.keep(torch.ones_like(cells.indices, dtype=torch.bool)).dense(), cells.dense())
    assert cells.keep(torch.zeros_like(cells.indices, dtype=torch.bool)).lengths.tolist() == [0] * len(lengths)


def test_minibatch_moves_whole():
    batch = minibatch()
    moved = batch.to("meta")
    tensors = [moved.row, moved.key, moved.rna.values, moved.atac.offsets, moved.latent["rna"]]
    tensors += [moved.target["cell_type"]]
    assert all(tensor.is_meta for tensor in tensors)
    assert moved.step_cells == batch.step_cells
    assert moved.rna.width == N_GENES
    assert not batch.rna.values.is_meta
