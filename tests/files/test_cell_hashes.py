"""Hashes of cells: a function of the values alone, which any change of them changes."""

from itertools import pairwise

import numpy as np
from scipy.sparse import csr_matrix, vstack

from utils.files.cell_hashes import cell_hashes

CELLS = csr_matrix(np.random.default_rng(0).poisson(0.4, (50, 30)).astype(np.float32))


def test_a_hash_is_of_the_cells_values_alone():
    hashes = cell_hashes(CELLS)
    assert hashes.dtype == np.uint64
    assert len(set(hashes.tolist())) == 50
    order = np.random.default_rng(1).permutation(50)
    assert np.array_equal(cell_hashes(CELLS[order]), hashes[order])
    assert np.array_equal(cell_hashes(csr_matrix(vstack([CELLS[:7], CELLS[7:]]))), hashes)
    unsorted = CELLS.copy()
    for start, stop in pairwise(unsorted.indptr):
        for part in (unsorted.indices, unsorted.data):
            part[start:stop] = part[start:stop][::-1].copy()
    assert np.array_equal(cell_hashes(unsorted), hashes)
    assert np.array_equal(cell_hashes(CELLS.astype(np.float64)), hashes)
    assert cell_hashes(csr_matrix((2, 30), dtype=np.float32)).tolist() == [0, 0]


def test_stored_zeros_do_not_count():
    with_zeros = CELLS.copy()
    with_zeros.data[::3] = 0
    without = with_zeros.copy()
    without.eliminate_zeros()
    assert np.array_equal(cell_hashes(with_zeros), cell_hashes(without))


def test_any_change_of_a_value_or_of_its_place_is_noticed():
    hashes = cell_hashes(CELLS)
    dense = CELLS.toarray()
    for cell in range(50):
        for changed in (
            dense[cell] + (np.arange(30) == cell % 30),
            np.roll(dense[cell], 1),
            np.nextafter(dense[cell], 9),
        ):
            assert cell_hashes(csr_matrix(changed.astype(np.float32)))[0] != hashes[cell]
