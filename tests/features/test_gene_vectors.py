"""Gene embeddings on disk: both formats, looked up by names of any year, and refused when unusable."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from utils.errors import UserError
from utils.features.gene_vectors import GeneVectors, read_gene_embedding, read_gene_vectors, write_gene_vectors


def make_vectors(genes: list[str], width: int = 3, n_cells=None) -> GeneVectors:
    values = np.random.default_rng(0).normal(size=(len(genes), width)).astype(np.float32)
    return GeneVectors(np.array(genes), values, n_cells)


@pytest.mark.parametrize("ending", [".h5ad", ".txt"])
def test_what_is_written_is_read_to_the_bit(ending, tmp_path):
    written = make_vectors(["CD3D", "GAD1", "NA"], n_cells=np.array([5, 0, 7]))
    write_gene_vectors(written, tmp_path / f"genes{ending}")
    found = read_gene_vectors(tmp_path / f"genes{ending}")
    assert found.genes.tolist() == ["CD3D", "GAD1", "NA"]
    np.testing.assert_array_equal(found.vectors, written.vectors)
    assert found.vectors.dtype == np.float32
    if ending == ".h5ad":
        assert found.n_cells.tolist() == [5, 0, 7]
    else:
        assert found.n_cells is None
        assert (tmp_path / "genes.txt").read_text().startswith("3 3\nCD3D ")


def test_genes_are_found_by_symbols_of_any_year_and_by_ensembl_ids():
    file = make_vectors(["MARCH1", "CD3D", "GAD1", "ENSG00000159840"])  # the last is ZYX
    names = ["MARCHF1", "MARCH1", "ENSG00000167286", "ENSG00000167286.12", "ZYX", "absent", "GAD1", "GAD1"]
    vectors, found = file.of(names)
    assert found.tolist() == [True] * 5 + [False, True, True]
    np.testing.assert_array_equal(vectors[found], file.vectors[[0, 0, 1, 1, 3, 2, 2]])
    assert not vectors[5].any()
    assert file.of([])[0].shape == (0, 3)


def test_a_current_symbol_goes_before_a_former_one_and_mouse_genes_keep_their_names():
    both = make_vectors(["MARCH1", "MARCHF1"])
    assert both.rows(["MARCHF1", "MARCH1"]).tolist() == [1, 0]
    mouse = make_vectors(["Gad1", "Pvalb", "Sst"])
    assert mouse.rows(["Sst", "Gad1", "GAD1"]).tolist() == [2, 0, -1]


@pytest.mark.parametrize("header", ["", "3 4\n"])
def test_gene_vectors_are_in_the_order_of_the_genes(tmp_path, header):
    path = tmp_path / "gene2vec.txt"
    path.write_text(header + "CD3D 1 2 3 4\nGAD1\t5 6 7 8.5 \n\nSST -1 0 1e-2 0\n")
    vectors, found = read_gene_embedding(path, ["GAD1", "absent", "CD3D", "GAD1"], 4)
    assert vectors.dtype == np.float32
    assert found.tolist() == [True, False, True, True]
    assert vectors.tolist() == [[5, 6, 7, 8.5], [0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8.5]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"CD3D 1 2 3\n", "line 1 .*CD3D.* 3 .* 4"),
        (b"SST 1 2 3 4\n", "none of the 1 genes"),
        (b"", "no gene vectors"),
        (b"CD3D 1 2 x 4\n", "4 numbers per line"),
        (b"\xff\xfe\x00\x01\n", "4 numbers per line"),
        (b"CD3D 1 2 nan 4\n", "not finite .*CD3D"),
    ],
)
def test_an_unusable_gene_embedding_is_refused(tmp_path, text, message):
    path = tmp_path / "gene2vec.txt"
    path.write_bytes(text)
    with pytest.raises(UserError, match=rf"gene2vec\.txt .*{message}"):
        read_gene_embedding(path, ["CD3D"], 4)
    with pytest.raises(UserError, match=r"absent\.txt"):
        read_gene_embedding(tmp_path / "absent.txt", ["CD3D"], 4)


def test_an_unusable_file_of_either_format_is_refused(tmp_path):
    text, h5ad = tmp_path / "genes.txt", tmp_path / "genes.h5ad"
    for broken in ("CD3D\nGAD1\n", "CD3D 1 2\nGAD1 1 2 3\n", "2 2\n"):
        text.write_text(broken)
        with pytest.raises(UserError, match=r"genes\.txt"):
            read_gene_vectors(text)
    h5ad.write_text("CD3D 1 2\n")
    with pytest.raises(UserError, match=r"genes\.h5ad.*not a readable"):
        read_gene_vectors(h5ad)
    with pytest.raises(UserError, match=r"absent\.h5ad"):
        read_gene_vectors(tmp_path / "absent.h5ad")
    frame = pd.DataFrame(index=["CD3D", "GAD1"])
    for values, message in (([[1, np.nan], [0, 1]], "not finite .*CD3D"), (None, "no X"), (np.ones((2, 0)), "width 0")):
        ad.AnnData(None if values is None else np.array(values, np.float32), frame).write_h5ad(h5ad)
        with pytest.raises(UserError, match=rf"genes\.h5ad.*{message}"):
            read_gene_vectors(h5ad, 2)
    ad.AnnData(np.ones((2, 2), np.float32), pd.DataFrame(index=["CD3D", "CD3D"])).write_h5ad(h5ad)
    with pytest.raises(UserError, match=r"genes\.h5ad.*twice"):
        read_gene_vectors(h5ad)
