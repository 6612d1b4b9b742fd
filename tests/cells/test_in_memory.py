"""Cells in memory are opened as their file would be, and stay as they are."""

import anndata as ad
import mudata
import numpy as np
import pytest

from tests.builders import make_cells, make_peaks
from utils.cells.in_memory import open_in_memory
from utils.cells.preprocessed import read_raw
from utils.errors import UserError
from utils.files.write import write_whole


def test_the_cells_stay_as_they_are(simulation):
    cells = simulation.mdata["rna"][:9].copy()
    cells.var.index.name, cells.obs.index.name = "gene", "barcode"
    cells.raw = cells.copy()
    before = cells.copy()
    file = open_in_memory(cells)
    assert file.simulated and list(file.modalities) == ["rna"] and not file.on_disk
    content = file.content()
    content.obs["new"] = 1
    assert (cells.var.index.name, cells.raw.var.index.name, cells.obs.index.name) == ("gene", "gene", "barcode")
    assert (cells.X != before.X).nnz == 0 and list(cells.obs) == list(before.obs)


@pytest.mark.parametrize("is_multi", [True, False])
def test_what_is_found_is_what_the_file_gives(is_multi, tmp_path):
    rna = make_cells(n_cells=12)
    atac = make_peaks(rna.obs_names)
    if is_multi:
        cells = mudata.MuData({"gex": rna, "peaks": atac[:8].copy()})
    else:
        cells = ad.concat([rna, atac], axis=1)
        cells.var["feature_types"] = ["Gene Expression"] * rna.n_vars + ["Peaks"] * atac.n_vars
    path = tmp_path / ("cells.h5mu" if is_multi else "cells.h5ad")
    write_whole(cells, path)
    ours = open_in_memory(cells)
    with read_raw(path) as theirs:
        assert list(ours.modalities) == list(theirs.modalities) == ["rna", "atac"]
        assert list(ours.obs.index) == list(theirs.obs.index)
        for name, source in theirs.modalities.items():
            mine, other = (one.matrices["X"][0] for one in (ours.modalities[name], source))
            np.testing.assert_array_equal(mine.rows(0, 8).toarray(), other.rows(0, 8).toarray())
        assert type(ours.content()) is type(theirs.content())


def test_the_stamp_of_preprocessed_cells_is_found(ready_file):
    cells = mudata.read_h5mu(ready_file)
    with read_raw(ready_file) as file:
        assert open_in_memory(cells).stamp == file.stamp is not None
    cells.uns["scmomer"] = {"anything": 1}
    assert open_in_memory(cells).stamp is None


def test_cells_without_rna_and_atac_are_refused():
    with pytest.raises(UserError, match=r"the cells in memory.*no modality named rna or atac"):
        open_in_memory(mudata.MuData({"prot": make_cells()}))


@pytest.mark.parametrize("is_multi", [True, False])
def test_backed_cells_are_refused_and_stay_open(is_multi, tmp_path):
    rna = make_cells()
    path = tmp_path / ("cells.h5mu" if is_multi else "cells.h5ad")
    write_whole(mudata.MuData({"rna": rna}) if is_multi else rna, path)
    cells = (mudata.read_h5mu if is_multi else ad.read_h5ad)(path, backed="r")
    with pytest.raises(UserError, match="to_memory"):
        open_in_memory(cells)
    part = cells["rna"] if is_multi else cells
    np.testing.assert_array_equal(part[:3].X[:].toarray(), rna[:3].X.toarray())
