"""A model-ready file is small, holds the counts, and may have the layout of earlier versions."""

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
from anndata.io import read_elem, write_elem
from scipy import sparse

from tests import builders, helpers
from utils.cells.preprocessed import read_cells
from utils.features.normalise import model_values
from utils.files.disk_rows import FileRows, hashes_of, row_lengths
from utils.files.write import write_whole

N_CELLS, N_GENES, N_PEAKS = 1500, 900, 2500
MODALITIES = ("rna", "atac")


@pytest.fixture(scope="module")
def raw():
    """Cells with about 150 of the genes, one of which has a count that is large, and 250 of the peaks."""
    rng = np.random.default_rng(0)

    def counts(n_features, density, mean):
        found = sparse.random(N_CELLS, n_features, density, "csr", np.float32, rng)
        found.data = rng.geometric(1 / mean, found.nnz).astype(np.float32)
        found.sort_indices()
        return found

    barcodes = pd.DataFrame({"batch": "a"}, index=[f"cell{i}" for i in range(N_CELLS)])
    genes = builders.gene_names()[:N_GENES]
    peaks = [f"chr{1 + i % 20}:{1000 * i + 1}-{1000 * i + 501}" for i in range(N_PEAKS)]
    rna = ad.AnnData(counts(N_GENES, 1 / 6, 2.5), barcodes, pd.DataFrame(index=genes))
    rna.X.data[17] = 2**24 - 2
    atac = ad.AnnData(counts(N_PEAKS, 1 / 10, 1.3), barcodes, pd.DataFrame(index=peaks))
    return mudata.MuData({"rna": rna, "atac": atac})


@pytest.fixture(scope="module")
def ready(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ready")
    write_whole(raw, folder / "raw.h5mu")
    helpers.run("preprocess", data_path=folder / "raw.h5mu", out_path=folder / "ready.h5mu")
    return folder / "ready.h5mu"


def test_values_and_counts_come_back(raw, ready):
    cells, opened = read_cells(ready, MODALITIES), mudata.read_h5mu(ready)
    for name in MODALITIES:
        counts = raw[name][cells.obs.index, cells.features[name]].X
        values = model_values(name, counts, cells.stamp.get("target_sum"))
        for found in (cells.values[name][:], opened[name][cells.obs.index].X):
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found.indices, values.indices)
            assert found.data.tobytes() == values.data.tobytes()
        assert (opened[name][cells.obs.index].layers["counts"] != counts).nnz == 0
    assert opened["rna"].layers["counts"].max() == 2**24 - 2


def stored(path, name):
    """Bytes per value of a modality's X and counts."""
    with h5py.File(path) as file:
        held = [file["mod"][name][place][part] for place in ("X", "layers/counts") for part in ("data", "indices")]
        different = [dataset for i, dataset in enumerate(held) if dataset not in held[:i]]
        return sum(dataset.id.get_storage_size() for dataset in different) / held[0].size


def test_a_value_takes_less_than_half_of_the_earlier_layout(ready, earlier):
    # What is larger than 4 + 2 (RNA) or 2 bytes (ATAC) is the counts and the end of the last chunk.
    assert stored(earlier, "rna") >= 16
    assert stored(earlier, "atac") >= 16
    assert stored(ready, "rna") < 8
    assert stored(ready, "atac") < 4


@pytest.fixture(scope="module")
def earlier(ready):
    """The same file in the layout of earlier versions: two matrices of plain numbers, nothing shared or packed."""
    path = ready.with_name("earlier.h5mu")
    path.write_bytes(ready.read_bytes())
    with h5py.File(path, "r+") as file:
        for name in MODALITIES:
            for place in ("X", "layers/counts"):
                group = file["mod"][name]
                matrix = read_elem(group[place]).astype(np.float32)
                del group[place]
                write_elem(group, place, matrix, dataset_kwargs={"indptr_dtype": np.int64})
    return path


def test_the_earlier_layout_is_read_in_the_same_way(ready, earlier):
    now, before = (read_cells(path, MODALITIES) for path in (ready, earlier))
    wanted = np.random.default_rng(0).permutation(N_CELLS)[:200]
    for name in MODALITIES:
        for cells in (now, before):
            assert isinstance(cells.values[name], FileRows)
            assert cells.values[name].hashes is not None  # those in the file fit
        found, expected = now.values[name][wanted], before.values[name][wanted]
        assert found.data.tobytes() == expected.data.tobytes()
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_array_equal(hashes_of(now.values[name]), hashes_of(before.values[name]))
        np.testing.assert_array_equal(row_lengths(now.values[name]), row_lengths(before.values[name]))
        np.testing.assert_array_equal(now.train_mean(name), before.train_mean(name))
