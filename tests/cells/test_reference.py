"""Lists whose order counts: the genes and peaks of a published model."""

import gzip

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest

from tests.builders import make_cells, make_peaks
from utils.cells.reference import read_order, read_reference
from utils.errors import UserError

GENES = ["TP53", "CD4", "MS4A1"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("TP53\nCD4\nMS4A1\n", GENES),
        ("gene\nTP53\nCD4\n\nMS4A1", GENES),
        (",gene\n0,TP53\n1,CD4\n2,MS4A1\n", GENES),
        ("ENSG00000141510\nENSG00000010610\nENSG00000156738\n", GENES),
        ("CD20\nTP53\nCD4\n", ["MS4A1", "TP53", "CD4"]),  # updated
        ("CD20\nTP53\nMS4A1\n", ["CD20", "TP53", "MS4A1"]),  # the current name is another gene's of the list
        ("unknown1\nTP53\nCD4\n", ["unknown1", "TP53", "CD4"]),
        ("\ufeffTP53\nCD4\nMS4A1\n", GENES),  # as Excel begins a file of text
        ("\ufeffgene\nTP53\nCD4\nMS4A1\n", GENES),
    ],
)
def test_genes_of_a_text_keep_their_order(text, names, tmp_path):
    (tmp_path / "genes.txt").write_text(text, encoding="utf-8")
    assert list(read_order(tmp_path / "genes.txt", "rna", "--gene_reference")) == names
    if "CD20" not in text and "unknown1" not in text:
        assert list(read_reference(tmp_path / "genes.txt")["rna"]) == names


def test_genes_and_peaks_of_files_of_cells_keep_their_order(tmp_path):
    cells = make_cells()
    cells = cells[:, ::-1].copy()
    peaks = make_peaks(cells.obs_names)[:, ::-1].copy()
    cells.write(tmp_path / "cells.h5ad")
    mudata.MuData({"rna": cells, "atac": peaks}).write(tmp_path / "cells.h5mu")
    for name in ("cells.h5ad", "cells.h5mu"):
        assert list(read_order(tmp_path / name, "rna", "--gene_reference")) == list(cells.var_names)
    assert list(read_order(tmp_path / "cells.h5mu", "atac", "--peak_reference")) == list(peaks.var_names)
    with pytest.raises(UserError, match=r"--peak_reference .*cells\.h5ad"):
        read_order(tmp_path / "cells.h5ad", "atac", "--peak_reference")


@pytest.mark.parametrize(
    "text",
    [
        "chr2\t10\t20\nchr1\t5\t9\n",
        "track name=x\n# made by hand\nchr2\t10\t20\tpeak_1\t0\t.\nchr1 5 9\n",
        "chr2:10-20\nchr1:5-9\n",
        '"chr2-10-20"\nchr1_5_9\n',
        "2\t10\t20\n1\t5\t9",
    ],
)
def test_peaks_of_a_text_keep_their_order(text, tmp_path):
    (tmp_path / "peaks.bed").write_text(text)
    assert list(read_order(tmp_path / "peaks.bed", "atac", "--peak_reference")) == ["chr2:10-20", "chr1:5-9"]


def test_a_model_folder_is_taken_as_it_is(tmp_path):
    (tmp_path / "genes.txt").write_text("CD20\nscBERT_last_token\n")
    assert list(read_order(tmp_path, "rna", "--gene_reference")) == ["CD20", "scBERT_last_token"]


@pytest.mark.parametrize(
    ("content", "modality"),
    [
        (b"TP53\nCD4\nTP53\n", "rna"),
        (b"", "rna"),
        (b"chr1\t5\t9\nchr1\t5\t9\n", "atac"),
        (b"chr1\t9\t5\n", "atac"),
        (b"TP53\n", "atac"),
        (gzip.compress(b"TP53\n", mtime=0), "rna"),
        (b"\x80\x04\x95\xff\xfe", "rna"),
    ],
)
def test_lists_that_are_refused(content, modality, tmp_path):
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(UserError, match=r"--flag .*list"):
        read_order(tmp_path / "list", modality, "--flag")


def test_an_h5ad_that_repeats_a_gene(tmp_path):
    names = pd.DataFrame(index=["TP53", "CD4", "TP53"])
    ad.AnnData(np.ones((2, 3), np.float32), pd.DataFrame(index=["a", "b"]), names).write(tmp_path / "x.h5ad")
    with pytest.raises(UserError, match="TP53"):
        read_order(tmp_path / "x.h5ad", "rna", "--gene_reference")
