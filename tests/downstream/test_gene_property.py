"""downstream.gene_property: a planted signal is found, permuted labels are at chance, bad input is one sentence."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from tests.builders import make_cells
from tests.helpers import error_of, lacks, run
from utils.cells.reference import read_gene_lists
from utils.evaluate.gene_classes import WIDE, random_interval
from utils.features.gene_symbols import load_gene_table
from utils.features.gene_vectors import GeneVectors, write_gene_vectors

SCRIPT = "downstream.gene_property"
FAST = {"folds": 3, "repeats": 2}
ROWS = [
    "genes.h5ad",
    "genes.h5ad, static",
    "detection, mean, variance",
    "co-expression SVD",
    "co-expression SVD, unit length",
    "random vectors",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Cells of 120 genes, an embedding in which the first 40 differ from the rest, and lists of 80 of them."""
    folder = tmp_path_factory.mktemp("made")
    cells = make_cells(n_cells=30, n_genes=120)
    cells.write_h5ad(folder / "cells.h5ad")
    genes = np.random.default_rng(1).permutation(cells.var_names.to_numpy(dtype=str))
    vectors = np.random.default_rng(0).normal(size=(120, 6)).astype(np.float32)
    static = vectors.copy()
    vectors[:40, 0] += 4
    n_cells = np.where(np.arange(120) == 0, 0, 9)  # the first gene is expressed by no cell
    write_gene_vectors(GeneVectors(genes, vectors, n_cells, static), folder / "genes.h5ad")
    ensembl = load_gene_table().set_index("symbol")["ensembl"]
    yes = [ensembl[gene] or gene for gene in genes[:40]]
    table = pd.DataFrame({"yes": yes, "no": genes[40:80].tolist()})
    table.loc[39, "no"] = genes[1]  # in both lists
    table.to_csv(folder / "lists.csv", index=False)
    shuffled = np.random.default_rng(2).permutation(genes[1:79])
    pd.DataFrame({"yes": shuffled[:39], "no": shuffled[39:]}).to_csv(folder / "permuted.csv", index=False)
    return folder


def results(folder) -> dict:
    return json.loads((folder / "gene_property.json").read_text())


def test_a_planted_signal_is_found_and_ranks_the_other_genes(made, tmp_path, capsys):
    files = {"lists": made / "lists.csv", "embedding_path": made / "genes.h5ad", "data_path": made / "cells.h5ad"}
    run(SCRIPT, **files, out_path=tmp_path, predict_all=True, **FAST)
    found, shown = results(tmp_path), capsys.readouterr().out
    assert found["classes"] == {"yes": 38, "no": 39}  # without the gene in both lists and the one without cells
    table = pd.DataFrame(found["scores"]).T
    assert set(table.index) == {f"{row}, {c}" for row in ROWS for c in ("logistic regression", "random forest")}
    for classifier in ("logistic regression", "random forest"):
        best = table.loc[f"genes.h5ad, {classifier}"]
        assert min(best["auroc"], best["auprc"], best["macro_f1"]) > 0.9
        low, high = best["auroc_95%"]
        assert low <= best["auroc"] <= high
        for row in ROWS[1:]:
            assert table.loc[f"{row}, {classifier}", "auroc"] < 0.75
        assert f"{classifier}: genes.h5ad wins" in shown
        (kept,) = [row for row in found["differences"] if row["score"] == f"auroc, {classifier}"]
        assert kept["difference"] == pytest.approx(
            best["auroc"] - table.loc[f"{kept['baseline']}, {classifier}", "auroc"]
        )
        assert 0 < kept["difference_95%"][0] <= kept["difference"] <= kept["difference_95%"][1]
    assert lacks(shown, "39 of 40", "two lists", "random vectors reach") == []
    ranked = pd.read_csv(tmp_path / "predicted.csv", keep_default_na=False)
    assert len(ranked) == 119 - 77 and ranked.iloc[:, -1].is_monotonic_decreasing
    assert (tmp_path / "gene_property.png").stat().st_size > 10_000
    assert len(pd.read_csv(tmp_path / "gene_property.csv")) == 2 * len(ROWS)


def test_permuted_labels_are_at_chance(made, tmp_path, capsys):
    run(SCRIPT, lists=made / "permuted.csv", embedding_path=made / "genes.h5ad", out_path=tmp_path, **FAST)
    scores = pd.DataFrame(results(tmp_path)["scores"]).T
    assert set(scores["auroc"].between(0.3, 0.7)) == {True}
    assert "warning: 78 genes are too few" in capsys.readouterr().out


def test_one_list_is_compared_with_all_other_genes_and_text_files_are_classes(made, tmp_path):
    table = pd.read_csv(made / "lists.csv")
    for name in table:
        (tmp_path / f"{name}.txt").write_text("gene_name\n" + "".join(f"{gene}\n" for gene in table[name]))
    one, both = tmp_path / "yes.txt", f"{tmp_path / 'yes.txt'},{tmp_path / 'no.txt'}"
    assert [len(genes) for genes in read_gene_lists(both, "--lists").values()] == [40, 40]
    run(SCRIPT, lists=one, embedding_path=made / "genes.h5ad", out_path=tmp_path / "out", **FAST)
    found = results(tmp_path / "out")
    assert found["classes"] == {"yes": 39, "all other genes": 80}
    assert found["scores"]["genes.h5ad, logistic regression"]["auroc"] > 0.9


def test_more_genes_narrow_the_interval_of_random_vectors():
    few, many = (random_interval(np.arange(n) % 2, 8, 3, 0) for n in (30, 600))
    assert few[1] - few[0] > 2 * (many[1] - many[0])
    assert many[0] < 0.5 < many[1] < 0.6 < few[1]


@pytest.mark.parametrize(
    ("lists", "embedding", "words"),
    [
        ("a\nnobody1\nnobody2\n", "CD3D 1 2\nGAD1 1 2\n", ["genes.txt", "none of the genes", "lists.csv"]),
        ("a,b\nCD3D,GAD1\n", "CD3D 1 2\nGAD1 1 2\n", ["lists.csv", "a (1)", "--folds 3"]),
        ("a,b\nCD3D,CD3D\n", "CD3D 1 2\nGAD1 1 2\n", ["lists.csv", "a (0)", "--folds 3"]),
        ("a,b\n", "CD3D 1 2\n", ["lists.csv", "no gene"]),
        ("a,b\nCD3D,GAD1\n", "CD3D 1 2\nGAD1 1 nan\n", ["genes.txt", "not finite"]),
        ("a,b\nCD3D,GAD1\n", "CD3D 1 2\nGAD1 1\n", ["genes.txt", "line 2"]),
    ],
)
def test_bad_input_is_one_sentence(lists, embedding, words, tmp_path, capsys):
    (tmp_path / "lists.csv").write_text(lists)
    (tmp_path / "genes.txt").write_text(embedding)
    files = {"lists": tmp_path / "lists.csv", "embedding_path": tmp_path / "genes.txt"}
    line = error_of(capsys, SCRIPT, **files, out_path=tmp_path / "out", **FAST)
    assert lacks(line, *words) == []
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(tmp_path, capsys):
    (tmp_path / "genes.txt").write_text("CD3D 1 2\n")
    for lists, path in (("absent.csv", "genes.txt"), ("absent.txt", "genes.txt"), ("genes.txt", "absent.h5ad")):
        files = {"lists": tmp_path / lists, "embedding_path": tmp_path / path}
        line = error_of(capsys, SCRIPT, **files, out_path=tmp_path / "out", **FAST)
        assert lacks(line, "absent") == []


def test_the_published_lists_are_read(shared_data):
    folder = shared_data / "gene_class"
    found = read_gene_lists(str(folder / "dosage_sens_tf_labels.csv"), "--lists")
    assert {name: len(genes) for name, genes in found.items()} == {"dosage_sensitive": 122, "dosage_insensitive": 368}
    names = ("bivalent_gene_labels.txt", "lys4_only_gene_labels.txt", "no_methylation_gene_labels.txt")
    found = read_gene_lists(",".join(str(folder / name) for name in names), "--lists")
    assert [len(genes) for genes in found.values()] == [96, 78, 40]  # of 107, 80 and 42 lines, some repeated
    approved = set(load_gene_table()["symbol"])
    assert np.mean([gene in approved for genes in found.values() for gene in genes]) > 0.9
    scores = read_gene_lists(str(folder / "exac_lof_pLI_genes.txt"), "--lists")
    assert len(scores["exac_lof_pLI_genes"]) > 3_000


def test_real_cells_cover_too_few_of_the_published_factors(shared_data):
    """699 immune cells: their genes are found by updated symbols, and random vectors reach a wide interval."""
    lists = read_gene_lists(str(shared_data / "gene_class" / "dosage_sens_tf_labels.csv"), "--lists")
    genes = ad.read_h5ad(shared_data / "immune_rna.h5ad", backed="r").var_names.to_numpy(dtype=str)
    file = GeneVectors(genes, np.zeros((len(genes), 1), np.float32))
    sizes = [int(file.of(listed)[1].sum()) for listed in lists.values()]
    assert sizes == [61, 36]
    low, high = random_interval(np.repeat([0, 1], sizes), 50, 5, 0)
    assert low < 0.4 and high > WIDE
