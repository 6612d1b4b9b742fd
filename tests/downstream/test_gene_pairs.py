"""Gene pairs: the planted signal is found, permuted labels score at chance, and the split by genes leaks nothing."""

import gzip
import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from tests.helpers import error_of, lacks, run
from utils.evaluate.gene_pairs import gene_log_odds, pair_features, pair_scores
from utils.features.gene_vectors import GeneVectors, write_gene_vectors
from utils.features.pairs import Pairs, clean, draw_negatives, keys, number_genes, read_pairs, split_genes

SCRIPT = "downstream.gene_pairs"
N_GENES, N_GROUPS = 150, 5
GENES = np.array([f"G{i}x" for i in range(N_GENES)])
GROUP = np.arange(N_GENES) % N_GROUPS


@pytest.fixture
def embedding(tmp_path):
    """Vectors from which one can read a gene's group; genes of one group interact."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(N_GROUPS, 6))
    vectors = centres[GROUP] + 0.3 * rng.normal(size=(N_GENES, 6))
    path = tmp_path / "genes.h5ad"
    write_gene_vectors(GeneVectors(GENES, vectors.astype(np.float32)), path)
    return path


def write_pairs(path, pairs, labels=None):
    lines = [f"{a} {b}" for a, b in pairs]
    lines = lines if labels is None else [f"{line} {y}" for line, y in zip(lines, labels, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def made_pairs(n: int, genes: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of names, half of them from one group, and whether they are."""
    rng = np.random.default_rng(seed)
    a, b = rng.choice(genes, (2, 40 * n))
    y = (GROUP[a] == GROUP[b]).astype(int)
    keep = np.flatnonzero(a != b)
    keep = np.concatenate([keep[y[keep] == 1][: n // 2], keep[y[keep] == 0][: n // 2]])
    return np.stack([GENES[a[keep]], GENES[b[keep]]], axis=1), y[keep]


def published(folder, permuted: bool = False) -> dict:
    """Flags for three files that share no gene."""
    flags = {}
    sides = (("train", range(80), 2000), ("valid", range(80, 110), 400), ("test", range(110, 150), 800))
    for seed, (side, genes, n) in enumerate(sides):
        pairs, y = made_pairs(n, np.array(genes), seed)
        y = np.random.default_rng(seed + 9).permutation(y) if permuted else y
        flags[f"{side}_path"] = write_pairs(folder / f"{side}.txt", pairs, y)
    return flags


def results(folder) -> dict:
    return json.loads((folder / "gene_pairs.json").read_text())


def test_the_planted_signal_is_found(tmp_path, embedding, capsys):
    run(SCRIPT, embedding_path=embedding, out_path=tmp_path / "out", **published(tmp_path))
    found = results(tmp_path / "out")
    ours, odds = found["scores"][str(embedding)], found["scores"]["log-odds of single genes"]
    assert ours["auroc"] > 0.9 and ours["ap"] > 0.9
    assert odds["auroc"] == 0.5  # no gene of the test pairs was seen
    assert ours["difference_95%"][0] > 0
    assert ours["auroc"] == found["heads"][str(embedding)][ours["head"]]["test"]
    assert ours["auroc_95%"][0] < ours["auroc"] < ours["auroc_95%"][1]
    assert abs(found["scores"]["random vectors"]["auroc"] - 0.5) < 0.15
    assert "wins" in found["verdict"][0]
    assert not lacks(capsys.readouterr().out, found["verdict"][0], "random vectors")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".csv", ".png"}


def test_permuted_labels_score_at_chance(tmp_path, embedding):
    run(SCRIPT, embedding_path=embedding, out_path=tmp_path / "out", **published(tmp_path, permuted=True))
    found = results(tmp_path / "out")
    assert all(abs(row["auroc"] - 0.5) < 0.1 for row in found["scores"].values())
    assert "wins" not in found["verdict"][0]


def test_positive_pairs_alone_are_enough(tmp_path, embedding):
    pairs, y = made_pairs(4000, np.arange(N_GENES))
    path = write_pairs(tmp_path / "pairs.tsv", pairs[y == 1])
    run(SCRIPT, embedding_path=embedding, out_path=tmp_path / "genes", pairs_path=path)
    found = results(tmp_path / "genes")
    assert found["scores"][str(embedding)]["auroc"] > 0.9
    assert found["scores"]["log-odds of single genes"]["auroc"] == 0.5
    assert all(side["positive"] < side["pairs"] for side in found["sides"].values())


def test_a_split_of_pairs_warns_with_the_score_of_single_genes(tmp_path, embedding, capsys):
    """A hub in every positive pair: no vector is needed to know the label."""
    rng = np.random.default_rng(0)
    pairs = np.stack([GENES[rng.choice(15, 1500)], GENES[rng.choice(N_GENES, 1500)]], axis=1)
    how = {"embedding_path": embedding, "pairs_path": write_pairs(tmp_path / "hubs.txt", pairs)}
    run(SCRIPT, **how, split="pairs", negatives="random", out_path=tmp_path / "pairs")
    found = results(tmp_path / "pairs")
    assert found["scores"]["log-odds of single genes"]["auroc"] > 0.85
    assert any("warning" in line for line in found["verdict"])
    assert "warning" in capsys.readouterr().out
    run(SCRIPT, **how, split="pairs", out_path=tmp_path / "matched")
    assert results(tmp_path / "matched")["scores"]["log-odds of single genes"]["auroc"] < 0.65


def test_baselines_of_cells_stand_beside_it(tmp_path, raw_file, simulation):
    """Without an embedding, the baselines are compared with each other."""
    genes = simulation.mdata["rna"].var_names.to_numpy()
    a, b = np.random.default_rng(0).choice(genes, (2, 3000))
    path = write_pairs(tmp_path / "pairs.txt", np.stack([a, b], axis=1)[a != b])
    run(SCRIPT, cells_path=raw_file, pairs_path=path, out_path=tmp_path / "out")
    found = results(tmp_path / "out")
    assert not lacks(" ".join(found["scores"]), "co-expression SVD", "detection, mean, variance", "random vectors")
    assert not any("difference" in row for row in found["scores"].values())


def test_wrong_pairs_are_left_out_and_counted():
    pairs = Pairs(np.array([1, 1, 2, 3, 4, 4]), np.array([1, 2, 1, 4, 3, 5]), np.array([1, 1, 0, 1, 1, 0]))
    kept, dropped = clean(pairs)
    assert list(zip(kept.a, kept.b, kept.y, strict=True)) == [(3, 4, 1), (4, 5, 0)]
    assert dropped == {"a gene with itself": 1, "both labels": 2, "repeated": 1}
    assert len(clean(pairs, ordered=True)[0]) == 5


def test_an_old_and_a_new_symbol_of_one_gene_do_not_leak():
    source = GeneVectors(np.array(["NSD2", "TP53", "MYC", "GATA1"]), np.eye(4, dtype=np.float32))
    side = lambda *pairs: Pairs(*map(np.array, zip(*pairs, strict=True)), np.ones(len(pairs), dtype=int))
    sides = {"train": side(("NSD2", "TP53"), ("TP53", "ABSENT")), "test": side(("WHSC1", "MYC"))}
    numbered, _, dropped = number_genes(sides, {"made": source})
    assert len(numbered["train"]) == 0 and len(numbered["test"]) == 1
    assert dropped["train"]["on a later side"] == dropped["train"]["without a vector"] == 1


@pytest.mark.parametrize("ordered", [False, True])
def test_negative_pairs_have_the_degrees_of_positive_ones(ordered):
    rng = np.random.default_rng(0)
    a, b = np.minimum(rng.geometric(0.02, 3000) - 1, 599), rng.integers(0, 600, 3000)  # a few hubs
    positives, _ = clean(Pairs(a, b, np.ones(3000, dtype=int)), ordered)
    drawn = draw_negatives(positives, positives, rng, ordered=ordered)
    assert len(drawn) > 0.98 * len(positives)
    assert not np.isin(keys(drawn, ordered), keys(positives, ordered)).any()
    assert len(np.unique(keys(drawn, ordered))) == len(drawn) and (drawn.a != drawn.b).all() and not drawn.y.any()
    for ends in ("a", "b") if ordered else ("both",):
        counts = [
            np.bincount(getattr(p, ends) if ordered else np.concatenate([p.a, p.b]), minlength=600)
            for p in (positives, drawn)
        ]
        assert np.abs(counts[0] - counts[1]).sum() < 0.05 * counts[0].sum()


def test_a_split_by_genes_shares_no_gene():
    rng = np.random.default_rng(0)
    pairs = Pairs(*rng.integers(0, 300, (2, 5000)), np.ones(5000, dtype=int))
    sides = split_genes(pairs, 0.3, 0.2, rng)
    genes = [set(side.genes) for side in sides.values()]
    assert not genes[0] & genes[1] and not genes[0] & genes[2] and not genes[1] & genes[2]
    assert [len(g) for g in genes] == [150, 60, 90]


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    y, scores, weights = rng.integers(0, 2, 500), rng.integers(0, 20, 500) / 20, rng.integers(0, 4, 500)
    auroc, ap = pair_scores(y, scores, weights)
    assert auroc == pytest.approx(roc_auc_score(y, scores, sample_weight=weights))
    assert ap == pytest.approx(average_precision_score(y, scores, sample_weight=weights))


def test_features_are_symmetric_unless_ordered():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 3))
    assert np.array_equal(pair_features(a, b), pair_features(b, a))
    assert not np.array_equal(pair_features(a, b, ordered=True), pair_features(b, a, ordered=True))


def test_log_odds_know_single_genes():
    train = Pairs(np.array([0, 0, 0, 1]), np.array([2, 3, 4, 5]), np.array([1, 1, 1, 0]))
    test = Pairs(np.array([0, 1, 8]), np.array([6, 6, 9]), np.array([1, 0, 1]))
    assert np.allclose(gene_log_odds(train, test, 10), [np.log(4), -np.log(2), 0])


def test_labels_may_lie_beside(tmp_path):
    with gzip.open(tmp_path / "train_text.txt.gz", "wt") as file:
        file.write("NA TP53\nMYC MAX\n")
    (tmp_path / "train_label.txt").write_text("0\n1\n")
    pairs, labelled = read_pairs(tmp_path / "train_text.txt.gz")
    assert labelled and list(pairs.a) == ["NA", "MYC"] and list(pairs.y) == [0, 1]


WRONG = {
    "a b 2\n": "line 1",
    "gene_a gene_b label\na b 1\n": "line 1",
    "a b\na b c\n": "line 2",
    "a b 1 7\n": "4 columns",
    "a\n": "1 columns",
    "\n": "no pairs",
    "ABSENT1 ABSENT2\nABSENT2 ABSENT3\n": "none of the genes",
    "G1x G2x 1\nG3x G4x 1\n": "negative",  # no pair on some side
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_files_of_pairs(tmp_path, embedding, capsys, text):
    path = tmp_path / "pairs.txt"
    path.write_text(text)
    error = error_of(capsys, SCRIPT, embedding_path=embedding, pairs_path=path, out_path=tmp_path / "out")
    assert not lacks(error, WRONG[text], "genes.h5ad" if "none of" in error else path)
    assert not (tmp_path / "out").exists()


def test_wrong_splits_and_flags(tmp_path, embedding, capsys):
    flags = published(tmp_path)
    how = {"embedding_path": embedding, "out_path": tmp_path / "out"}
    leaky = write_pairs(tmp_path / "leaky.txt", [("G0x", "G120x"), ("G111x", "G112x")], [0, 1])
    assert not lacks(error_of(capsys, SCRIPT, **how, **flags | {"test_path": leaky}), "leaky.txt", "train.txt", "G0x")
    assert "--pairs_path" in error_of(capsys, SCRIPT, **how)
    assert "--pairs_path" in error_of(capsys, SCRIPT, **how, **flags, pairs_path=leaky)
    assert "--embedding_path" in error_of(capsys, SCRIPT, out_path=tmp_path / "out", pairs_path=leaky)
    assert "--test_fraction" in error_of(capsys, SCRIPT, **how, pairs_path=leaky, test_fraction=0.9)
    assert "absent.txt" in error_of(capsys, SCRIPT, **how, pairs_path=tmp_path / "absent.txt")
    unlabelled = write_pairs(tmp_path / "unlabelled.txt", [("G111x", "G112x")])
    assert "unlabelled.txt" in error_of(capsys, SCRIPT, **how, **flags | {"test_path": unlabelled})


def test_published_pairs_are_read(shared_data):
    """A subset of Gene2vec's pairs, whose splits share no gene, and of HuRI's, which have no labels."""
    test, labelled = read_pairs(shared_data / "ggi" / "test_text.txt")
    val, _ = read_pairs(shared_data / "ggi" / "valid_text.txt")
    assert labelled and (len(test), len(test.genes), len(val)) == (21_448, 2_467, 5_568)
    assert not np.isin(test.genes, val.genes).any()
    huri, labelled = read_pairs(shared_data / "ppi" / "HuRI.tsv.gz")
    assert not labelled and len(huri) == 52_569 and huri.a[0].startswith("ENSG")


def test_real_pairs_and_cells(tmp_path, shared_data):
    """A subset of Gene2vec's pairs, split anew by genes, with the baselines of real cells."""
    path = shared_data / "ggi" / "valid_text.txt"
    run(SCRIPT, cells_path=shared_data / "immune_rna.h5ad", pairs_path=path, out_path=tmp_path)
    found = results(tmp_path)
    assert found["labelled"] and found["scores"]["log-odds of single genes"]["auroc"] == 0.5
    assert all(0.3 < row["auroc"] < 0.7 for row in found["scores"].values())
    assert set(found["heads"]["co-expression SVD"]) == {"linear", "network"}
