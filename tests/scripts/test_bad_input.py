"""Bad input: one row per case, the sentence to the letter, exit code 2, no traceback, and nothing written."""

import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from tests.builders import make_cells, make_peaks
from tests.helpers import command_line, error_of, python, run


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


BARCODE = make_cells().obs_names[3]
SAVE = "save the raw counts in layers['counts']"
NEW = "copy or download it again"

# What is made at `path` (a maker may return flags), and the sentence after "preprocess.py: error: "; * is anything.
TABLE = {
    "missing file": (lambda path: None, "{path}: no such file"),
    "folder": (
        Path.mkdir,
        "{path}: a folder with no matrix.mtx (or .gz); give a file (two by --rna_path and --atac_path), or the 10x "
        "folder of one sample, with matrix.mtx, "
        "barcodes.tsv and features.tsv",
    ),
    "truncated": (truncated, "{path}: not a readable .h5ad file (*); " + NEW),
    "not HDF5": (
        lambda path: path.write_text("gene\tcount\n"),
        "{path}: not a readable .h5ad file (no HDF5 signature); " + NEW,
    ),
    "empty file": (Path.touch, "{path}: is empty; " + NEW),
    "HDF5 of something else": (
        lambda path: h5py.File(path, "w").create_dataset("pixels", data=[1]).file.close(),
        "{path}: an HDF5 file that holds no cells; known formats are .h5ad, .h5mu, 10x .h5, a 10x matrix folder, "
        ".loom, or delimited text (.csv, .tsv, .txt, also .gz)",
    ),
    "zero cells": (
        cells(lambda adata: adata[:0].copy()),
        "{path}: has no cells in rna; give the file from before they were filtered",
    ),
    "zero genes": (
        cells(lambda adata: adata[:, :0].copy()),
        "{path}: has no features in rna; give the file from before they were filtered",
    ),
    "all cells zero": (
        values(lambda dense: dense.fill(0)),
        "{path}: rna has no value above zero in X; there is nothing to learn from or to label",
    ),
    "NaN": (put(np.nan), f"{{path}}: X of rna has a missing value (NaN) in cell {BARCODE}; write 0 *"),
    "infinite": (put(np.inf), f"{{path}}: X of rna has an infinite value in cell {BARCODE}; " + SAVE),
    "negative": (
        put(-1),
        "{path}: rna has negative values: scaled, centred or batch-corrected data in X; " + SAVE + " before scaling",
    ),
    "no counts": (
        put(0.5),
        "{path}: rna has fractional values that are neither scaled counts nor their logarithms in X; "
        + SAVE
        + ", use the values as shares of a cell by --values cpm, or take them as estimated counts by --values counts",
    ),
    "no gene matched": (
        lambda path: (
            cells(lambda adata: setattr(adata, "var_names", [f"x{i}" for i in range(40)]))(path)
            or (
                path.with_name("genes.txt").write_text("CD3D\nGAD1\n")
                and {"gene_reference": path.with_name("genes.txt")}
            )
        ),
        "{path}: has 0 of the 2 genes asked for (0.0%; --min_gene_coverage is 0.3); its gene ids are not recognised, "
        "expected are symbols like CD3D, GAD1; put gene symbols into var_names; most expressed unmatched: *",
    ),
    "numbers for genes": (
        cells(lambda adata: setattr(adata, "var_names", [str(i) for i in range(40)])),
        "{path}: names its genes by numbers (0, 1, 2 …) that are no Entrez ids; put symbols or Ensembl "
        "ids into var_names",
    ),
    "every symbol twice": (
        cells(lambda adata: setattr(adata, "var_names", [*adata.var_names[:20], *adata.var_names[:20]])),
        "{path}: every one of its 40 genes shares its symbol with another (* …), as if tables had been joined side by "
        "side; keep one of them",
    ),
    "barcodes twice": (
        cells(lambda adata: setattr(adata, "obs_names", [BARCODE, *adata.obs_names[1:]])),
        f"{{path}}: barcodes of rna are not unique (1 occur more than once, like {BARCODE}); tell the samples apart "
        "first, for example by anndata.concat(..., index_unique='-')",
    ),
    "no such label column": (
        lambda path: labelled(path, ["T"] * 12) or {"label_column": "kind"},
        "--label_column kind: no such column; obs has cell_type",
    ),
    "no label": (
        lambda path: labelled(path, [None] * 12),
        "{path}: all 12 values of obs['cell_type'] are missing; drop the column or name another by --label_column",
    ),
    "no shared barcode": (
        lambda path: two_files(path, make_peaks(pd.Index([f"other{i}" for i in range(5)]))),
        f"{{path}} and {{folder}}/atac.h5ad: share no barcode (like {make_cells().obs_names[0]} and "
        "other0); give files of the same cells",
    ),
    "RNA for ATAC": (
        lambda path: two_files(path, make_cells()),
        "--atac_path {folder}/atac.h5ad: holds rna, but no atac",
    ),
    "one of two files": (
        lambda path: cells()(path) or {"data_path": None, "rna_path": path},
        "give --data_path, or --rna_path and --atac_path together",
    ),
    "no modality": (
        lambda path: (
            mudata.MuData({"adt": make_cells()}).write(path.with_suffix(".h5mu"))
            or {"data_path": path.with_suffix(".h5mu")}
        ),
        "{folder}/cells.h5mu: has no modality named rna or atac, only adt; rename them",
    ),
    "peaks that are no intervals": (
        lambda path: (
            mudata.MuData({"atac": make_cells()}).write(path.with_suffix(".h5mu"))
            or {"data_path": path.with_suffix(".h5mu"), "out_path": "{out}.h5mu"}
        ),
        "{folder}/cells.h5mu: 40 of 40 peaks cannot be read (*); write them as chr1:10-20, chr1-10-20, chr1_10_20 or "
        "chr1.10.20 with end > start, or var columns chrom, start and end",
    ),
    "peaks of another build": (
        lambda path: cells(file=make_peaks(make_cells().obs_names))(path) or {"genome": "mm10"},
        "{path}: 1 of 30 peaks lie outside mm10 (chr20:19000-19500); they fit hg19, hg38: state it by --genome, or "
        "lift the peaks over",
    ),
    "no such genome": (
        lambda path: cells(file=make_peaks(make_cells().obs_names))(path) or {"genome": "hg37"},
        "no chromosome sizes for genome 'hg37'; known: hg19, hg38, mm10, mm39",
    ),
    "no output": (
        lambda path: cells()(path) or {"out_path": None},
        "--out_path is missing: name the .h5ad file to write",
    ),
    "output is input": (
        lambda path: cells()(path) or {"out_path": path},
        "--out_path {path}: is the input; name another file",
    ),
    "output of another kind": (
        lambda path: cells()(path) or {"out_path": "{out}.h5mu"},
        "--out_path {out}.h5mu: must end in .h5ad, which is what these cells are written as",
    ),
    "output in a file": (
        lambda path: cells()(path) or {"out_path": path / "out.h5ad"},
        "{path}/out.h5ad: cannot be written (File exists); choose another --out_path",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name, tmp_path, capsys):
    make, sentence = TABLE[name]
    path = tmp_path / "cells.h5ad"
    changes = make(path)
    names = {"path": path, "folder": tmp_path, "out": tmp_path / "out"}
    flags = {"data_path": path, "out_path": "{out}.h5ad"} | (changes if isinstance(changes, dict) else {})
    flags = {flag: str(value).format(**names) for flag, value in flags.items() if value is not None}
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir() if entry.is_file()}
    line = error_of(capsys, "preprocess", **flags).removeprefix("preprocess.py: error: ")
    for part in sentence.format(**names).split("*"):
        assert part in line
    start, *_, end = (*sentence.format(**names).split("*"), "") if "*" in sentence else (sentence.format(**names),) * 2
    assert line.startswith(start)
    assert line.endswith(end)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir() if entry.is_file()} == before


# Not mistakes, but told ----------------------------------------------------------------------------------------------


def told(path: Path, capsys, **flags) -> tuple[str, ad.AnnData]:
    """What a run that succeeds prints and writes."""
    capsys.readouterr()
    run("preprocess", data_path=path, out_path=path.with_name("out.h5ad"), **flags)
    return capsys.readouterr().out, ad.read_h5ad(path.with_name("out.h5ad"))


def test_cells_without_counts_are_dropped_and_counted(tmp_path, capsys):
    values(lambda dense: dense.__setitem__(([2, 5], slice(None)), 0))(tmp_path / "cells.h5ad")
    text, out = told(tmp_path / "cells.h5ad", capsys)
    assert "  2 cells without a count in these genes" in text.splitlines()
    assert list(out.obs_names) == list(np.delete(make_cells().obs_names, [2, 5]))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["T"] * 12, "1 cell types in cell_type; one class cannot be learned, pretraining can do without"),
        (["T"] * 5 + ["B"] * 6 + ["NK"], "3 cell types in cell_type; of a single cell, never validated: NK"),
        (["T"] * 5 + ["B"] * 4 + [None] * 3, "2 cell types in cell_type, 3 cells without"),
    ],
)
def test_labels_that_teach_little(labels, words, tmp_path, capsys):
    labelled(tmp_path / "cells.h5ad", labels)
    text, out = told(tmp_path / "cells.h5ad", capsys, val_fraction=0.5)
    assert text.rstrip().endswith(words)
    alone = pd.Series(labels).value_counts().loc[lambda n: n == 1].index
    assert (out.obs.loc[out.obs["cell_type"].isin(alone), "split"] == "train").all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -2.0])
def test_a_bad_value_beyond_the_sample_names_its_cell(value, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.files.source.SAMPLE", 8)  # rows 0, 1, 3, 4, 6, 7, 9 and 11
    path = tmp_path / "cells.h5ad"
    values(lambda dense: dense.__setitem__((8, 4), value))(path)
    line = error_of(capsys, "preprocess", data_path=path, out_path=tmp_path / "out.h5ad")
    what = {"nan": "a missing value (NaN)", "inf": "an infinite value", "-2.0": "a negative value"}[str(value)]
    assert f"{path}: X of rna has {what} in cell {make_cells().obs_names[8]}; " in line
    assert (SAVE in line) == (not np.isnan(value))
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
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
    try:
        out = disk / "out.h5ad"
        out.write_text("old")
        done = python("preprocess.py", *command_line({"data_path": path, "out_path": out}), preexec_fn=limit)
        assert done.returncode == 2, done.stderr
        cause = "No space left on device" if kind == "small disk" else "File too large"
        assert done.stderr == f"preprocess.py: error: {out}: cannot be written ({cause}); free some space\n"
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
    assert f"{folder / 'out.h5ad'}: cannot be written (Permission denied); choose another --out_path" in line
