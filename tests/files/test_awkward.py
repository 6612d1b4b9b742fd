"""Files that are awkward in ways that have been seen: each goes in right, or is told why not."""

import gzip

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy.io import mmwrite
from scipy.sparse import csc_matrix, csr_matrix

from tests.builders import make_cells, make_peaks, tokens
from tests.formats import FORMATS, dense, text
from tests.helpers import error_of, run
from utils.cells.preprocessed import open_cells, read_cells


@pytest.fixture
def adata() -> ad.AnnData:
    return make_cells()


def counts(path) -> pd.DataFrame:
    out = ad.read_h5ad(path)
    return pd.DataFrame(out.layers["counts"].toarray(), out.obs_names, out.var_names)


def test_a_loom_of_velocyto_is_read_by_its_main_matrix(adata, tmp_path):
    """Its layers hold parts of the counts."""
    adata.layers["spliced"] = csr_matrix(np.minimum(dense(adata), 1))
    adata.obs_names.name, adata.var_names.name = "CellID", "Gene"
    adata.write_loom(tmp_path / "cells.loom")
    run("preprocess", data_path=tmp_path / "cells.loom", out_path=tmp_path / "ready.h5ad")
    found = counts(tmp_path / "ready.h5ad")
    np.testing.assert_array_equal(found[adata.var_names].to_numpy(), dense(adata))


@pytest.mark.parametrize(
    "columns", [["seqnames", "start", "end"], ["Chromosome", "Start", "End"], ["chr", "chromStart", "chromEnd"]]
)
def test_peaks_are_told_by_columns_of_any_usual_name(columns, adata, tmp_path):
    peaks = make_peaks(adata.obs_names)
    expected = tokens(FORMATS["h5ad csr"](peaks, tmp_path), tmp_path / "a.h5ad", "atac")
    intervals = peaks.var_names.str.extract(r"(\w+):(\d+)-(\d+)").to_numpy()
    peaks.var = pd.DataFrame(intervals, [f"peak_{i}" for i in range(peaks.n_vars)], columns)
    found = tokens(FORMATS["h5ad csr"](peaks, tmp_path), tmp_path / "b.h5ad", "atac")
    pd.testing.assert_frame_equal(found, expected)


def test_genes_with_places_in_the_genome_are_no_peaks(adata, tmp_path, capsys):
    """Not even those of a species that nobody here knows, which goes in when the user says that they are genes."""
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
def test_feature_types_go_before_names(kind, adata, tmp_path):
    """Peaks whose names say nothing are peaks, and genes named like peaks are genes, which no species has."""
    peaks = make_peaks(adata.obs_names)
    expected = tokens(FORMATS["h5ad csr"](peaks, tmp_path), tmp_path / "a.h5ad", "atac")
    intervals = peaks.var_names.str.extract(r"(\w+):(\d+)-(\d+)").to_numpy()
    peaks.var = pd.DataFrame(intervals, adata.var_names[:30], ["chrom", "start", "end"]).assign(feature_types=kind)
    found = tokens(FORMATS["h5ad csr"](peaks, tmp_path), tmp_path / "b.h5ad", "atac")
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize("kind", ["GEX", "Gene Expression", "gene"])
def test_genes_by_feature_type_are_not_read_as_peaks(kind, adata, tmp_path, capsys):
    adata.var["feature_types"] = kind
    adata.write(tmp_path / "rna.h5ad")
    assert list(open_cells(str(tmp_path / "rna.h5ad"), None, None).modalities) == ["rna"]
    peaks = make_peaks(adata.obs_names)
    peaks.var["feature_types"] = kind
    path = FORMATS["h5ad csr"](peaks, tmp_path)
    assert f"{path}: 0% of its 30 ids are genes" in error_of(
        capsys, "preprocess", data_path=path, out_path=tmp_path / "o.h5ad"
    )


@pytest.mark.parametrize("form", ["chr{}.{}.{}", "X{}.{}.{}"])
def test_peaks_as_r_names_them(form, adata, tmp_path):
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


def test_annotation_keeps_its_types(adata, tmp_path):
    adata.obs = adata.obs.assign(**obs_columns(12))
    tokens(FORMATS["h5ad csr"](adata, tmp_path), tmp_path / "ready.h5ad")
    found = ad.read_h5ad(tmp_path / "ready.h5ad").obs
    pd.testing.assert_frame_equal(found[["flag", "number"]], adata.obs[["flag", "number"]])
    assert [str(found[name].dtype) for name in ("nullable_flag", "nullable_number")] == ["boolean", "Int64"]
    assert found["nullable_number"].isna().tolist() == [True] + [False] * 11
    assert (found["ordered"].cat.ordered, list(found["ordered"].cat.categories)) == (True, ["lo", "hi"])


def test_annotation_of_some_cells_only(adata, tmp_path):
    """Two modalities that share some cells; a donor named by a number stays that number."""
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


def test_an_index_named_like_a_column_of_the_other_file(adata, tmp_path):
    peaks = make_peaks(pd.Index(list(adata.obs_names)))
    adata.obs.index.name = "barcode"
    peaks.obs["barcode"] = "x"
    adata.write(tmp_path / "rna.h5ad")
    peaks.write(tmp_path / "atac.h5ad")
    pair = {"rna_path": tmp_path / "rna.h5ad", "atac_path": tmp_path / "atac.h5ad"}
    run("preprocess", **pair, out_path=tmp_path / "ready.h5mu")
    assert (read_cells(tmp_path / "ready.h5mu", ("rna", "atac")).obs["barcode"] == "x").all()


def test_a_split_of_the_users_own_is_kept(adata, tmp_path, capsys):
    adata.obs["split"] = ["mine"] * 12
    tokens(FORMATS["h5ad csr"](adata, tmp_path), tmp_path / "ready.h5ad")
    assert "obs['split'] was there already: it is kept as obs['split_before']" in capsys.readouterr().out
    assert (ad.read_h5ad(tmp_path / "ready.h5ad").obs["split_before"] == "mine").all()


# Text ----------------------------------------------------------------------------------------------------------------


def test_columns_that_annotate_cells_are_no_genes(adata, tmp_path):
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


def test_names_that_occur_twice_in_a_text(adata, tmp_path, capsys):
    """A gene is summed, mouse genes too; a barcode is refused."""
    adata.var_names = [f"Abc{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(39)] + ["Abcaa"]
    text("cells.csv", ",")(adata, tmp_path)
    found = tokens(tmp_path / "cells.csv", tmp_path / "ready.h5ad")
    assert found.shape == (12, 39)
    assert "1 duplicate summed (Abcaa from Abcaa and Abcaa)" in capsys.readouterr().out
    adata.obs_names = ["cell A", "cell A", *adata.obs_names[2:]]
    path = text("cells.csv", ",", turned=True)(adata, tmp_path)
    assert "barcodes of rna are not unique" in error_of(
        capsys, "preprocess", data_path=path, out_path=tmp_path / "o.h5ad"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"\x89HDF\r\n\x1a\n"), "is a zipped HDF5 file; unpack it with gunzip first"),
        ("a,b\nc,1\n".encode("utf-16"), "is neither HDF5 nor text in UTF-8"),
        (b"a,b,c\nd,1\n", "no table: 3 names in its first line, but 2 values in the next"),
    ],
)
def test_what_is_no_text_of_counts(content, message, tmp_path, capsys):
    path = tmp_path / "cells.csv.gz"
    path.write_bytes(content)
    assert f"{path}: {message}" in error_of(capsys, "preprocess", data_path=path, out_path=tmp_path / "o.h5ad")


@pytest.mark.parametrize("blank", [0, 1, 2])
def test_blank_lines_in_a_text(blank, adata, tmp_path):
    path = text("cells.csv", ",")(adata, tmp_path)
    expected = tokens(path, tmp_path / "a.h5ad")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:blank], "", *lines[blank:], ""]))
    pd.testing.assert_frame_equal(tokens(path, tmp_path / "b.h5ad"), expected)


def test_a_text_zipped_under_another_name(adata, tmp_path):
    path = text("cells.csv", ",")(adata, tmp_path)
    expected = tokens(path, tmp_path / "a.h5ad")
    path.write_bytes(gzip.compress(path.read_bytes()))
    pd.testing.assert_frame_equal(tokens(path, tmp_path / "b.h5ad"), expected)


# 10x -----------------------------------------------------------------------------------------------------------------


def test_a_folder_of_peaks(adata, tmp_path):
    peaks = make_peaks(adata.obs_names)
    expected = tokens(FORMATS["h5ad csr"](peaks, tmp_path), tmp_path / "a.h5ad", "atac")
    folder = tmp_path / "peaks"
    folder.mkdir()
    mmwrite(folder / "matrix.mtx", csc_matrix(dense(peaks).T.astype(int)))
    (folder / "barcodes.tsv").write_text("\n".join(peaks.obs_names))
    (folder / "peaks.bed").write_text("\n".join(name.replace(":", "\t").replace("-", "\t") for name in peaks.var_names))
    pd.testing.assert_frame_equal(tokens(folder, tmp_path / "b.h5ad", "atac"), expected)


def test_a_folder_whose_parts_do_not_fit(adata, tmp_path, capsys):
    folder = FORMATS["10x folder v2"](adata, tmp_path)
    (folder / "barcodes.tsv").write_text("\n".join(["barcode", *adata.obs_names]))
    line = error_of(capsys, "preprocess", data_path=folder, out_path=tmp_path / "o.h5ad")
    assert f"{folder}: matrix.mtx holds 40 features × 12 cells, but genes.tsv names 40 and barcodes.tsv 13" in line


def test_antibodies_alone_are_no_genes(adata, tmp_path, capsys):
    adata.var["feature_types"] = "Antibody Capture"
    adata.write(tmp_path / "cells.h5ad")
    line = error_of(capsys, "preprocess", data_path=tmp_path / "cells.h5ad", out_path=tmp_path / "o.h5ad")
    assert "holds Antibody Capture, but neither genes nor peaks" in line


# Where symbols are ---------------------------------------------------------------------------------------------------


def test_symbols_of_raw_may_stand_in_var(adata, tmp_path):
    """CELLxGENE: Ensembl ids in both indices, symbols in var alone; mouse, which no table here translates."""
    symbols = [f"Gene{i}a" for i in range(40)]
    adata.var = pd.DataFrame({"feature_name": symbols}, index=[f"ENSMUSG{i:011d}" for i in range(40)])
    adata.raw = ad.AnnData(adata.X.copy(), adata.obs, pd.DataFrame(index=adata.var_names))
    adata.X = np.log1p(dense(adata))
    adata.write(tmp_path / "cells.h5ad")
    assert list(tokens(tmp_path / "cells.h5ad", tmp_path / "ready.h5ad").columns) == sorted(symbols)


def test_the_path_of_both_files_is_in_the_stamp(adata, tmp_path):
    for name, content in (("a", adata), ("b", make_peaks(adata.obs_names))):
        (tmp_path / name).mkdir()
        content.write(tmp_path / name / "x.h5ad")
    pair = {"rna_path": tmp_path / "a" / "x.h5ad", "atac_path": tmp_path / "b" / "x.h5ad"}
    run("preprocess", **pair, out_path=tmp_path / "ready.h5mu")
    stamp = open_cells(str(tmp_path / "ready.h5mu"), None, None).stamp
    assert len({entry["sha256"] for entry in stamp["source"]}) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"min_gene_coverage": 30}, "--min_gene_coverage 30.0 is a share: give a number from 0 to 1"),
        ({"target_sum": "mean"}, "--target_sum 'mean'"),
        ({"split_by": "donor", "test_groups": "D1"}, "--split_by donor: no such column"),
        ({"values": "log1p"}, "rna has values in X that are too large for logarithms; leave out --values log1p"),
    ],
)
def test_mistaken_flags(flags, message, adata, tmp_path, capsys):
    adata.X = csr_matrix(dense(adata) * 100)
    path = FORMATS["h5ad csr"](adata, tmp_path)
    assert message in error_of(capsys, "preprocess", data_path=path, out_path=tmp_path / "o.h5ad", **flags)
