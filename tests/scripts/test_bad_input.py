"""Bad input, one row per case: one line on stderr, exit code 2, no traceback, and nothing is written."""

import os
import resource
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from tests.builders import make_cells, make_peaks
from tests.helpers import error_of, lacks, run
from tests.processes import Processes


def cells(change: Callable[[ad.AnnData], object] | None = None, file: ad.AnnData | None = None) -> Callable:
    """An .h5ad of twelve human cells, after a change."""

    def make(path: Path) -> None:
        adata = make_cells() if file is None else file.copy()
        changed = change(adata) if change else None
        (changed if isinstance(changed, ad.AnnData) else adata).write(path)

    return make


def values(change: Callable[[np.ndarray], None]) -> Callable:
    def apply(adata: ad.AnnData) -> None:
        dense = adata.X.toarray()
        change(dense)
        adata.X = csr_matrix(dense)

    return cells(apply)


def put(value: float) -> Callable:
    return values(lambda dense: dense.__setitem__((3, 4), value))


def truncated(path: Path) -> None:
    cells()(path)
    path.write_bytes(path.read_bytes()[:6000])


def labelled(path: Path, labels: list) -> None:
    cells(lambda adata: adata.obs.__setitem__("cell_type", pd.Categorical(labels)))(path)


def two_files(path: Path, peaks: ad.AnnData) -> dict:
    cells()(path)
    peaks.write(path.with_name("atac.h5ad"))
    return {"data_path": None, "rna_path": path, "atac_path": path.with_name("atac.h5ad"), "out_path": "{out}.h5mu"}


CELLS = make_cells()
BARCODE = CELLS.obs_names[3]
COUNTS = "layers['counts']"
"""Where the message asks the user to save the raw counts."""


def change_names(axis: str, names: Callable[[pd.Index], list]) -> Callable:
    """Cells with other names on an axis, "obs" or "var"."""
    return cells(lambda adata: setattr(adata, f"{axis}_names", names(getattr(adata, f"{axis}_names"))))


def one_modality(name: str, content: ad.AnnData) -> Callable:
    def make(path: Path) -> dict:
        mudata.MuData({name: content}).write(path.with_name("cells.h5mu"))
        return {"data_path": path.with_name("cells.h5mu"), "out_path": "{out}.h5mu"}

    return make


def with_flags(make: Callable, **flags) -> Callable:
    return lambda path: make(path) or flags


def strange_genes(path: Path) -> dict:
    change_names("var", lambda names: [f"x{i}" for i in range(40)])(path)
    path.with_name("genes.txt").write_text("CD3D\nGAD1\n")
    return {"gene_reference": path.with_name("genes.txt")}


# What is made at `path` (a maker may return flags), and the words that the message must hold: the file or flag, what is
# wrong in a word, and where there is one, the flag or place that mends it.
TABLE = {
    "missing file": (lambda path: None, "{path}: ", "no such file"),
    "folder": (Path.mkdir, "{path}: ", "folder", "matrix.mtx", "--rna_path", "--atac_path"),
    "truncated": (truncated, "{path}: ", "not a readable .h5ad"),
    "not HDF5": (lambda path: path.write_text("gene\tcount\n"), "{path}: ", "not a readable .h5ad", "no HDF5"),
    "empty file": (Path.touch, "{path}: ", "empty"),
    "HDF5 of something else": (
        lambda path: h5py.File(path, "w").create_dataset("pixels", data=[1]).file.close(),
        "{path}: ",
        "HDF5",
        *(".h5ad", ".h5mu", ".loom", ".csv", ".tsv", ".txt"),
    ),
    "zero cells": (cells(lambda adata: adata[:0].copy()), "{path}: ", "no cells", "rna"),
    "zero genes": (cells(lambda adata: adata[:, :0].copy()), "{path}: ", "no features", "rna"),
    "all cells zero": (values(lambda dense: dense.fill(0)), "{path}: ", "rna", "zero", " X"),
    "NaN": (put(np.nan), "{path}: ", "NaN", "X of rna", BARCODE),
    "infinite": (put(np.inf), "{path}: ", "infinite", "X of rna", BARCODE, COUNTS),
    "negative": (put(-1), "{path}: ", "negative", "rna", COUNTS),
    "no counts": (put(0.5), "{path}: ", "fractional", "rna", COUNTS, "--values cpm", "--values counts"),
    "no gene matched": (strange_genes, "{path}: ", "0 of the 2 genes", "--min_gene_coverage", "CD3D", "var_names"),
    "numbers for genes": (
        change_names("var", lambda names: [str(i) for i in range(40)]),
        "{path}: ",
        *("numbers", "0, 1, 2", "Entrez", "var_names"),
    ),
    "every symbol twice": (
        change_names("var", lambda names: [*names[:20], *names[:20]]),
        "{path}: ",
        *("40 genes", "symbol", CELLS.var_names[0]),
    ),
    "barcodes twice": (
        change_names("obs", lambda names: [BARCODE, *names[1:]]),
        "{path}: ",
        *("barcodes", "rna", "unique", BARCODE),
    ),
    "no such label column": (
        lambda path: labelled(path, ["T"] * 12) or {"label_column": "kind"},
        *("--label_column kind", "cell_type"),
    ),
    "no label": (
        lambda path: labelled(path, [None] * 12),
        "{path}: ",
        *("obs['cell_type']", "12", "missing", "--label_column"),
    ),
    "no shared barcode": (
        lambda path: two_files(path, make_peaks(pd.Index([f"other{i}" for i in range(5)]))),
        *("{path}", "{folder}/atac.h5ad", "barcode", CELLS.obs_names[0], "other0"),
    ),
    "RNA for ATAC": (lambda path: two_files(path, CELLS), "--atac_path {folder}/atac.h5ad", "rna", "no atac"),
    "one of two files": (
        lambda path: cells()(path) or {"data_path": None, "rna_path": path},
        *("--data_path", "--rna_path", "--atac_path"),
    ),
    "no modality": (one_modality("adt", CELLS.copy()), "{folder}/cells.h5mu: ", "no modality", "rna", "atac", "adt"),
    "peaks that are no intervals": (
        one_modality("atac", CELLS.copy()),
        "{folder}/cells.h5mu: ",
        *("40 of 40 peaks", "chr1:10-20", "chrom, start and end"),
    ),
    "peaks of another build": (
        with_flags(cells(file=make_peaks(CELLS.obs_names)), genome="mm10"),
        "{path}: ",
        *("1 of 30 peaks", "mm10", "chr20:19000-19500", "hg19, hg38", "--genome"),
    ),
    "no such genome": (
        with_flags(cells(file=make_peaks(CELLS.obs_names)), genome="hg37"),
        *("genome", "hg37", "hg19, hg38, mm10, mm39"),
    ),
    "no output": (with_flags(cells(), out_path=None), "--out_path", "missing"),
    "output is input": (lambda path: cells()(path) or {"out_path": path}, "--out_path {path}", "input"),
    "output of another kind": (with_flags(cells(), out_path="{out}.h5mu"), "--out_path {out}.h5mu", " .h5ad"),
    "output in a file": (
        lambda path: cells()(path) or {"out_path": path / "out.h5ad"},
        *("{path}/out.h5ad: ", "File exists", "--out_path"),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name, tmp_path, capsys):
    make, *words = TABLE[name]
    path = tmp_path / "cells.h5ad"
    changes = make(path)
    names = {"path": path, "folder": tmp_path, "out": tmp_path / "out"}
    flags = {"data_path": path, "out_path": "{out}.h5ad"} | (changes if isinstance(changes, dict) else {})
    flags = {flag: str(value).format(**names) for flag, value in flags.items() if value is not None}
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir() if entry.is_file()}
    line = error_of(capsys, "preprocess", **flags)
    assert lacks(line, *(word.format(**names) for word in words)) == []
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir() if entry.is_file()} == before


# Accepted, and reported ----------------------------------------------------------------------------------------------


def preprocessed(path: Path, capsys, **flags) -> tuple[str, ad.AnnData]:
    """The output on the terminal and the file of a run that succeeds."""
    capsys.readouterr()
    run("preprocess", data_path=path, out_path=path.with_name("out.h5ad"), **flags)
    return capsys.readouterr().out, ad.read_h5ad(path.with_name("out.h5ad"))


def test_cells_without_counts_are_dropped_and_counted(tmp_path, capsys):
    values(lambda dense: dense.__setitem__(([2, 5], slice(None)), 0))(tmp_path / "cells.h5ad")
    text, out = preprocessed(tmp_path / "cells.h5ad", capsys)
    assert "2 cells" in text
    assert list(out.obs_names) == list(np.delete(CELLS.obs_names, [2, 5]))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["T"] * 12, ("1 cell types", "cell_type", "single type")),
        (["T"] * 5 + ["B"] * 6 + ["NK"], ("3 cell types", "cell_type", "NK")),
        (["T"] * 5 + ["B"] * 4 + [None] * 3, ("2 cell types", "cell_type", "3 cells")),
    ],
)
def test_labels_that_teach_little(labels, words, tmp_path, capsys):
    labelled(tmp_path / "cells.h5ad", labels)
    text, out = preprocessed(tmp_path / "cells.h5ad", capsys, val_fraction=0.5)
    last = text.rstrip().splitlines()[-1]
    assert lacks(last, *words) == []
    alone = pd.Series(labels).value_counts().loc[lambda n: n == 1].index
    assert (out.obs.loc[out.obs["cell_type"].isin(alone), "split"] == "train").all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -2.0])
def test_a_bad_value_beyond_the_sample_names_its_cell(value, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.files.source.SAMPLE", 8)  # rows 0, 1, 3, 4, 6, 7, 9 and 11
    path = tmp_path / "cells.h5ad"
    values(lambda dense: dense.__setitem__((8, 4), value))(path)
    line = error_of(capsys, "preprocess", data_path=path, out_path=tmp_path / "out.h5ad")
    what = {"nan": "NaN", "inf": "infinite", "-2.0": "negative"}[str(value)]
    assert lacks(line, f"{path}: ", "X of rna", what, CELLS.obs_names[8]) == []
    assert (COUNTS in line) == (not np.isnan(value))
    assert not (tmp_path / "out.h5ad").exists()


# Nothing is replaced by half a file ----------------------------------------------------------------------------------


def test_a_failing_run_leaves_the_old_output(tmp_path, capsys):
    path, out = tmp_path / "cells.h5ad", tmp_path / "out.h5ad"
    cells()(path)
    run("preprocess", data_path=path, out_path=out)
    before = out.read_bytes()
    put(0.5)(path)
    error_of(capsys, "preprocess", data_path=path, out_path=out)
    assert out.read_bytes() == before
    cells(lambda adata: adata[:6].copy())(path)
    run("preprocess", data_path=path, out_path=out)
    assert ad.read_h5ad(out).n_obs == 6
    assert sorted(os.listdir(tmp_path)) == ["cells.h5ad", "out.h5ad"]


@pytest.mark.parametrize("kind", ["small disk", "file size limit"])
def test_a_full_disk_is_told_and_leaves_the_old_output(kind, tmp_path):
    path, disk, limit = tmp_path / "cells.h5ad", tmp_path / "disk", None
    cells(file=make_cells(n_cells=300, n_genes=2000))(path)
    disk.mkdir()
    if kind == "small disk":
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs rights that this user has not")
    else:
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (10**6, 10**6))
    try:
        out = disk / "out.h5ad"
        out.write_text("old")
        output = tmp_path / "output.txt"
        codes = Processes("preprocess", {"data_path": path, "out_path": out}, 1, output, limit).start().join()
        assert codes == [2], output.read_text()
        cause = "No space left on device" if kind == "small disk" else "File too large"
        (line,) = [line for line in output.read_text().splitlines() if "error" in line.lower()]
        assert line.startswith(f"preprocess.py: error: {out}: ") and cause in line
        assert out.read_text() == "old"
        assert os.listdir(disk) == ["out.h5ad"]
    finally:
        if kind == "small disk":
            subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path, capsys):
    path, folder = tmp_path / "cells.h5ad", tmp_path / "locked"
    cells()(path)
    folder.mkdir(mode=0o500)
    line = error_of(capsys, "preprocess", data_path=path, out_path=folder / "out.h5ad")
    assert lacks(line, f"{folder / 'out.h5ad'}: ", "Permission denied", "--out_path") == []
