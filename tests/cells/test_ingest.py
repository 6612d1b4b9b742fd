"""The same cells give the same model values in any format, in any order and after any usual transformation."""

import re
import tempfile
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix, vstack

from tests.builders import STATES, make_cells, make_peaks, tokens
from tests.formats import FORMATS, WHOLE_NUMBERS_ONLY, tenx_folder, tenx_h5, text
from tests.helpers import error_of, run
from utils.cells.barcodes import join_barcodes
from utils.cells.config import IngestConfig
from utils.cells.ingest import ingest
from utils.cells.preprocessed import open_cells, read_cells, read_raw


@pytest.fixture(scope="module")
def adata() -> ad.AnnData:
    return make_cells()


@pytest.fixture(scope="module")
def expected(adata, tmp_path_factory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("expected")
    return tokens(FORMATS["h5ad csr"](adata, folder), folder / "ready.h5ad")


PAIRS = [(n, s) for n in FORMATS for s in STATES if s == "counts" or n not in WHOLE_NUMBERS_ONLY]


@pytest.mark.parametrize(("name", "state"), PAIRS)
def test_every_format_and_state_gives_the_same_tokens(name, state, adata, expected, tmp_path):
    other = adata.copy()
    other.X = STATES[state](adata.X.toarray()).astype(np.float32)
    path = FORMATS[name](other, tmp_path)
    found = tokens(path, tmp_path / f"ready{'.h5mu' if name == 'h5mu' else '.h5ad'}")
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 10**6),
    st.integers(2, 20),
    st.integers(3, 60),
    st.sampled_from(sorted(set(FORMATS) - WHOLE_NUMBERS_ONLY - {"h5mu"})),
    st.sampled_from(sorted(STATES)),
    st.data(),
)
def test_order_of_cells_and_genes_does_not_matter(seed, n_cells, n_genes, name, state, data):
    """Values are compared by barcode and symbol, and so is the choice of validation cells."""
    adata = make_cells(seed, n_cells, n_genes)
    cells = data.draw(st.permutations(range(n_cells)))
    genes = data.draw(st.permutations(range(n_genes)))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        original = tokens(FORMATS["h5ad csr"](adata, folder), folder / "a.h5ad", val_fraction=0.3)
        other = adata[cells][:, genes].copy()
        other.X = STATES[state](other.X.toarray()).astype(np.float32)
        shuffled = tokens(FORMATS[name](other, folder), folder / "b.h5ad", val_fraction=0.3)
        splits = [read_cells(folder / f"{file}.h5ad", ("rna",)).obs["split"] for file in "ab"]
    assert list(shuffled.index) == list(other.obs_names)  # the file's own order
    pd.testing.assert_frame_equal(shuffled.loc[original.index], original, check_exact=True)
    assert (splits[1][splits[0].index] == splits[0]).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["chr{}:{}-{}", "chr{}-{}-{}", "chr{}_{}_{}", "{}:{}-{}"]), st.data())
def test_order_and_spelling_of_peaks_do_not_matter(seed, spelling, data):
    peaks = make_peaks(make_cells(seed).obs_names, seed)
    order = data.draw(st.permutations(range(peaks.n_vars)))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        original = tokens(FORMATS["h5ad csr"](peaks, folder), folder / "a.h5ad", "atac")
        other = peaks[:, order].copy()
        other.var_names = [spelling.format(*name[3:].replace(":", "-").split("-")) for name in other.var_names]
        shuffled = tokens(FORMATS["h5ad csc"](other, folder), folder / "b.h5ad", "atac")
    pd.testing.assert_frame_equal(shuffled, original, check_exact=True)


def test_peaks_are_named_by_columns_of_intervals(tmp_path):
    peaks = make_peaks(make_cells().obs_names)
    expected = tokens(FORMATS["h5ad csr"](peaks, tmp_path), tmp_path / "a.h5ad", "atac")
    intervals = peaks.var_names.str.extract(r"(\w+):(\d+)-(\d+)").to_numpy()
    peaks.var = pd.DataFrame(intervals, [f"peak_{i}" for i in range(peaks.n_vars)], ["chrom", "start", "end"])
    found = tokens(FORMATS["h5ad csr"](peaks, tmp_path), tmp_path / "b.h5ad", "atac")
    pd.testing.assert_frame_equal(found, expected)


# Both modalities -----------------------------------------------------------------------------------------------------


def test_multiome_is_split_into_modalities(adata, expected, tmp_path):
    peaks = make_peaks(adata.obs_names)
    path = tenx_h5(adata, tmp_path, peaks)
    found = tokens(path, tmp_path / "ready.h5mu")
    pd.testing.assert_frame_equal(found, expected)
    cells = read_cells(tmp_path / "ready.h5mu", ("rna", "atac"))
    found = cells.values["atac"][:].toarray()
    np.testing.assert_array_equal(found > 0, peaks[:, cells.features["atac"]].X.toarray() > 0)


def test_multiome_in_one_table_is_split_and_other_features_are_reported(adata, expected, tmp_path, capsys):
    """The table that scanpy makes of a 10x file with gex_only=False; it also holds antibodies."""
    peaks = make_peaks(adata.obs_names)
    antibodies = peaks[:, :3].copy()
    antibodies.var_names = ["CD3", "CD4", "CD8"]
    kinds = {"Gene Expression": adata, "Peaks": peaks, "Antibody Capture": antibodies}
    both = ad.concat(kinds, axis=1)
    both.var["feature_types"] = pd.Categorical([kind for kind, part in kinds.items() for _ in range(part.n_vars)])
    both.raw = both.copy()
    both.write(tmp_path / "both.h5ad")
    pd.testing.assert_frame_equal(tokens(tmp_path / "both.h5ad", tmp_path / "ready.h5mu"), expected)
    assert "(3 features of type Antibody Capture)" in capsys.readouterr().out
    assert read_cells(tmp_path / "ready.h5mu", ("rna", "atac")).values["atac"].shape == (12, 30)


@pytest.mark.parametrize("suffix", ["", "-1"])
def test_two_files_are_joined_by_barcode(adata, expected, suffix, tmp_path, capsys):
    barcodes = adata.obs_names.str.removesuffix("-1") + suffix
    peaks = make_peaks(barcodes)[[7, 3, 5, 0]].copy()
    peaks = ad.concat([peaks, make_peaks(pd.Index(["TTTT", "GGGG"]))])
    adata.write(tmp_path / "rna.h5ad")
    peaks.write(tmp_path / "atac.h5ad")
    pair = {"rna_path": tmp_path / "rna.h5ad", "atac_path": tmp_path / "atac.h5ad"}
    run("preprocess", **pair, out_path=tmp_path / "ready.h5mu")
    report = capsys.readouterr().out
    joined, left_out = re.search(r"4 cells joined by barcode(.*); left out: (.*)", report).groups()
    assert ("-1" in joined) == (suffix == "")
    assert re.findall(r"\d+", left_out) == ["8", "2"]
    cells = read_cells(tmp_path / "ready.h5mu", ("rna", "atac"))
    rows = [0, 3, 5, 7]
    assert list(cells.obs.index) == list(adata.obs_names[rows])
    np.testing.assert_array_equal(cells.values["rna"][:].toarray(), expected.iloc[rows].to_numpy())
    wanted = peaks[[3, 1, 2, 0]][:, cells.features["atac"]].X.toarray() > 0
    np.testing.assert_array_equal(cells.values["atac"][:].toarray() > 0, wanted)


def test_a_barcode_in_two_samples_is_two_cells(adata):
    """Suffixes of an aggregated run name samples: they count where they agree, and not where no barcode does."""
    bare = adata.obs_names.str.removesuffix("-1")
    ours = [*(bare[:5] + "-1"), *(bare[5:11] + "-2"), bare[11] + "-1"]
    theirs = [*ours[:11], bare[11] + "-2"]  # the last one has RNA in one sample, and ATAC in the other
    rows = join_barcodes(pd.Index(ours), pd.Index(theirs))
    assert [list(found) for found in rows[:2]] == [list(range(11))] * 2 and rows[2] == ""
    rows = join_barcodes(pd.Index(ours), bare)
    assert [list(found) for found in rows[:2]] == [list(range(12))] * 2 and "-1" in rows[2]


def test_two_files_keep_everything_they_hold(adata, tmp_path):
    rna = adata.copy()
    rna.obsm["X_pca"] = np.arange(24, dtype=np.float32).reshape(12, 2)
    peaks = make_peaks(adata.obs_names)[::-1].copy()
    rna.write(tmp_path / "rna.h5ad")
    peaks.write(tmp_path / "atac.h5ad")
    content = open_cells(None, str(tmp_path / "rna.h5ad"), str(tmp_path / "atac.h5ad")).content()
    np.testing.assert_array_equal(content["rna"].obsm["X_pca"], rna.obsm["X_pca"])
    np.testing.assert_array_equal(content["atac"].X.toarray(), peaks[::-1].X.toarray())
    assert list(content.obs_names) == list(adata.obs_names)


# The matrix that holds the counts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["counts", "raw_counts", "spliced", "raw"])
def test_counts_beside_scaled_values_are_found(place, adata, expected, tmp_path, capsys):
    other = adata.copy()
    if place == "raw":
        other.raw = other.copy()
    else:
        other.layers[place] = other.X.copy()
    other.X = np.random.default_rng(0).normal(size=other.shape).astype(np.float32)
    other = other[:, :30].copy() if place == "raw" else other  # raw has genes that X lacks
    found = tokens(FORMATS["h5ad dense"](other, tmp_path), tmp_path / "ready.h5ad")
    pd.testing.assert_frame_equal(found, expected)
    assert f"counts in {'raw' if place == 'raw' else f'layers[{place!r}]'}" in capsys.readouterr().out


def test_whole_counts_are_preferred_to_recovered_ones(adata, tmp_path, capsys):
    other = adata.copy()
    other.raw = other.copy()
    other.X = np.log1p(other.X.toarray())
    tokens(FORMATS["h5ad dense"](other, tmp_path), tmp_path / "ready.h5ad")
    assert "counts in raw" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["counts", "log1p e"])
def test_of_two_equal_matrices_the_one_with_more_genes_is_read(state, adata, expected, tmp_path, capsys):
    other = adata.copy()
    other.X = STATES[state](adata.X.toarray()).astype(np.float32)
    other.raw = other.copy()
    found = tokens(FORMATS["h5ad dense"](other[:, :25].copy(), tmp_path), tmp_path / "ready.h5ad")
    pd.testing.assert_frame_equal(found, expected)
    assert " in raw" in capsys.readouterr().out


def test_recovered_counts_of_all_genes_are_preferred_to_counts_of_some(adata, expected, tmp_path, capsys):
    """The usual file: counts in a layer, log values of all genes in raw, and then only the variable genes are kept."""
    other = adata.copy()
    other.layers["counts"] = other.X.copy()
    other.X = STATES["log1p e"](adata.X.toarray()).astype(np.float32)
    other.raw = other.copy()
    found = tokens(FORMATS["h5ad dense"](other[:, :25].copy(), tmp_path), tmp_path / "ready.h5ad")
    pd.testing.assert_frame_equal(found, expected)
    assert "counts recovered in raw" in capsys.readouterr().out


def test_spliced_counts_are_a_part_and_read_last(adata, expected, tmp_path, capsys):
    other = adata.copy()
    other.layers["spliced"] = csr_matrix(np.minimum(adata.X.toarray(), 1))
    other.X = STATES["log1p e"](adata.X.toarray()).astype(np.float32)
    found = tokens(FORMATS["h5ad dense"](other, tmp_path), tmp_path / "ready.h5ad")
    pd.testing.assert_frame_equal(found, expected)
    assert "counts recovered in X" in capsys.readouterr().out


def test_values_that_are_not_counts_are_scaled_to_the_target_sum(tmp_path, capsys):
    rng = np.random.default_rng(0)
    weights = rng.gamma(0.5, 1, (8, 30)).astype(np.float32)
    adata = make_cells(n_cells=8, n_genes=30)
    adata.X = np.log1p(weights * 700 / weights.sum(1, keepdims=True))
    found = tokens(FORMATS["h5ad dense"](adata, tmp_path), tmp_path / "ready.h5ad", target_sum=1e4)
    wanted = np.log2(1 + 1e4 * weights / weights.sum(1, keepdims=True))
    np.testing.assert_allclose(found.to_numpy(), wanted, rtol=1e-4)
    assert "not recoverable" in capsys.readouterr().out
    assert "counts" not in ad.read_h5ad(tmp_path / "ready.h5ad").layers


def test_an_odd_cell_outside_the_sample_is_noticed(adata, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("utils.files.source.SAMPLE", 8)
    monkeypatch.setattr("utils.files.disk_matrix.BLOCK", 60)
    counts = adata.X.toarray()
    values = np.log1p(counts * 1e4 / counts.sum(1, keepdims=True))
    values[8] *= np.random.default_rng(0).uniform(0.5, 1, 40)  # the sample: rows 0, 1, 3, 4, 6, 7, 9, 11
    other = adata.copy()
    other.X = csr_matrix(values)
    tokens(FORMATS["h5ad csr"](other, tmp_path), tmp_path / "ready.h5ad")
    assert "counts not recoverable" in capsys.readouterr().out
    counts[8, 3] = 0.5
    other.X = csr_matrix(counts)
    path = FORMATS["h5ad csr"](other, tmp_path)
    line = error_of(capsys, "preprocess", data_path=path, out_path=tmp_path / "no.h5ad")
    assert f"{path}: X of rna" in line
    assert f"0.5 in cell {adata.obs_names[8]}" in line


def test_values_flag_overrides_detection(adata, tmp_path, capsys):
    other = adata.copy()
    other.X = adata.X.toarray() * np.random.default_rng(0).gamma(3, 50, adata.shape).astype(np.float32)
    path = FORMATS["h5ad dense"](other, tmp_path)
    line = error_of(capsys, "preprocess", data_path=path, out_path=tmp_path / "ready.h5ad")
    assert f"{path}: " in line
    assert "--values cpm" in line
    found = tokens(path, tmp_path / "ready.h5ad", values="cpm")
    dense = other.X[:, np.argsort(other.var_names)]
    np.testing.assert_allclose(found, np.log2(1 + 1e4 * dense / dense.sum(1, keepdims=True)), rtol=1e-4)


def test_estimated_counts_are_used_unchanged(tmp_path, capsys):
    """Estimates like alevin's: a few molecules of a cell are shared between genes. A cell's total includes them."""
    adata, rng = make_cells(n_cells=30, n_genes=200), np.random.default_rng(0)
    counts = adata.X.toarray() * 4
    counts[:, 0] = 1
    counts += (rng.random(counts.shape) < 0.05) * rng.uniform(0, 1, counts.shape) * (counts > 0)
    adata.X = counts.astype(np.float32)
    found = tokens(FORMATS["h5ad csr"](adata, tmp_path), tmp_path / "ready.h5ad", target_sum="median", val_fraction=0)
    assert "estimated counts with fractions" in capsys.readouterr().out
    totals = counts.sum(1, keepdims=True)
    np.testing.assert_allclose(found.to_numpy(), np.log2(1 + np.median(totals) * counts / totals), rtol=1e-4)
    assert "counts" not in ad.read_h5ad(tmp_path / "ready.h5ad").layers


def test_values_counts_accepts_fractions(adata, tmp_path):
    other = adata.copy()
    other.X[3, 0] = 0.5
    found = tokens(FORMATS["h5ad csr"](other, tmp_path), tmp_path / "ready.h5ad", values="counts")
    dense = other.X.toarray()[:, np.argsort(other.var_names)]
    np.testing.assert_allclose(found, np.log2(1 + 1e4 * dense / dense.sum(1, keepdims=True)), rtol=1e-4)


# Text and folders ----------------------------------------------------------------------------------------------------


def test_cells_named_like_genes_do_not_transpose_the_table(adata, expected, tmp_path):
    """Cell1, Cell2 … look like symbols of mouse genes."""
    other = adata.copy()
    other.obs_names = [f"Cell{i}" for i in range(other.n_obs)]
    for turned in (False, True):
        path = text("cells.csv", ",", turned=turned)(other, tmp_path)
        found = tokens(path, tmp_path / "ready.h5ad")
        np.testing.assert_array_equal(found.to_numpy(), expected.to_numpy())


def test_a_folder_of_two_samples_is_refused(adata, tmp_path, capsys):
    folder = tenx_folder("genes.tsv", zipped=False)(adata, tmp_path)
    (folder / "other_matrix.mtx").write_bytes((folder / "matrix.mtx").read_bytes())
    line = error_of(capsys, "preprocess", data_path=folder, out_path=tmp_path / "out.h5ad")
    assert f"{folder}: " in line
    assert "matrix.mtx" in line


# Output --------------------------------------------------------------------------------------------------------------


def test_preprocessing_twice_is_refused(adata, tmp_path, capsys):
    tokens(FORMATS["h5ad csr"](adata, tmp_path), tmp_path / "ready.h5ad")
    before = (tmp_path / "ready.h5ad").read_bytes()
    line = error_of(capsys, "preprocess", data_path=tmp_path / "ready.h5ad", out_path=tmp_path / "twice.h5ad")
    assert f"{tmp_path / 'ready.h5ad'}: " in line
    assert not (tmp_path / "twice.h5ad").exists()
    assert (tmp_path / "ready.h5ad").read_bytes() == before


def test_blocks_of_any_size_write_the_same_file(adata, expected, tmp_path, monkeypatch):
    path = FORMATS["h5ad csr"](adata, tmp_path)
    for block in (1, 50, 10**6):
        monkeypatch.setattr("utils.files.disk_matrix.BLOCK", block)
        pd.testing.assert_frame_equal(tokens(path, tmp_path / "ready.h5ad"), expected, check_exact=True)


@pytest.mark.parametrize("block", [1, 60, 10**6])
def test_chosen_cells_are_those_of_the_blocks(block, adata, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.files.disk_matrix.BLOCK", block)
    adata.write(tmp_path / "cells.h5ad")
    with read_raw(tmp_path / "cells.h5ad") as file:
        found = ingest(file.modalities["rna"], IngestConfig())
        everything = vstack(list(found.blocks())).toarray()
        for cells in (
            np.arange(4),
            np.random.default_rng(0).permutation(adata.n_obs),
            np.array([7]),
            np.array([], int),
        ):
            np.testing.assert_array_equal(vstack(list(found.chosen(cells))).toarray(), everything[cells])


def test_annotation_is_copied_and_the_rest_is_reported(adata, tmp_path, capsys):
    other = adata.copy()
    other.obs["donor"] = pd.Categorical(["a", "b"] * 6)
    other.obsm["X_pca"] = np.zeros((12, 2))
    other.layers["smooth"] = other.X.copy()
    run("preprocess", data_path=FORMATS["h5ad csr"](other, tmp_path), out_path=tmp_path / "ready.h5ad")
    assert "(layers['smooth'], obsm['X_pca'])" in capsys.readouterr().out
    assert ad.read_h5ad(tmp_path / "ready.h5ad").obs["donor"].tolist() == ["a", "b"] * 6


def test_modalities_with_other_names(adata, tmp_path):
    mudata.MuData({"gex": adata.copy(), "Peaks": make_peaks(adata.obs_names)}).write(tmp_path / "cells.h5mu")
    assert list(open_cells(str(tmp_path / "cells.h5mu"), None, None).modalities) == ["rna", "atac"]
