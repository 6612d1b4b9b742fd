"""Awkward files of kinds that exist: each is read correctly, or refused with a reason."""

import gzip

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy.io import mmwrite
from scipy.sparse import csc_matrix, csr_matrix

from tests.builders import make_cells, make_peaks, tokens
from tests.formats import FORMATS, dense, text
from tests.helpers import error_of, lacks, run
from utils.cells.preprocessed import open_cells, read_cells
from utils.files.text import read_text


@pytest.fixture
def adata() -> ad.AnnData:
    return make_cells()


def counts(path) -> pd.DataFrame:
    out = ad.read_h5ad(path)
    return pd.DataFrame(out.layers["counts"].toarray(), out.obs_names, out.var_names)


def test_the_main_matrix_of_a_velocyto_loom_is_read(adata, tmp_path):
    """Its layers only hold parts of the counts."""
    adata.layers["spliced"] = csr_matrix(np.minimum(dense(adata), 1))
    adata.obs_names.name, adata.var_names.name = "CellID", "Gene"
    adata.write_loom(tmp_path / "cells.loom")
    run("preprocess", data_path=tmp_path / "cells.loom", out_path=tmp_path / "ready.h5ad")
    found = counts(tmp_path / "ready.h5ad")
    np.testing.assert_array_equal(found[adata.var_names].to_numpy(), dense(adata))


@pytest.mark.parametrize(
    "columns", [["seqnames", "start", "end"], ["Chromosome", "Start", "End"], ["chr", "chromStart", "chromEnd"]]
)
def test_peaks_are_recognised_by_interval_columns(columns, adata, tmp_path):
    peaks = make_peaks(adata.obs_names)
    expected = tokens(FORMATS["h5ad csr"](peaks, tmp_path), tmp_path / "a.h5ad", "atac")
    intervals = peaks.var_names.str.extract(r"(\w+):(\d+)-(\d+)").to_numpy()
    peaks.var = pd.DataFrame(intervals, [f"peak_{i}" for i in range(peaks.n_vars)], columns)
    found = tokens(FORMATS["h5ad csr"](peaks, tmp_path), tmp_path / "b.h5ad", "atac")
    pd.testing.assert_frame_equal(found, expected)


def test_genes_with_interval_columns_stay_genes(adata, tmp_path, capsys):
    """Even those of an unknown species, which needs --species other."""
    adata.var = pd.DataFrame({"chrom": "chr1", "start": 5, "end": 9}, index=adata.var_names)
    assert tokens(FORMATS["h5ad csr"](adata, tmp_path), tmp_path / "a.h5ad").shape == (12, 40)
    rng = np.random.default_rng(0)
    adata.var_names = ["".join(rng.choice(list("abcdefgh"), 6)) for _ in range(40)]
    path = FORMATS["h5ad csr"](adata, tmp_path)
    assert "--species other" in error_of(capsys, "preprocess", data_path=path, out_path=tmp_path / "b.h5ad")
    assert not (tmp_path / "b.h5ad").exists()
    found = tokens(path, tmp_path / "b.h5ad", species="other")
    assert list(found.columns) == sorted(adata.var_names)


@pytest.mark.parametrize("kind", ["ATAC", "Peaks", "peak"])
def test_feature_types_override_names(kind, adata, tmp_path):
    """Features with names of genes are peaks if their type is."""
    peaks = make_peaks(adata.obs_names)
    expected = tokens(FORMATS["h5ad csr"](peaks, tmp_path), tmp_path / "a.h5ad", "atac")
    intervals = peaks.var_names.str.extract(r"(\w+):(\d+)-(\d+)").to_numpy()
    peaks.var = pd.DataFrame(intervals, adata.var_names[:30], ["chrom", "start", "end"]).assign(feature_types=kind)
    found = tokens(FORMATS["h5ad csr"](peaks, tmp_path), tmp_path / "b.h5ad", "atac")
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize("kind", ["GEX", "Gene Expression", "gene"])
def test_the_feature_type_gene_overrides_names_of_peaks(kind, adata, tmp_path, capsys):
    adata.var["feature_types"] = kind
    adata.write(tmp_path / "rna.h5ad")
    assert list(open_cells(str(tmp_path / "rna.h5ad"), None, None).modalities) == ["rna"]
    peaks = make_peaks(adata.obs_names)
    peaks.var["feature_types"] = kind
    path = FORMATS["h5ad csr"](peaks, tmp_path)
    line = error_of(capsys, "preprocess", data_path=path, out_path=tmp_path / "o.h5ad")
    assert f"{path}: " in line
    assert "30 ids" in line


@pytest.mark.parametrize("form", ["chr{}.{}.{}", "X{}.{}.{}"])
def test_peak_names_written_by_r_are_read(form, adata, tmp_path):
    peaks = make_peaks(adata.obs_names)
    expected = tokens(FORMATS["h5ad csr"](peaks, tmp_path), tmp_path / "a.h5ad", "atac")
    peaks.var_names = [form.format(*name[3:].replace(":", "-").split("-")) for name in peaks.var_names]
    found = tokens(FORMATS["h5ad csr"](peaks, tmp_path), tmp_path / "b.h5ad", "atac")
    pd.testing.assert_frame_equal(found, expected)


# Annotation ----------------------------------------------------------------------------------------------------------


def obs_columns(n: int) -> dict:
    half = np.arange(n) % 2 == 0
    return {
        "flag": half,
        "number": np.arange(n),
        "nullable_flag": pd.array([None, *half[1:]], dtype="boolean"),
        "nullable_number": pd.array([None, *range(1, n)], dtype="Int64"),
        "ordered": pd.Categorical(np.where(half, "lo", "hi"), categories=["lo", "hi"], ordered=True),
        "text": np.where(half, "a", "b"),
    }


def test_annotation_keeps_its_dtypes(adata, tmp_path):
    adata.obs = adata.obs.assign(**obs_columns(12))
    tokens(FORMATS["h5ad csr"](adata, tmp_path), tmp_path / "ready.h5ad")
    found = ad.read_h5ad(tmp_path / "ready.h5ad").obs
    pd.testing.assert_frame_equal(found[["flag", "number"]], adata.obs[["flag", "number"]])
    assert [str(found[name].dtype) for name in ("nullable_flag", "nullable_number")] == ["boolean", "Int64"]
    assert found["nullable_number"].isna().tolist() == [True] + [False] * 11
    assert (found["ordered"].cat.ordered, list(found["ordered"].cat.categories)) == (True, ["lo", "hi"])


def test_annotation_of_two_modalities_is_merged(adata, tmp_path):
    """They share some of their cells. Numbers as names of donors stay numbers."""
    rna, peaks = adata[:8].copy(), make_peaks(adata.obs_names)[4:].copy()
    rna.obs = rna.obs.assign(**obs_columns(8), donor=[1, 2] * 4, batch=[0, 1] * 4)
    peaks.obs["batch"] = ["b"] * 8
    mudata.MuData({"rna": rna, "atac": peaks}).write(tmp_path / "cells.h5mu")
    split = {"split_by": "donor", "test_groups": "1"}
    run("preprocess", data_path=tmp_path / "cells.h5mu", out_path=tmp_path / "ready.h5mu", **split)
    obs = mudata.read_h5mu(tmp_path / "ready.h5mu").obs.loc[adata.obs_names]
    assert (obs["split"] == "test").tolist() == [True, False] * 4 + [False] * 4
    assert obs["flag"].isna().tolist() == [False] * 8 + [True] * 4
    assert obs["batch"].astype(str).tolist() == ["0", "1"] * 4 + ["b"] * 4


def test_an_index_may_have_the_name_of_a_column_in_the_other_file(adata, tmp_path):
    peaks = make_peaks(pd.Index(list(adata.obs_names)))
    adata.obs.index.name = "barcode"
    peaks.obs["barcode"] = "x"
    adata.write(tmp_path / "rna.h5ad")
    peaks.write(tmp_path / "atac.h5ad")
    pair = {"rna_path": tmp_path / "rna.h5ad", "atac_path": tmp_path / "atac.h5ad"}
    run("preprocess", **pair, out_path=tmp_path / "ready.h5mu")
    assert (read_cells(tmp_path / "ready.h5mu", ("rna", "atac")).obs["barcode"] == "x").all()


def test_an_existing_split_column_is_renamed(adata, tmp_path, capsys):
    adata.obs["split"] = ["mine"] * 12
    tokens(FORMATS["h5ad csr"](adata, tmp_path), tmp_path / "ready.h5ad")
    assert "obs['split_before']" in capsys.readouterr().out
    assert (ad.read_h5ad(tmp_path / "ready.h5ad").obs["split_before"] == "mine").all()


# Text ----------------------------------------------------------------------------------------------------------------


def test_annotation_columns_in_text_go_to_obs(adata, tmp_path):
    expected = tokens(FORMATS["h5ad csr"](adata, tmp_path), tmp_path / "a.h5ad")
    table = pd.DataFrame(dense(adata).astype(int), adata.obs_names, adata.var_names)
    table.insert(0, "nCount_RNA", table.sum(axis=1))
    table.insert(1, "nFeature_RNA", (table > 0).sum(axis=1))
    table["seurat_clusters"], table["cell_type"] = 3, "T"
    table.to_csv(tmp_path / "cells.csv")
    pd.testing.assert_frame_equal(tokens(tmp_path / "cells.csv", tmp_path / "ready.h5ad"), expected)
    obs = ad.read_h5ad(tmp_path / "ready.h5ad").obs
    assert obs["nCount_RNA"].tolist() == dense(adata).sum(1).tolist()
    assert (obs["cell_type"] == "T").all()


def test_duplicate_genes_are_summed_and_duplicate_barcodes_refused(adata, tmp_path, capsys):
    """Mouse genes are summed, too, although their symbols are not looked up."""
    adata.var_names = [f"Abc{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(39)] + ["Abcaa"]
    text("cells.csv", ",")(adata, tmp_path)
    found = tokens(tmp_path / "cells.csv", tmp_path / "ready.h5ad")
    assert found.shape == (12, 39)
    assert "Abcaa from Abcaa and Abcaa" in capsys.readouterr().out
    adata.obs_names = ["cell A", "cell A", *adata.obs_names[2:]]
    path = text("cells.csv", ",", turned=True)(adata, tmp_path)
    line = error_of(capsys, "preprocess", data_path=path, out_path=tmp_path / "o.h5ad")
    assert f"{path}: " in line
    assert "not unique" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b"\x89HDF\r\n\x1a\n", mtime=0), ["zipped HDF5", "gunzip"]),
        ("a,b\nc,1\n".encode("utf-16"), ["UTF-8"]),
        (b"a,b,c\nd,1\n", ["not a table", "3 names", "2 values"]),
    ],
)
def test_text_that_is_not_a_table_of_counts_is_refused(content, words, tmp_path, capsys):
    path = tmp_path / "cells.csv.gz"
    path.write_bytes(content)
    line = error_of(capsys, "preprocess", data_path=path, out_path=tmp_path / "o.h5ad")
    for word in (f"{path}: ", *words):
        assert word in line


@pytest.mark.parametrize("blank", [0, 1, 2])
def test_blank_lines_in_text_are_skipped(blank, adata, tmp_path):
    path = text("cells.csv", ",")(adata, tmp_path)
    expected = tokens(path, tmp_path / "a.h5ad")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:blank], "", *lines[blank:], ""]))
    pd.testing.assert_frame_equal(tokens(path, tmp_path / "b.h5ad"), expected)


def test_cells_of_a_table_of_genes_by_cells_may_have_any_name(adata, tmp_path):
    """A pseudo-bulk or a donor may be called as annotation is."""
    adata.obs_names = ["T_cluster", "donor", "batch", *adata.obs_names[3:]]
    expected = tokens(FORMATS["h5ad csr"](adata, tmp_path), tmp_path / "a.h5ad")
    pd.DataFrame(dense(adata), adata.obs_names, adata.var_names).T.to_csv(tmp_path / "genes_by_cells.tsv", sep="\t")
    pd.testing.assert_frame_equal(tokens(tmp_path / "genes_by_cells.tsv", tmp_path / "b.h5ad"), expected)


def test_annotation_in_text_may_change_its_kind(adata, tmp_path, monkeypatch):
    """Numbers in one block of lines and names in the next: the column is text. All numbers: it is numbers."""
    monkeypatch.setattr(read_text, "__defaults__", (4,))
    table = pd.DataFrame(dense(adata).astype(int), adata.obs_names, adata.var_names)
    table.insert(0, "donor", [str(i) if i < 6 else f"P{i}" for i in range(adata.n_obs)])
    table.insert(1, "batch", range(adata.n_obs))
    table.to_csv(tmp_path / "cells.csv")
    run("preprocess", data_path=tmp_path / "cells.csv", out_path=tmp_path / "ready.h5ad")
    obs = ad.read_h5ad(tmp_path / "ready.h5ad").obs
    assert list(obs["donor"].astype(str)) == list(table["donor"]) and list(obs["batch"]) == list(table["batch"])


def test_a_10x_file_of_two_genomes_is_refused(adata, tmp_path, capsys):
    path = FORMATS["10x h5 v2"](adata, tmp_path)
    with h5py.File(path, "r+") as file:
        file.copy("GRCh38", file, name="mm10")
    line = error_of(capsys, "preprocess", data_path=path, out_path=tmp_path / "o.h5ad")
    assert lacks(line, path, "GRCh38", "mm10", "genome=") == []


def test_gzipped_text_is_read_whatever_its_suffix(adata, tmp_path):
    path = text("cells.csv", ",")(adata, tmp_path)
    expected = tokens(path, tmp_path / "a.h5ad")
    path.write_bytes(gzip.compress(path.read_bytes()))
    pd.testing.assert_frame_equal(tokens(path, tmp_path / "b.h5ad"), expected)


# 10x -----------------------------------------------------------------------------------------------------------------


def test_a_10x_folder_with_peaks_bed_is_read(adata, tmp_path):
    peaks = make_peaks(adata.obs_names)
    expected = tokens(FORMATS["h5ad csr"](peaks, tmp_path), tmp_path / "a.h5ad", "atac")
    folder = tmp_path / "peaks"
    folder.mkdir()
    mmwrite(folder / "matrix.mtx", csc_matrix(dense(peaks).T.astype(int)))
    (folder / "barcodes.tsv").write_text("\n".join(peaks.obs_names))
    (folder / "peaks.bed").write_text("\n".join(name.replace(":", "\t").replace("-", "\t") for name in peaks.var_names))
    pd.testing.assert_frame_equal(tokens(folder, tmp_path / "b.h5ad", "atac"), expected)


def test_a_10x_folder_with_files_of_different_sizes_is_refused(adata, tmp_path, capsys):
    folder = FORMATS["10x folder v2"](adata, tmp_path)
    (folder / "barcodes.tsv").write_text("\n".join(["barcode", *adata.obs_names]))
    line = error_of(capsys, "preprocess", data_path=folder, out_path=tmp_path / "o.h5ad")
    for word in (f"{folder}: ", "matrix.mtx", "genes.tsv", "barcodes.tsv", "12", "13", "40"):
        assert word in line


def test_a_file_of_antibodies_alone_is_refused(adata, tmp_path, capsys):
    adata.var["feature_types"] = "Antibody Capture"
    adata.write(tmp_path / "cells.h5ad")
    line = error_of(capsys, "preprocess", data_path=tmp_path / "cells.h5ad", out_path=tmp_path / "o.h5ad")
    assert f"{tmp_path / 'cells.h5ad'}: " in line
    assert "Antibody Capture" in line


# Symbols and flags --------------------------------------------------------------------------------------------------


def test_raw_uses_symbols_that_only_var_has(adata, tmp_path):
    """CELLxGENE has Ensembl ids in both indices and symbols in var alone; here of mouse, which are not translated."""
    symbols = [f"Gene{i}a" for i in range(40)]
    adata.var = pd.DataFrame({"feature_name": symbols}, index=[f"ENSMUSG{i:011d}" for i in range(40)])
    adata.raw = ad.AnnData(adata.X.copy(), adata.obs, pd.DataFrame(index=adata.var_names))
    adata.X = np.log1p(dense(adata))
    adata.write(tmp_path / "cells.h5ad")
    assert list(tokens(tmp_path / "cells.h5ad", tmp_path / "ready.h5ad").columns) == sorted(symbols)


def test_the_stamp_holds_the_hashes_of_both_files(adata, tmp_path):
    for name, content in (("a", adata), ("b", make_peaks(adata.obs_names))):
        (tmp_path / name).mkdir()
        content.write(tmp_path / name / "x.h5ad")
    pair = {"rna_path": tmp_path / "a" / "x.h5ad", "atac_path": tmp_path / "b" / "x.h5ad"}
    run("preprocess", **pair, out_path=tmp_path / "ready.h5mu")
    stamp = open_cells(str(tmp_path / "ready.h5mu"), None, None).stamp
    assert len({entry["sha256"] for entry in stamp["source"]}) == 2


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"min_gene_coverage": 30}, "--min_gene_coverage 30"),
        ({"target_sum": "mean"}, "--target_sum 'mean'"),
        ({"split_by": "donor", "test_groups": "D1"}, "--split_by donor"),
        ({"values": "log1p"}, "--values log1p"),
    ],
)
def test_mistaken_flags_are_named(flags, word, adata, tmp_path, capsys):
    adata.X = csr_matrix(dense(adata) * 100)  # too large for logarithms
    path = FORMATS["h5ad csr"](adata, tmp_path)
    assert word in error_of(capsys, "preprocess", data_path=path, out_path=tmp_path / "o.h5ad", **flags)
