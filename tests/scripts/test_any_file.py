"""Files as labs have them go into preprocess.py and predict_cell_type.py with no flag but the paths."""

import json
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy.sparse import csr_matrix

from tests.builders import make_cells, make_peaks
from tests.formats import FORMATS, tenx_h5
from tests.helpers import ATAC, MULTIMODAL, TRAINING, call, command_line, error_of, lacks, run
from utils.cells.preprocessed import read_cells
from utils.features.gene_symbols import load_gene_table
from utils.files.write import write_whole
from utils.train.model_folder import load_model

# Prediction ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rna(simulation) -> ad.AnnData:
    adata = simulation.mdata["rna"].copy()
    adata.obs = adata.obs[[]]
    return adata


def label(path: Path, model: Path, **flags) -> ad.AnnData:
    run("predict_cell_type", data_path=path, model_path=model, device="cpu", **flags)
    return ad.read_h5ad(path.with_name(f"{path.name.removesuffix('.h5ad')}.predicted.h5ad"))


@pytest.fixture(scope="module")
def expected(rna, runs, tmp_path_factory) -> ad.AnnData:
    return label(FORMATS["h5ad csr"](rna, tmp_path_factory.mktemp("plain")), runs["celltype_atac"])


def assert_same(ours: ad.AnnData, theirs: ad.AnnData) -> None:
    """To the bit: the tokens are the same."""
    assert list(ours.obs_names) == list(theirs.obs_names)
    assert list(ours.obs["predicted_cell_type"]) == list(theirs.obs["predicted_cell_type"])
    np.testing.assert_array_equal(ours.obsm["X_scmomer"], theirs.obsm["X_scmomer"])
    np.testing.assert_array_equal(ours.obs["confidence"], theirs.obs["confidence"])


@pytest.mark.parametrize("name", ["10x h5", "10x folder v3 gz", "loom", "csv genes down", "tsv gz", "h5ad csc"])
def test_every_format_is_labelled_alike(name, rna, runs, expected, tmp_path):
    assert_same(label(FORMATS[name](rna, tmp_path), runs["celltype_atac"]), expected)


def log1p(adata: ad.AnnData) -> None:
    adata.X = adata.X.astype(np.float32)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)


def scaled_with_raw(adata: ad.AnnData) -> None:
    """What the usual tutorial leaves: logarithms in raw, scaled values of fewer genes in X."""
    log1p(adata)
    adata.raw = adata.copy()
    sc.pp.scale(adata)


def ids(column: str, form: str = "{}"):
    def change(adata: ad.AnnData) -> None:
        table = load_gene_table().set_index("symbol")[column]
        adata.var_names = [form.format(table[gene]) if table[gene] else gene for gene in adata.var_names]

    return change


def hidden_symbols(adata: ad.AnnData) -> None:
    adata.var["feature_name"] = pd.Categorical(adata.var_names)
    adata.var_names = [f"f{i}" for i in range(adata.n_vars)]


CHANGES = {
    "log1p": log1p,
    "scaled, with raw": scaled_with_raw,
    "Ensembl ids": ids("ensembl"),
    "Ensembl ids with versions": ids("ensembl", "{}.12"),
    "Entrez ids": ids("entrez"),
    "symbols in a column": hidden_symbols,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHANGES)
def test_values_and_ids_as_they_come(name, rna, runs, expected, tmp_path):
    adata = rna.copy()
    CHANGES[name](adata)
    adata.write(tmp_path / "query.h5ad")
    assert_same(label(tmp_path / "query.h5ad", runs["celltype_atac"]), expected)


def test_peaks_called_on_another_set(simulation, runs, tmp_path, capsys):
    """Each of the model's peaks cut in two: open if either half is."""
    peaks = simulation.mdata["atac"].copy()
    peaks.obs = peaks.obs[[]]
    peaks.write(tmp_path / "same.h5ad")
    expected = label(tmp_path / "same.h5ad", runs["celltype_rna"])
    assert lacks(capsys.readouterr().out, "150 of the 150 peaks", "by name", "100.0%") == []
    rng = np.random.default_rng(0)
    first = csr_matrix(peaks.X.multiply(rng.random(peaks.shape) < 0.5))
    names = []
    for name in peaks.var_names:
        chrom, interval = name.split(":")
        start, end = map(int, interval.split("-"))
        names += [f"{chrom}-{start}-{start + 100}", f"{chrom}-{start + 100}-{end}"]
    halves = np.stack([first.toarray(), (peaks.X - first).toarray()], axis=2).reshape(peaks.n_obs, -1)
    halves = np.concatenate([halves, np.ones((peaks.n_obs, 1))], axis=1).astype(np.float32)
    other = ad.AnnData(
        csr_matrix(halves), pd.DataFrame(index=peaks.obs_names), pd.DataFrame(index=[*names, "chrY-5-9"])
    )
    other[:, rng.permutation(other.n_vars)].copy().write(tmp_path / "other.h5ad")
    assert_same(label(tmp_path / "other.h5ad", runs["celltype_rna"]), expected)
    text = capsys.readouterr().out
    assert lacks(text, "150 of the 150 peaks", "by overlap", "100.0%", "1 of its peaks") == []


def test_peaks_of_another_build_than_the_models(simulation, runs, tmp_path, capsys):
    peaks = simulation.mdata["atac"].copy()
    peaks.var_names = [*peaks.var_names[:-1], "chr1:248956400-248956423"]  # one base beyond hg38
    peaks.write(tmp_path / "query.h5ad")
    flags = {
        "data_path": tmp_path / "query.h5ad",
        "model_path": runs["celltype_rna"],
        "genome": "hg38",
        "device": "cpu",
    }
    assert lacks(error_of(capsys, "predict_cell_type", **flags), "1 of 150 peaks", "hg38") == []


def test_multiome_is_labelled_from_one_file_or_two(simulation, rna, runs, expected, tmp_path):
    """A model for RNA takes the RNA of a multiome file; the output holds both modalities."""
    peaks = simulation.mdata["atac"].copy()
    peaks.obs = peaks.obs[[]]
    run("predict_cell_type", data_path=tenx_h5(rna, tmp_path, peaks), model_path=runs["celltype_atac"], device="cpu")
    one = mudata.read_h5mu(tmp_path / "filtered_feature_bc_matrix.h5.predicted.h5mu")
    rna.write(tmp_path / "rna.h5ad")
    peaks.write(tmp_path / "atac.h5ad")
    pair = {"rna_path": tmp_path / "rna.h5ad", "atac_path": tmp_path / "atac.h5ad"}
    run("predict_cell_type", **pair, model_path=runs["celltype_atac"], out_path=tmp_path / "two.h5mu", device="cpu")
    for content in (one, mudata.read_h5mu(tmp_path / "two.h5mu")):
        assert list(content.mod) == ["rna", "atac"]
        assert list(content.obs["predicted_cell_type"]) == list(expected.obs["predicted_cell_type"])
        np.testing.assert_array_equal(content.obsm["X_scmomer"], expected.obsm["X_scmomer"])


# Preprocessing to a model --------------------------------------------------------------------------------------------


def test_new_cells_in_a_models_genes_and_peaks(simulation, runs, tmp_path, capsys):
    model = runs["multimodal"]
    genes, peaks = ((model / f"{name}.txt").read_text().splitlines() for name in ("genes", "peaks"))
    part = mudata.MuData(
        {"rna": simulation.mdata["rna"][:, 10:].copy(), "atac": simulation.mdata["atac"][:, ::-1].copy()}
    )
    part.write(tmp_path / "new.h5mu")
    run("preprocess", data_path=tmp_path / "new.h5mu", out_path=tmp_path / "ready.h5mu", gene_reference=model)
    cells = read_cells(tmp_path / "ready.h5mu", ("rna", "atac"))
    assert (list(cells.features["rna"]), list(cells.features["atac"])) == (genes, peaks)
    absent = ~np.isin(genes, part["rna"].var_names)
    assert absent.sum() == 10
    assert not cells.values["rna"][:][:, absent].sum()
    text = capsys.readouterr().out
    assert lacks(text, "50 of the 60 genes", "83.3%", "100.0% of its counts", "0 of its genes") == []


# The doctor ----------------------------------------------------------------------------------------------------------


def doctor(capsys, *words: str) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call("preprocess", *map(str, words), "--check")
    return stopped.value.code, capsys.readouterr().out


def test_the_doctor_reports_and_writes_nothing(rna, tmp_path, capsys):
    adata = rna.copy()
    adata.var_names = ["MARCH1", "AMY1", "1-Mar", *adata.var_names[3:]]
    adata.obs["kind"] = pd.Categorical(["T"] * 60 + ["B"] * 36)
    adata.obs["batch"] = pd.Categorical(["x", "y"] * 48)
    adata.write(tmp_path / "cells.h5ad")
    code, text = doctor(capsys, "--data_path", tmp_path / "cells.h5ad")
    assert code == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["cells.h5ad"]
    code, again = doctor(capsys, "--data_path", tmp_path / "cells.h5ad", "--json")
    found = json.loads(again)
    assert (code, found["usable"]) == (0, True)
    findings, totals = found["rna"], rna.X.sum(1).A1
    assert (findings["cells"], findings["genes"], findings["species"], findings["duplicates"]) == (96, 60, "human", 0)
    assert findings["ids"] == "symbols in the index"
    assert findings["known genes"] == "98.3%"
    assert findings["updated"] == ["MARCH1 → MARCHF1"]
    assert findings["spreadsheet dates"] == ["1-Mar → MTARC1"]
    assert findings["ambiguous"] == ["AMY1 (AMY1A or AMY1B or AMY1C)"]
    assert findings["values"] == "counts in X"
    assert findings["counts per cell"]["median"] == pytest.approx(np.median(totals))
    assert list(found["labels"]) == ["kind", "batch"]
    assert found["labels"]["kind"] == {"T": 60, "B": 36}
    (note,) = [note for note in found["notes"] if "--label_column" in note]
    assert lacks(note, "cell_type", "kind") == []
    assert lacks(text, "98.3%", "MARCH1 → MARCHF1", "T 60, B 36", "what will happen", "notes") == []
    assert "problems" not in text


@pytest.mark.parametrize(
    ("median", "target_sum", "hint"),
    [
        (363, {}, "1100"),
        (363, {"target_sum": 1000}, ""),
        (363, {"target_sum": "median"}, ""),
        (2000, {}, ""),
        (30, {}, "100"),
    ],
)
def test_the_doctor_looks_at_what_one_count_becomes(median, target_sum, hint, tmp_path, capsys):
    """One of 363 counts is log2(1 + 1e4/363) = 4.8 at 1e4, bin 4 of 5; at 1000 it is 1.9."""
    adata = make_cells(n_cells=20, n_genes=30)
    counts = np.ones((20, 30))
    counts[:, 0] = median - 29
    adata.X = csr_matrix(counts)
    adata.write(tmp_path / "cells.h5ad")
    _, text = doctor(capsys, "--data_path", tmp_path / "cells.h5ad", *command_line(target_sum), "--json")
    notes = " ".join(json.loads(text)["notes"])
    assert ("consider --target_sum" in notes) == bool(hint)
    assert hint in notes


def test_the_doctor_writes_numbers_one_way(tmp_path, capsys):
    adata = make_cells(n_cells=20)
    rng = np.random.default_rng(0)
    counts = adata.X.toarray() * rng.integers(1, 40_000, (20, 1))
    counts[0] = 0
    counts[0, :2] = 999_999, 1
    adata.X = csr_matrix(counts)
    adata.var_names = [*adata.var_names[:-1], adata.var_names[0]]
    adata.write(tmp_path / "cells.h5ad")
    _, text = doctor(capsys, "--data_path", tmp_path / "cells.h5ad")
    assert "e+" not in text
    assert "min " in text
    assert "max " in text
    assert "1 duplicate summed" in text


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([f"RP11-{i}P{i % 20}.{i % 9 + 1}" for i in range(100, 120)], "clone names"),
        ([f"ENST{i:011d}.2" for i in range(20)], "transcripts"),
        ([f"thing_{i}" for i in range(20)], "(thing_0, thing_1, thing_2, …)"),
    ],
)
def test_the_doctor_says_what_unknown_ids_are(ids, words, tmp_path, capsys):
    adata = make_cells()
    adata.var_names = [*adata.var_names[:20], *ids]
    adata.write(tmp_path / "cells.h5ad")
    _, text = doctor(capsys, "--data_path", tmp_path / "cells.h5ad", "--species", "human", "--json")
    (note,) = [note for note in json.loads(text)["notes"] if "not known human genes" in note]
    assert words in note
    assert ("transcript" in note) == (words == "transcripts")


# Coverage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "ends"), [(0.5, ""), (0.2, "warned"), (0.05, "refused")])
def test_a_file_is_judged_by_its_counts_as_well_as_by_its_genes(share, ends, rna, runs, tmp_path, capsys):
    """All genes of the model, but most counts in others that it does not know."""
    others = make_cells(n_cells=rna.n_obs, n_genes=200)
    others = others[:, ~others.var_names.isin(rna.var_names)].copy()
    others.obs_names = rna.obs_names
    known = rna.X.sum(1).A1[:, None]
    others.X = np.round(known * (1 - share) / share / others.n_vars + np.zeros(others.shape))
    others.X[:, 0] += 1
    both = ad.concat([rna, others], axis=1)
    both.X = csr_matrix(both.X)
    both.write(tmp_path / "query.h5ad")
    flags = {"data_path": tmp_path / "query.h5ad", "model_path": runs["celltype_atac"], "device": "cpu"}
    if ends == "refused":
        line = error_of(capsys, "predict_cell_type", **flags)
        assert lacks(line, "query.h5ad: ", "100.0%", "--min_count_coverage", "0.1") == []
        flags["min_count_coverage"] = 0
    run("predict_cell_type", **flags)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning: " in line and "genes" in line]
    assert bool(warnings) == bool(ends)


def test_the_doctor_names_an_error_and_goes_on(rna, tmp_path, capsys):
    bad = rna.copy()
    bad.X = rna.X.toarray() - 1
    mudata.MuData({"rna": bad, "atac": make_peaks(rna.obs_names)}).write(tmp_path / "cells.h5mu")
    code, text = doctor(capsys, "--data_path", tmp_path / "cells.h5mu", "--json", "--genome", "hg38")
    found = json.loads(text)
    assert (code, found["usable"]) == (2, False)
    assert lacks(found["problems"][0], "negative", " X") == []
    assert found["atac"]["peaks"] == 30
    assert found["atac"]["genome build"] == ["hg19", "hg38"]
    assert not found["what_will_happen"]


def test_the_doctor_of_a_prepared_file(ready_file, capsys):
    code, text = doctor(capsys, "--data_path", ready_file)
    assert code == 0
    assert "preprocessed already" in text


# Real cells ----------------------------------------------------------------------------------------------------------


def test_immune_cells_go_in_as_they_are(shared_data, tmp_path, capsys):
    """Outdated symbols, and a gene under its old and its new name."""
    path = shared_data / "immune_rna.h5ad"
    _, text = doctor(capsys, "--data_path", path, "--json")
    found = json.loads(text)["rna"]
    assert (found["known genes"], len(found["updated"]), found["duplicates"]) == ("96.6%", 99, 1)
    run("preprocess", data_path=path, out_path=tmp_path / "ready.h5ad")
    raw, ready = ad.read_h5ad(path), ad.read_h5ad(tmp_path / "ready.h5ad")
    assert ready.shape == (699, 6396)
    np.testing.assert_array_equal(ready.layers["counts"].sum(1), raw.X.sum(1))
    assert "ATOSA" in ready.var_names
    assert "FAM214A" not in ready.var_names


def test_snareseq2_goes_in_as_it_is(shared_data, tmp_path, capsys):
    run("preprocess", data_path=shared_data / "snareseq2_mop.h5mu", out_path=tmp_path / "ready.h5mu")
    assert lacks(capsys.readouterr().out, "genome", "mm10") == []
    cells = read_cells(tmp_path / "ready.h5mu", ("rna", "atac"))
    assert (cells.values["rna"].shape, cells.values["atac"].shape) == ((8622, 1677), (8622, 25734))
    assert (cells.stamp["species"], cells.stamp["genome"]) == ("mouse", "mm10")


@pytest.mark.parametrize("genome", [{}, {"genome": "hg19"}])
def test_a549_goes_in_although_a_peak_passes_a_chromosomes_end(genome, shared_data, capsys):
    folder = shared_data / "multiome" / "a549_scicar"
    paths = [f"--{name}_path {folder}/{name}.h5ad" for name in ("rna", "atac")]
    code, text = doctor(capsys, *" ".join(paths).split(), *command_line(genome), "--json")
    found = json.loads(text)
    assert (code, found["atac"]["genome build"], found["atac"]["peaks"]) == (0, ["hg19"], 52_761)
    notes = " ".join(found["notes"])
    assert lacks(notes, "1,441 peaks", "23 ", "chrhs37d5") == []
    assert lacks(notes, "1 of 52,761 peaks", "hg19", "chr17:81194897-81195261") == []


@pytest.mark.filterwarnings("ignore")
def test_pbmc68k_goes_in_although_its_values_are_scaled(tmp_path, capsys):
    """Its raw holds logarithms rounded to three decimals: the counts come back."""
    sc.datasets.pbmc68k_reduced().write(tmp_path / "pbmc.h5ad")
    run("preprocess", data_path=tmp_path / "pbmc.h5ad", out_path=tmp_path / "ready.h5ad", label_column="bulk_labels")
    assert lacks(capsys.readouterr().out, "log1p", "base e", "recovered", "raw") == []
    counts = ad.read_h5ad(tmp_path / "ready.h5ad").layers["counts"]
    assert counts.shape == (700, 765)
    assert (counts.data == np.round(counts.data)).all()
    smallest = np.minimum.reduceat(counts.data, counts.indptr[:-1])
    assert (smallest == 1).mean() > 0.99


def test_an_encoder_and_labels_of_a_file_with_atac_alone(runs, simulation, ready_file, tmp_path):
    """ATAC is not normalised, so a file without RNA fits models that were made from paired cells, and the reverse."""
    write_whole(simulation.mdata["atac"].copy(), tmp_path / "atac.h5ad")
    run("preprocess", data_path=tmp_path / "atac.h5ad", out_path=tmp_path / "ready.h5ad", val_fraction=0.2)
    few = {"ckpt_dir": tmp_path, "max_steps": 1}
    run("pretrain_atac", data_path=tmp_path / "ready.h5ad", model_name="atac", **(ATAC | few))
    parents = {"rna_model_path": runs["rna"], "atac_model_path": tmp_path / "atac"}
    run("pretrain_multimodal", data_path=ready_file, model_name="joined", **parents, **(MULTIMODAL | few))
    labelled = {"pretrained_model_path": runs["student_rna"], "model": "types"}
    run("train_missing_celltype_func", data_path=tmp_path / "ready.h5ad", **labelled, **(TRAINING | few))
    types = load_model(tmp_path / "types", "celltype")
    assert types.stamp["target_sum"] == load_model(runs["student_rna"], "student").stamp["target_sum"]
    assert load_model(tmp_path / "joined", "multimodal").parents["atac"] == load_model(tmp_path / "atac", "atac").hash
