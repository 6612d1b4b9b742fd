"""Cells read past HDF5, one minibatch at a time, equal those of the file."""

import os
import shutil

import anndata as ad
import h5py
import mudata
import numpy as np
import pytest
from scipy import sparse

from utils.cells.minibatches import Plan
from utils.errors import UserError
from utils.files.disk_rows import BLOCK_CELLS, FileRows, row_lengths, select, shuffled, side_by_side

N_CELLS, N_GENES = 300, 500


@pytest.fixture(scope="module")
def matrix():
    return sparse.random(N_CELLS, N_GENES, 0.1, "csr", np.float32, np.random.default_rng(0))


def write(path, matrix, values_chunks, indices_chunks, dtype=np.float32):
    """Write a CSR group as anndata does; chunks None makes a contiguous dataset."""
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["shape"] = matrix.shape
        group.create_dataset("data", data=matrix.data.astype(dtype), chunks=values_chunks)
        group.create_dataset("indices", data=matrix.indices, chunks=indices_chunks)
        group.create_dataset("indptr", data=matrix.indptr)
    return path


def open_rows(path):
    with h5py.File(path) as file:
        return FileRows(file["X"], path)


@pytest.mark.parametrize("chunks", [None, 7, 1000, 2**20], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_rows_in_any_order_equal_those_of_the_matrix(matrix, tmp_path, chunks, dtype):
    matrix = (matrix * 10).ceil()
    extents = None if chunks is None else (min(chunks, matrix.nnz),)
    rows = open_rows(write(tmp_path / "x.h5", matrix, extents, (100,), dtype))
    wanted = np.random.default_rng(1).integers(0, N_CELLS, 64)
    assert rows[wanted].dtype == np.float32
    assert (rows[wanted] != matrix[wanted]).nnz == 0
    part = rows.take(np.arange(250, 20, -3))
    np.testing.assert_array_equal(part.lengths, np.diff(matrix[np.arange(250, 20, -3)].indptr))
    assert (part[5:9] != matrix[np.arange(250, 20, -3)][5:9]).nnz == 0
    assert (part.take(np.array([2, 0]))[:] != matrix[[244, 250]]).nnz == 0
    assert rows[np.array([], dtype=int)].shape == (0, N_GENES)


def test_rows_equal_what_anndata_reads(matrix, tmp_path):
    ad.AnnData(matrix).write(tmp_path / "x.h5ad")
    rows = open_rows(tmp_path / "x.h5ad")
    assert (rows[:] != ad.read_h5ad(tmp_path / "x.h5ad").X).nnz == 0
    assert (select(rows, np.arange(9))[:] != select(matrix, np.arange(9))).nnz == 0
    np.testing.assert_array_equal(row_lengths(rows), row_lengths(matrix))


def test_rows_of_a_multiome_file(matrix, tmp_path):
    """mudata writes 512 bytes before the HDF5 data, which move all offsets."""
    mudata.MuData({"rna": ad.AnnData(matrix), "atac": ad.AnnData(matrix * 2)}).write(tmp_path / "x.h5mu")
    with h5py.File(tmp_path / "x.h5mu") as file:
        assert file.userblock_size == 512
        parts = [FileRows(file["mod"][name]["X"], tmp_path / "x.h5mu") for name in ("rna", "atac")]
    wanted = np.random.default_rng(1).permutation(N_CELLS)
    assert (parts[0][wanted] != matrix[wanted]).nnz == 0
    assert (parts[1][wanted] != 2 * matrix[wanted]).nnz == 0


def test_entries_are_sorted_and_zeros_dropped(tmp_path):
    odd = sparse.csr_matrix((np.float32([1, 2, 0, 4]), [3, 1, 0, 2], [0, 2, 4]), shape=(2, 5))
    rows = open_rows(write(tmp_path / "x.h5", odd, None, None))
    assert rows[:].indices.tolist() == [1, 3, 2]
    assert rows[:].data.tolist() == [2, 1, 4]


def test_a_compressed_matrix_is_refused(matrix, tmp_path):
    ad.AnnData(matrix).write(tmp_path / "x.h5ad", compression="gzip")
    with pytest.raises(ValueError, match="plain"):
        open_rows(tmp_path / "x.h5ad")


def test_a_file_that_was_overwritten_is_refused(matrix, tmp_path):
    rows = open_rows(write(tmp_path / "x.h5", matrix, (100,), (100,)))
    shutil.copyfile(write(tmp_path / "y.h5", matrix * 2, (100,), (100,)), tmp_path / "x.h5")
    with pytest.raises(UserError, match=r"x\.h5: is damaged .*written to"):
        rows[:]


def test_a_matrix_in_another_file_is_refused(matrix, tmp_path):
    write(tmp_path / "y.h5", matrix, (100,), (100,))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["X"] = h5py.ExternalLink(str(tmp_path / "y.h5"), "X")
    with pytest.raises(ValueError, match="another file"):
        open_rows(tmp_path / "x.h5")


def test_a_replaced_file_can_still_be_read(matrix, tmp_path):
    rows = open_rows(write(tmp_path / "x.h5", matrix, (100,), (100,)))
    os.replace(write(tmp_path / "y.h5", matrix * 2, (100,), (100,)), tmp_path / "x.h5")
    assert (rows[:] != matrix).nnz == 0


def test_damage_is_reported_with_the_file(matrix, tmp_path):
    path = write(tmp_path / "x.h5", matrix, (100,), (100,))
    rows = open_rows(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"x\.h5: is damaged"):
        rows[:]
    with pytest.raises(UserError, match=r"x\.h5: is damaged"):
        cut = open_rows(write(tmp_path / "z.h5", matrix, (100,), (100,)))
        os.truncate(tmp_path / "z.h5", path.stat().st_size)
        cut.path, cut._identity = rows.path, cut._identify()
        cut[:]
    outside = matrix.copy()
    outside.indices[7] = N_GENES
    with pytest.raises(UserError, match=r"y\.h5: is damaged .*outside"):
        open_rows(write(tmp_path / "y.h5", outside, (100,), (100,)))[:]


@pytest.mark.parametrize("n", [5, 1000, 1001, 5003])
def test_the_shuffled_order_keeps_blocks_together(n):
    order = shuffled(n, np.random.default_rng(0), window=1000)
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    np.testing.assert_array_equal(order, shuffled(n, np.random.default_rng(0), window=1000))
    windows = [order[start : start + 1000] for start in range(0, n, 1000)]
    for window in [window for window in windows if len(window) > 1]:  # few stretches of the file, in random order
        assert len(np.unique(window // BLOCK_CELLS)) <= -(-1000 // BLOCK_CELLS) + 2
        assert abs(np.corrcoef(window, np.arange(len(window)))[0, 1]) < 0.95
    if n > 1000:
        assert len(np.unique(windows[0] // BLOCK_CELLS)) < 20  # a plain permutation would touch all of them


def test_every_process_has_the_same_number_of_minibatches():
    lengths = np.random.default_rng(0).integers(10, 1000, 20_001)
    plans = [Plan(lengths, 32, 2, rank, 3, seed=1, shuffle=True) for rank in range(3)]
    parts = [list(plan) for plan in plans]
    assert len({len(part) for part in parts}) == 1
    seen = np.concatenate([batch.rows[batch.weight > 0] for part in parts for batch in part])
    np.testing.assert_array_equal(np.sort(seen), np.arange(20_001))


def test_matrices_side_by_side_are_read_as_one():
    left, right = (
        sparse.csr_matrix(np.random.default_rng(seed).poisson(0.5, (9, 4)).astype(np.float32)) for seed in (0, 1)
    )
    both, rows = side_by_side({"rna": left, "atac": right}), np.array([7, 2, 2])
    assert both.shape == (9, 8) and side_by_side({"rna": left}) is left
    np.testing.assert_array_equal(both[rows].toarray(), np.hstack([left[rows].toarray(), right[rows].toarray()]))
    np.testing.assert_array_equal(both[3:5].toarray(), np.hstack([left[3:5].toarray(), right[3:5].toarray()]))
