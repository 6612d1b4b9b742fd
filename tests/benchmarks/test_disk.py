"""Bytes per cell are those that HDF5 has allocated, whatever the number of names of a dataset."""

import h5py
import mudata
import numpy as np

from benchmarks.disk import matrix_bytes
from tests import builders
from utils.files.write import write_whole


def test_what_has_two_names_counts_once(tmp_path):
    rna = builders.make_cells()
    rna.layers["counts"] = rna.X.copy()
    write_whole(rna, tmp_path / "x.h5ad")
    n, starts = rna.X.nnz, 4 * (len(rna) + 1)
    assert matrix_bytes(tmp_path / "x.h5ad") == {"all": (2 * (8 * n + starts)) / len(rna)}
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        del file["layers/counts/indices"]
        file["layers/counts/indices"] = file["X/indices"]
    assert matrix_bytes(tmp_path / "x.h5ad") == {"all": (12 * n + 2 * starts) / len(rna)}
    write_whole(mudata.MuData({"rna": rna, "atac": builders.make_peaks(rna.obs_names)}), tmp_path / "x.h5mu")
    found = matrix_bytes(tmp_path / "x.h5mu")
    assert np.isclose(found["rna"], 2 * (8 * n + starts) / len(rna)) and found["atac"] > 0
