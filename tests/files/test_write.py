"""Files are written completely or not at all, and a failure is reported once."""

import gc
import sys
from itertools import pairwise

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
from anndata.io import sparse_dataset
from scipy import sparse

from utils.errors import DiskFullError
from utils.files.disk_rows import FileRows
from utils.files.write import CHUNK, CHUNK_ROWS, whole_file, write_in_blocks


class FailsWhenFreed:
    """An object whose destructor raises, like an HDF5 handle of a file that could not be finished."""

    def __init__(self, message: str):
        self.message = message

    def __del__(self):
        raise RuntimeError(self.message)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "cells.h5ad"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["cells.h5ad"]
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["cells.h5ad"]


def test_only_messages_about_the_unfinished_file_are_silent(tmp_path, monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(str(unraisable.exc_value)))
    with pytest.raises(DiskFullError, match=r"cells\.h5ad"), whole_file(tmp_path / "cells.h5ad") as partial:
        FailsWhenFreed(f"file write failed, filename = '{partial}'")
        FailsWhenFreed("another file")
        gc.collect()
        raise OSError(28, "No space left on device")
    FailsWhenFreed("after the block")
    gc.collect()
    assert printed == ["another file", "after the block"]


def counts_of(n_cells, n_features, density=0.2, seed=0):
    rng = np.random.default_rng(seed)
    counts = sparse.random(n_cells, n_features, density, "csr", np.float32, rng)
    counts.data = rng.geometric(0.4, counts.nnz).astype(np.float32)
    counts.sort_indices()
    return counts


def frame_of(n_cells, n_features):
    return ad.AnnData(obs=pd.DataFrame(index=list(map(str, range(n_cells)))), var=pd.DataFrame(index=range(n_features)))


def write_blocks(path, X, layer=None, cuts=()):
    """Write a matrix in blocks that end at `cuts`, with a layer in the same places; return the path."""
    frame = frame_of(*X.shape)
    edges = [0, *cuts, X.shape[0]]
    with write_in_blocks(path, {"rna": frame}, frame.obs, {}) as file:
        for start, stop in pairwise(edges):
            layers = {} if layer is None else {"counts": layer[start:stop]}
            file.append("rna", X=X[start:stop], **layers)
    return path


def assert_same(found, expected):
    assert found.dtype == expected.dtype and found.indices.dtype == np.int32
    assert found.shape == expected.shape
    for part in ("indptr", "indices"):
        np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))
    assert found.data.tobytes() == expected.data.tobytes()


def rows_of(path, place="X"):
    with h5py.File(path) as file:
        return FileRows(file[place], path)


def test_blocks_come_back_bit_for_bit(tmp_path):
    """Over several chunks of values and of rows, with empty cells and an empty block."""
    counts = counts_of(CHUNK_ROWS + 500, 100)
    counts[7:12] = 0
    counts.eliminate_zeros()
    assert counts.nnz > CHUNK
    values = counts.copy()
    values.data = np.log2(1 + np.float32(1.7) * counts.data)
    path = write_blocks(tmp_path / "x.h5ad", values, counts.astype(np.int32), cuts=(100, 100, 2000, CHUNK_ROWS + 1))
    cells = ad.read_h5ad(path)
    assert_same(cells.X, values)
    assert_same(cells.layers["counts"], counts.astype(np.int32))
    wanted = np.random.default_rng(1).permutation(len(cells.obs))
    assert_same(rows_of(path)[wanted], values[wanted])
    with pytest.raises(ValueError, match="plain"):  # counts are compressed
        rows_of(path, "layers/counts")


def test_places_are_stored_once(tmp_path):
    counts = counts_of(300, 100)
    path = write_blocks(tmp_path / "x.h5ad", counts * np.float32(0.3), counts.astype(np.int32))
    with h5py.File(path) as file:
        for part in ("indices", "indptr"):
            assert file["X"][part] == file["layers/counts"][part]
    other = counts.copy()
    other.indices[-1] = 98 if other.indices[-1] == 99 else 99
    with pytest.raises(ValueError, match="counts"):
        write_blocks(tmp_path / "y.h5ad", counts, other.astype(np.int32))
    assert not (tmp_path / "y.h5ad").exists()


def test_equal_values_take_no_space(tmp_path):
    is_open = counts_of(3000, 200)
    is_open.data[:] = 1
    path = write_blocks(tmp_path / "x.h5ad", is_open, cuts=(1000,))
    with h5py.File(path) as file:
        assert file["X/data"].id.get_storage_size() == 0
    assert_same(ad.read_h5ad(path).X, is_open)
    assert_same(rows_of(path)[:], is_open)
    is_open.data[70_000:70_010] = 2  # in the second block, and equal ones after it
    path = write_blocks(tmp_path / "x.h5ad", is_open, cuts=(1000, 2500, 2600))
    assert_same(ad.read_h5ad(path).X, is_open)
    assert_same(rows_of(path)[:], is_open)


@pytest.mark.parametrize("n_features", [2**16 - 1, 2**16, 400_000])
def test_wide_matrices(tmp_path, n_features):
    counts = counts_of(40, n_features, density=300 / n_features)
    counts[3, n_features - 1] = counts[4, 0] = 5
    path = write_blocks(tmp_path / "x.h5ad", counts, cuts=(7,))
    frame = sparse_dataset(h5py.File(path)["X"])
    assert_same(frame.to_memory(), counts)
    assert_same(rows_of(path)[:], counts)


@pytest.mark.parametrize("largest, dtype", [(2**24, np.int32), (2**31 - 1, np.int32), (2**40, np.int64)])
def test_large_counts(tmp_path, largest, dtype):
    counts = counts_of(50, 60).astype(dtype)
    counts.data[11] = largest
    path = write_blocks(tmp_path / "x.h5ad", counts.astype(np.float32), counts, cuts=(20,))
    assert_same(ad.read_h5ad(path).layers["counts"], counts)


@pytest.mark.parametrize("most, dtype", [(2**31 - 1, np.int32), (500, np.int64)])
def test_any_slice_of_cells_can_be_taken(most, dtype, tmp_path, monkeypatch):
    """SciPy refuses some slices where the kinds of indices differ in width; a huge matrix needs wide starts."""
    monkeypatch.setattr("utils.files.write.MOST_VALUES", most)
    counts = counts_of(400, 30)
    path = write_blocks(tmp_path / "x.h5ad", counts * np.float32(0.7), counts.astype(np.int32), cuts=(30, 130))
    with h5py.File(path) as file:
        assert file["X/indptr"].dtype == dtype and file["layers/counts/indptr"] == file["X/indptr"]
        assert file["X/indptr"].maxshape == (None,)
    assert_same(rows_of(path)[:], counts * np.float32(0.7))
    whole = ad.read_h5ad(path)
    assert_same(whole.layers["counts"], counts.astype(np.int32))
    for part in (slice(None, None, 10), slice(None, None, -1), slice(3, 50, 7)) if dtype == np.int32 else ():
        assert_same(whole[part].copy().layers["counts"], counts[part].astype(np.int32))


def test_other_programs_read_parts_and_copies(tmp_path):
    """anndata from disk, in memory and after a copy; a copy of the group by HDF5; a file of two modalities."""
    counts = counts_of(400, 300)
    path = write_blocks(tmp_path / "x.h5ad", counts * np.float32(0.7), counts.astype(np.int32))
    whole, some = ad.read_h5ad(path), np.array([5, 3, 399])
    from_disk = ad.read_h5ad(path, backed="r")
    assert_same(from_disk[some].to_memory().X.sorted_indices(), whole.X[some])
    assert_same(from_disk[10:200, 4:90].to_memory().layers["counts"], whole.layers["counts"][10:200, 4:90])
    whole.write(tmp_path / "again.h5ad")
    assert_same(ad.read_h5ad(tmp_path / "again.h5ad").layers["counts"], whole.layers["counts"])
    ad.experimental.concat_on_disk([path, path], tmp_path / "twice.h5ad", index_unique="-")
    twice = ad.read_h5ad(tmp_path / "twice.h5ad")
    assert (twice.X[400:] != whole.X).nnz == (twice.layers["counts"][:400] != whole.layers["counts"]).nnz == 0
    with h5py.File(path) as file, h5py.File(tmp_path / "copy.h5", "w") as copy:
        file.copy("layers/counts", copy)
        assert_same(sparse_dataset(copy["counts"]).to_memory(), whole.layers["counts"])
    parts = {name: frame_of(400, 300) for name in ("rna", "atac")}
    with write_in_blocks(tmp_path / "x.h5mu", parts, parts["rna"].obs, {}) as file:
        for name in parts:
            file.append(name, X=whole.X, counts=whole.layers["counts"])
    both = mudata.read_h5mu(tmp_path / "x.h5mu")
    for name in parts:
        assert_same(both[name].X, whole.X)
        assert_same(both[name].layers["counts"], whole.layers["counts"])
        assert_same(rows_of(tmp_path / "x.h5mu", f"mod/{name}/X")[some], whole.X[some])
