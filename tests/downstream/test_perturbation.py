"""downstream.perturbation: the change of expression that perturbed genes cause, on made cells with a planted effect."""

import json
from itertools import pairwise

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from tests.helpers import error_of, lacks, run
from utils.cells.conditions import parse_condition, read_perturbed
from utils.cells.config import IngestConfig
from utils.cells.preprocessed import read_raw
from utils.evaluate.perturbation import make_folds
from utils.features.gene_vectors import GeneVectors, write_gene_vectors
from utils.train.model_folder import load_model

SCRIPT = "downstream.perturbation"
WIDTH, N_SINGLES, CELLS = 3, 12, 25


@pytest.fixture(scope="module")
def planted(runs, tmp_path_factory) -> dict:
    """Cells in which a gene's vector decides what its perturbation changes, and the vectors."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("perturbed")
    genes = load_model(runs["rna"], "rna").features["rna"]
    perturbed = list(genes[:N_SINGLES])
    vectors = rng.normal(size=(N_SINGLES, WIDTH))
    effect = dict(zip(perturbed, vectors @ rng.normal(size=(WIDTH, len(genes))), strict=True))
    doubles = [f"{a}+{b}" for a, b in zip(perturbed[:6], perturbed[6:], strict=True)]
    labels = ["ctrl"] * 60 + np.repeat([f"{gene}+ctrl" for gene in perturbed] + doubles, CELLS).tolist()
    rate = rng.gamma(2, 10, len(genes))
    power = np.stack([sum((effect[gene] for gene in parse_condition(label)), np.zeros(len(genes))) for label in labels])
    counts = rng.poisson(rate * 2 ** (0.7 * power)).astype(np.float32)
    obs = pd.DataFrame({"condition": labels}, index=[f"cell{i}" for i in range(len(labels))])
    cells = ad.AnnData(csr_matrix(counts), obs, pd.DataFrame(index=genes))
    cells.write(folder / "cells.h5ad")
    permuted = cells.copy()
    permuted.obs["condition"] = rng.permutation(labels)
    permuted.write(folder / "permuted.h5ad")
    write_gene_vectors(GeneVectors(np.array(perturbed), vectors.astype(np.float32)), folder / "vectors.h5ad")
    return {
        "data_path": folder / "cells.h5ad",
        "embedding_path": folder / "vectors.h5ad",
        "model_path": runs["rna"],
        **{"device": "cpu", "epochs": 2, "cycle_epochs": 1, "folds": 3},
    }


def scores_of(flags: dict, out, **more) -> dict:
    """What a run writes as JSON."""
    run(SCRIPT, **flags | more, out_path=out)
    return json.loads((out / "perturbation.json").read_text())


def test_unseen_singles_are_found_by_their_vectors(planted, tmp_path):
    found = scores_of(planted, tmp_path / "out", split="singles")
    scores = found["scores"]["all"]
    assert scores["model"]["pearson"] > 0.7
    assert scores["model"]["pearson"] > scores["mean of training conditions"]["pearson"] + 0.2
    assert scores["model"]["rank"] > 0.8 > 0.6 > scores["no change"]["rank"]
    assert scores["measured again (halves of the cells)"]["pearson"] > 0.9
    against = next(row for row in found["differences"] if row["baseline"] == "mean of training conditions")
    assert against["difference_95%"][0] > 0
    np.testing.assert_allclose(against["ours"] - against["theirs"], against["difference"], atol=1e-9)
    by_condition = pd.read_csv(tmp_path / "out" / "perturbation_conditions.csv")
    assert by_condition.condition.nunique() == N_SINGLES  # each is tested once
    np.testing.assert_allclose(
        by_condition[by_condition.method == "model"].pearson.mean(), scores["model"]["pearson"], atol=1e-6
    )


def test_doubles_are_near_the_sum_and_new_ones_are_predicted(planted, tmp_path):
    one, other = parse_condition("+".join(load_model(planted["model_path"], "rna").features["rna"][[0, 7]]))
    found = scores_of(planted, tmp_path / "out", split="doubles", predict=f"{one}+{other},{one}")
    scores = found["scores"]["both of the singles seen"]
    assert scores["sum of the singles"]["pearson"] > 0.8 and scores["model"]["pearson"] > 0.8
    assert scores["no change"]["pearson"] == 0
    asked = pd.read_csv(tmp_path / "out" / "predicted.csv")
    assert asked.condition.tolist() == [f"{one}+{other}", one] and (asked.drop(columns=["line", "condition"]) >= 0).all(
        axis=None
    )
    assert load_model(tmp_path / "out" / "model", "perturbation").outputs == list(asked.columns[2:])


def test_permuted_conditions_are_at_chance(planted, tmp_path):
    flags = planted | {"data_path": planted["data_path"].with_name("permuted.h5ad")}
    scores = scores_of(flags, tmp_path / "out", split="singles")["scores"]["all"]["model"]
    assert abs(scores["pearson_perturbed"]) < 0.3 and 0.2 < scores["rank"] < 0.8
    low, high = scores["rank_95%"]
    assert low < 0.5 < high


@pytest.mark.parametrize("split", ["singles", "doubles", "lines"])
def test_no_fold_shows_training_what_is_tested(split):
    names = "ABCDEFGH"
    conditions = [(line, (gene,)) for line in ("one", "two", "three") for gene in names]
    conditions += [("one", pair) for pair in pairwise(names)]
    folds = make_folds(split, conditions, "one", 4, np.random.default_rng(0))
    tested = np.concatenate([fold.test for fold in folds])
    assert len(set(tested)) == len(tested) == {"singles": 8, "doubles": 7, "lines": 24}[split]
    for fold in folds:
        for train, held in [(fold.train, fold.test), *fold.inner]:
            assert not set(train) & set(held)
            known, asked = [conditions[i] for i in train], [conditions[i] for i in held]
            if split == "singles":
                assert not {g for _, c in known for g in c} & {g for _, c in asked for g in c}
            if split == "lines":
                assert not {line for line, _ in known} & {line for line, _ in asked}
        assert not {i for train, val in fold.inner for i in (*train, *val)} & set(fold.test)


# Files of others -----------------------------------------------------------------------------------------------------


def written(folder, obs: dict, **how):
    """A small file of 30 control cells and 25 cells for each further label."""
    rng = np.random.default_rng(0)
    symbols = ["GAD1", "CD3D", "MS4A1", "LYZ", "NKG7", "KLF1", "FEV", "MAP2K6", "SNAI1", "TP53"]
    counts = rng.poisson(5, (len(next(iter(obs.values()))), len(symbols))).astype(np.float32) + 1
    cells = ad.AnnData(csr_matrix(counts), pd.DataFrame(obs), pd.DataFrame(index=symbols))
    cells.obs_names = [f"cell{i}" for i in range(cells.n_obs)]
    how.get("change", lambda _: None)(cells)
    cells.write(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def repeat(control: str, *labels: str) -> list[str]:
    return [control] * 30 + np.repeat(labels, 25).tolist()


def test_a_file_of_gears_goes_in_unchanged(tmp_path):
    def as_gears(cells):
        cells.layers["counts"] = cells.X.copy()
        scaled = cells.X.multiply(1e4 / cells.X.sum(1)).tocsr()
        cells.X = csr_matrix(np.log1p(scaled.toarray()))
        cells.var["gene_name"] = cells.var_names
        cells.var.index = [f"ENSG{i:011d}" for i in range(cells.n_vars)]
        cells.var_names = cells.var["gene_name"].astype(str).to_numpy()

    labels = repeat("ctrl", "FEV+ctrl", "KLF1+ctrl", "ctrl+SNAI1", "FEV+KLF1")
    obs = {"condition": labels, "cell_type": ["A549"] * len(labels), "control": [int(x == "ctrl") for x in labels]}
    with read_raw(written(tmp_path, obs, change=as_gears)) as file:
        cells = read_perturbed(file, IngestConfig())
    assert cells.conditions == [("A549", c) for c in [("FEV",), ("FEV", "KLF1"), ("KLF1",), ("SNAI1",)]]
    assert (cells.code < 0).sum() == 30 and cells.values.shape == (130, 10)
    sums = (2 ** cells.values.toarray() - 1).sum(1)
    np.testing.assert_allclose(sums, 1e4, rtol=1e-3)


def test_a_file_of_scperturb_goes_in_unchanged(tmp_path):
    labels = repeat("control", "FEV", "KLF1", "HLA_A", "FEV_KLF1")
    number = {"control": 0, "HLA_A": 1, "FEV_KLF1": 2}
    obs = {"perturbation": labels, "nperts": [number.get(x, 1) for x in labels], "cell_line": ["K562"] * len(labels)}
    with read_raw(written(tmp_path, obs)) as file:
        cells = read_perturbed(file, IngestConfig())
    assert [c for _, c in cells.conditions] == [("FEV",), ("FEV", "KLF1"), ("HLA_A",), ("KLF1",)]
    change = cells.changes()
    expected = cells.values[cells.code == 0].toarray().mean(0) - cells.values[cells.code < 0].toarray().mean(0)
    np.testing.assert_allclose(change[0], expected, atol=1e-5)
    one, other = cells.halves(np.random.default_rng(1))  # noise alone, so the halves have nothing in common
    assert abs(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(one, other, strict=True)])) < 0.5
    partner = cells.pair(np.random.default_rng(0))
    assert (cells.code[partner] < 0).all() and (cells.line[partner] == cells.line).all()


# Bad input -----------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_used(runs, tmp_path, capsys):
    flags = {"model_path": runs["rna"], "device": "cpu", "out_path": tmp_path / "out", "min_gene_coverage": 0}
    no_control = written(tmp_path, {"condition": repeat("A+ctrl", "B+ctrl", "C+ctrl", "D+ctrl")})
    assert not lacks(error_of(capsys, SCRIPT, data_path=no_control, **flags), "ctrl", "--condition_column", no_control)
    other_name = written(tmp_path, {"guide": repeat("ctrl", "A", "B", "C", "D")})
    assert not lacks(error_of(capsys, SCRIPT, data_path=other_name, **flags), "condition", "--condition_column")
    few = written(tmp_path, {"condition": repeat("ctrl", "A", "B", "C")})
    assert not lacks(error_of(capsys, SCRIPT, data_path=few, **flags), "conditions", few)


def test_models_and_embeddings_that_cannot_be_used(planted, runs, tmp_path, capsys):
    flags = planted | {"out_path": tmp_path / "out"}
    assert not lacks(error_of(capsys, SCRIPT, **flags | {"model_path": runs["atac"]}), "atac", "RNA")
    of_others = GeneVectors(np.array(["NOSUCH1", "NOSUCH2"]), np.ones((2, 4), np.float32))
    write_gene_vectors(of_others, tmp_path / "others.h5ad")
    refused = error_of(capsys, SCRIPT, **flags | {"embedding_path": tmp_path / "others.h5ad"})
    assert not lacks(refused, "others.h5ad", "--embedding_path")


def test_small_conditions_and_unknown_genes_are_counted(planted, tmp_path, capsys):
    cells = ad.read_h5ad(planted["data_path"])
    cells.obs["condition"] = cells.obs["condition"].astype(str)
    first = np.flatnonzero(cells.obs["condition"] == cells.obs["condition"].iloc[60])
    cells = cells[np.setdiff1d(np.arange(cells.n_obs), first[5:])].copy()
    cells.write(tmp_path / "cells.h5ad")
    vectors = ad.read_h5ad(planted["embedding_path"])[:6].copy()
    vectors.write(tmp_path / "few.h5ad")
    flags = planted | {"data_path": tmp_path / "cells.h5ad", "embedding_path": tmp_path / "few.h5ad", "epochs": 1}
    found = scores_of(flags, tmp_path / "out", split="singles")
    notes = " ".join(found["notes"])
    assert "fewer than 20 cells" in notes and "of 12 perturbed genes have a vector" in notes
