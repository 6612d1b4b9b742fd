"""Matrices read by rows: the same cells from every layout and in blocks of any size; damage is reported."""

import h5py
import numpy as np
import pytest
from anndata.io import sparse_dataset, write_elem
from scipy.sparse import csc_matrix, csr_matrix

from utils.errors import UserError
from utils.files import disk_matrix as module
from utils.files.disk_matrix import Matrix

DENSE = np.random.default_rng(0).poisson(0.3, (57, 23)).astype(np.float32)
FORMS = {"dense": np.asarray, "csr": csr_matrix, "csc": csc_matrix}


@pytest.fixture(params=[*FORMS, *(f"{name} on disk" for name in FORMS)])
def matrix(request, tmp_path):
    name, _, on_disk = request.param.partition(" ")
    content = FORMS[name](DENSE)
    if not on_disk:
        yield Matrix(content, "cells.h5ad")
        return
    with h5py.File(tmp_path / "cells.h5ad", "w") as file:
        write_elem(file, "X", content)
        yield Matrix(file["X"], "cells.h5ad")


@pytest.mark.parametrize("block", [1, 40, 10**6])
def test_blocks_together_are_the_matrix(matrix, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    blocks = list(matrix.blocks())
    assert [start for start, _ in blocks] == list(np.cumsum([0, *(b.shape[0] for _, b in blocks[:-1])]))
    assert len(blocks) == {1: 57, 10**6: 1}.get(block, len(blocks))
    np.testing.assert_array_equal(np.concatenate([b.toarray() for _, b in blocks]), DENSE)
    assert all((b.data != 0).all() and b.has_sorted_indices for _, b in blocks)


def test_rows_are_taken_in_any_order(matrix, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 60)
    rows = np.random.default_rng(1).permutation(57)[:30]
    taken = matrix.take(rows)
    assert taken.shape == (30, 23)
    np.testing.assert_array_equal(np.concatenate([b.toarray() for _, b in taken.blocks()]), DENSE[rows])
    np.testing.assert_array_equal(taken.take(np.array([4, 2])).rows(0, 2).toarray(), DENSE[rows[[4, 2]]])


@pytest.mark.parametrize("rows", [[50, 3, 3, 20], [3, 3, 5], [0, 56], [5, 6, 8], []], ids=str)
@pytest.mark.parametrize("how", [{}, {"compression": "gzip"}, {"chunks": (7,)}], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.int32, np.float64])
def test_scattered_rows_of_a_file(rows, how, dtype, tmp_path, monkeypatch):
    """One by one where the layout allows it, else in stretches; in both cases with the values of the file."""
    monkeypatch.setattr(module, "BLOCK", 60)
    values = DENSE.astype(np.float64) + (0.1 * (DENSE > 0) if dtype == np.float64 else 0)
    with h5py.File(tmp_path / "cells.h5ad", "w") as file:
        write_elem(file, "X", csr_matrix(values), dataset_kwargs=how)
        data = values[values > 0].astype(dtype)
        del file["X/data"]
        file["X"].create_dataset("data", data=data, **how)
    with h5py.File(tmp_path / "cells.h5ad") as file:
        matrix = Matrix(file["X"], tmp_path / "cells.h5ad")
        found = matrix.take(np.array(rows, dtype=int)).rows(0, len(rows))
        np.testing.assert_array_equal(found.toarray(), values[rows])
        assert matrix.take(np.arange(4))._all is matrix  # what one part has opened serves all


def test_a_sample_is_spread_over_the_file(matrix):
    sample = matrix.sample(16, 8)
    starts = np.linspace(0, 55, 8).astype(int)
    np.testing.assert_array_equal(sample.toarray(), np.concatenate([DENSE[s : s + 2] for s in starts]))
    np.testing.assert_array_equal(matrix.sample(100).toarray(), DENSE)


def test_repeated_entries_are_summed():
    twice = csr_matrix((np.array([1.0, 2.0, 0.0]), np.array([1, 1, 0]), np.array([0, 3])), shape=(1, 2))
    rows = Matrix(twice, "cells.h5ad").rows(0, 1)
    assert (rows.indices.tolist(), rows.data.tolist()) == ([1], [3.0])
    assert twice.nnz == 3  # the caller's matrix is not changed


@pytest.mark.parametrize("damage", ["index", "order", "text"])
@pytest.mark.parametrize("form", ["csr", "csc"])
def test_damage_is_reported(form, damage, tmp_path):
    """With an index beyond the last gene, compiled code would write outside its memory."""
    with h5py.File(tmp_path / "cells.h5ad", "w") as file:
        write_elem(file, "X", FORMS[form](DENSE))
        if damage == "index":
            file["X/indices"][5] = 10**6
        elif damage == "order":
            file["X/indptr"][3] = 10**6
        else:
            del file["X/data"]
            file["X/data"] = np.array([b"a"] * file["X/indices"].shape[0])
        with pytest.raises(UserError, match=r"^cells\.h5ad: is damaged"):
            for _ in Matrix(sparse_dataset(file["X"]), "cells.h5ad").blocks():
                pass


@pytest.mark.parametrize("form", ["dense", "csr", "csc"])
def test_half_precision_is_read(form, tmp_path):
    with h5py.File(tmp_path / "cells.h5ad", "w") as file:
        write_elem(file, "X", FORMS[form](DENSE))
        name = "X" if form == "dense" else "X/data"
        values, attributes = file[name][...].astype(np.float16), dict(file[name].attrs)
        del file[name]
        file[name] = values
        file[name].attrs.update(attributes)
        np.testing.assert_array_equal(Matrix(file["X"], "cells.h5ad").rows(3, 9).toarray(), DENSE[3:9])


class Reads:
    """Counts the values that are read from a dataset of a file."""

    def __init__(self, monkeypatch):
        self.n, getitem = 0, h5py.Dataset.__getitem__

        def counted(dataset, key, *rest, **more):
            values = getitem(dataset, key, *rest, **more)
            self.n += np.size(values) if dataset.file.filename.endswith("cells.h5ad") else 0
            return values

        monkeypatch.setattr(h5py.Dataset, "__getitem__", counted)


@pytest.mark.parametrize("n_cells", [400, 1600])
@pytest.mark.parametrize("form", ["csc", "compressed csr", "dense"])
def test_each_value_is_read_a_fixed_number_of_times(form, n_cells, tmp_path, monkeypatch):
    """By features, and by cells in any order, twice; memory holds small blocks only."""
    monkeypatch.setattr(module, "BLOCK", 500)
    monkeypatch.setattr(module, "IN_MEMORY", 2)
    rng = np.random.default_rng(0)
    dense = rng.poisson(0.3, (n_cells, 23)).astype(np.float32)
    content, how = {"csc": (csc_matrix(dense), {}), "dense": (dense, {})}.get(
        form, (csr_matrix(dense), {"compression": "gzip"})
    )
    with h5py.File(tmp_path / "cells.h5ad", "w") as file:
        write_elem(file, "X", content, dataset_kwargs=how)
    with h5py.File(tmp_path / "cells.h5ad") as file:
        matrix, order = Matrix(file["X"], tmp_path / "cells.h5ad"), rng.permutation(n_cells)
        reads, stored = Reads(monkeypatch), dense.size if form == "dense" else 2 * np.count_nonzero(dense)
        for _ in range(2):
            found = [block.toarray() for _, block in matrix.take(order).blocks()]
            np.testing.assert_array_equal(np.concatenate(found), dense[order])
        assert len(found) > 3
        assert reads.n < 4 * stored


def test_a_full_temporary_folder_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IN_MEMORY", 1)
    monkeypatch.setattr(module, "BLOCK", 50)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("utils.files.row_copy._Copy.rows", full)
    with h5py.File(tmp_path / "cells.h5ad", "w") as file:
        write_elem(file, "X", csc_matrix(DENSE))
        with pytest.raises(UserError, match="TMPDIR"):
            Matrix(file["X"], tmp_path / "cells.h5ad").rows(0, 5)
