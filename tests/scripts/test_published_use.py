"""Imported folders are ordinary model folders: every script and downstream task takes them."""

import json
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from tests.helpers import TRAINING, assert_same_tensors, error_of, lacks, last_weights, run, weights
from tests.published import LAYOUTS, PEAKS, genes, import_state, raw_cells
from utils.train.model_folder import load_model
from utils.train.published import EXTRA_TOKEN

FINE_TUNE = TRAINING | {"epochs": 4, "learning_rate": 0.01, "patience": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Every layout imported, and raw cells, also preprocessed as the joined model and scBERT read them."""
    folder = tmp_path_factory.mktemp("use")
    for layout in LAYOUTS:
        import_state(folder, layout)
    raw_cells(folder / "raw.h5mu", genes()[::-1], PEAKS)
    for name in ("student", "scbert"):
        flags = {"data_path": folder / "raw.h5mu", "gene_reference": folder / name}
        run(
            "preprocess",
            **flags,
            out_path=folder / f"{name}.h5mu",
            split_by="batch",
            test_groups="b1",
            val_fraction=0.3,
        )
    return folder


def test_preprocessing_aligns_cells_to_an_imported_folder(place):
    from utils.cells.preprocessed import read_cells

    cells = read_cells(place / "scbert.h5mu", ("rna",))
    assert list(cells.features["rna"]) == [*genes()[:-1], EXTRA_TOKEN]
    assert not cells.values["rna"][:][:, [-1]].nnz


def test_fine_tuning_then_prediction_and_evaluation(place, tmp_path):
    run(
        "train_missing_celltype_func",
        data_path=place / "student.h5mu",
        pretrained_model_path=place / "student",
        ckpt_dir=tmp_path,
        model="tuned",
        **FINE_TUNE,
    )
    saved = load_model(tmp_path / "tuned", "celltype")
    assert saved.config["rna"].binning == "round"
    assert saved.stamp["source"][0]["name"] == "student.pth"  # a child still names the published file
    run("predict_cell_type", data_path=place / "raw.h5mu", model_path=tmp_path / "tuned", out_path=tmp_path / "p.h5mu")
    run("evaluate", data_path=place / "student.h5mu", model_path=tmp_path / "tuned", out_path=tmp_path / "scores")


def test_fine_tuning_from_stage_1_alone(place, tmp_path):
    run(
        "train_missing_celltype_func",
        data_path=place / "scbert.h5mu",
        pretrained_model_path=import_state(tmp_path, "rna", gene_reference=tmp_path / "genes_but_one.txt"),
        other_modality="zeros",
        ckpt_dir=tmp_path,
        model="tuned",
        **FINE_TUNE,
    )
    assert load_model(tmp_path / "tuned", "celltype").features["rna"][-1] == EXTRA_TOKEN


def test_fine_tuning_with_scberts_own_head_goes_back_to_its_layout(place, tmp_path, capsys):
    panglao = import_state(tmp_path, "rna", gene_reference=tmp_path / "genes_but_one.txt")
    flags = {"data_path": place / "scbert.h5mu", "ckpt_dir": tmp_path, "other_modality": "none"}
    shape = {"classifier_hidden": 128, "learning_rate": 1e-3, "epochs": 12, "keep": "last"}
    run("train_missing_celltype_func", **flags, **FINE_TUNE | shape, pretrained_model_path=panglao, model="tuned")
    saved = load_model(tmp_path / "tuned", "celltype")
    assert saved.state["towers.rna.pooling.projection.weight"].shape == (512, 97)
    run("predict_cell_type", data_path=place / "raw.h5mu", model_path=tmp_path / "tuned", out_path=tmp_path / "p.h5mu")
    table = pd.read_csv(tmp_path / "p.predicted.csv", comment="#", index_col="barcode")
    truth = mudata.read_h5mu(place / "raw.h5mu")["rna"].obs["cell_type"].reindex(table.index)
    assert (table["predicted_cell_type"] == truth).mean() > 0.8  # types differ in most genes

    run("export_published", model_path=tmp_path / "tuned", out_path=tmp_path / "tuned.pth")
    write_lines(tmp_path / "types.txt", saved.outputs)
    lists = {"gene_reference": tmp_path / "genes_but_one.txt", "labels": tmp_path / "types.txt"}
    run("import_published", checkpoint=tmp_path / "tuned.pth", ckpt_dir=tmp_path, model_name="back", **lists)
    run("predict_cell_type", data_path=place / "raw.h5mu", model_path=tmp_path / "back", out_path=tmp_path / "b.h5mu")
    again = pd.read_csv(tmp_path / "b.predicted.csv", comment="#", index_col="barcode")
    assert (again["predicted_cell_type"] == table["predicted_cell_type"]).all()

    line = error_of(
        capsys,
        "train_missing_celltype_func",
        **flags | {"data_path": place / "student.h5mu"},
        pretrained_model_path=place / "student",
        model="x",
    )
    assert lacks(line, "--other_modality none", "pretrain_rna.py") == []


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("layout", ["scbert", "celltype"])
def test_imported_classifiers_predict_and_are_evaluated(layout, place, tmp_path, capsys):
    run("predict_cell_type", data_path=place / "raw.h5mu", model_path=place / layout, out_path=tmp_path / "p.h5mu")
    assert "not calibrated" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "p.predicted.csv", comment="#", index_col="barcode")
    assert set(table["predicted_cell_type"]) <= set(load_model(place / layout, "celltype").outputs)
    data = place / ("scbert.h5mu" if layout == "scbert" else "student.h5mu")
    run("evaluate", data_path=data, model_path=place / layout, out_path=tmp_path / "scores")


def test_stages_2_and_3_from_imported_encoders(place, tmp_path):
    data, paths = {"data_path": place / "student.h5mu"}, {"ckpt_dir": tmp_path}
    encoders = {"rna_model_path": place / "rna", "atac_model_path": place / "atac"}
    run("pretrain_multimodal", **data, **paths, **encoders, model_name="joined", **TRAINING)
    run("pretrain_multimodal", **data, **paths, **encoders, model_name="again", **TRAINING, max_steps=2)
    run("pretrain_multimodal", **data, **paths, **encoders, model_name="again", **TRAINING, resume=True)
    assert_same_tensors(last_weights(tmp_path / "again"), last_weights(tmp_path / "joined"))
    for name, teacher in (("own", tmp_path / "joined"), ("imported", place / "multimodal")):
        latents = tmp_path / f"latents_{name}"
        run("get_latent_emb", **data, model_path=teacher, ckpt_dir=latents, device="cpu")
        student = {"model_path": teacher, "dir_train": latents, "dir_val": latents, "model_name": f"student_{name}"}
        run("pretrain_missing_mod", **data, **paths, **student, **TRAINING)
        assert weights(tmp_path / f"student_{name}")["towers.rna.encoder.norm.weight"].shape == (40,)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["cells", "genes"])
def test_embeddings_by_every_folder(what, layout, place, tmp_path):
    if (what, layout) == ("genes", "atac"):
        pytest.skip("an ATAC encoder has no genes")
    flags = {"data_path": place / "raw.h5mu", "model_path": place / layout, "what": what, "device": "cpu"}
    run("get_latent_emb", **flags, out_path=tmp_path / "out.h5ad")
    embedded = ad.read_h5ad(tmp_path / "out.h5ad")
    widths = {"rna": 40, "atac": 48, "scbert": 512}
    assert embedded.n_vars == (40 if what == "genes" else widths.get(layout, 128))
    assert np.isfinite(embedded.X).all()


# The downstream tasks ----------------------------------------------------------------------------------------------


def test_translation_by_an_imported_student(place, tmp_path):
    flags = {"data_path": place / "raw.h5mu", "model_path": place / "student", "ready_path": place / "student.h5mu"}
    run("downstream.translate", **flags, out_path=tmp_path / "atac.h5ad")
    translated = ad.read_h5ad(tmp_path / "atac.h5ad")
    assert list(translated.var_names) == PEAKS
    assert 0 < translated.X.toarray().mean() < 1
    run("evaluate", data_path=place / "student.h5mu", model_path=place / "student", out_path=tmp_path / "scores")


def test_gene_property_of_an_imported_encoder(place, tmp_path):
    flags = {"data_path": place / "raw.h5mu", "model_path": place / "rna", "what": "genes", "device": "cpu"}
    run("get_latent_emb", **flags, out_path=tmp_path / "genes.h5ad")
    pd.DataFrame({"one": genes()[:40], "two": genes()[40:80]}).to_csv(tmp_path / "lists.csv", index=False)
    flags = {"lists": tmp_path / "lists.csv", "embedding_path": tmp_path / "genes.h5ad", "repeats": 2, "folds": 2}
    run("downstream.gene_property", **flags, out_path=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "gene_property.json").read_text())


@pytest.mark.parametrize("layout", ["rna", "scbert", "student"])
def test_drug_response_of_lines_that_an_imported_model_embeds(layout, place, tmp_path):
    rng, lines = np.random.default_rng(0), [f"ACH-{i:03d}" for i in range(60)]
    tpm = pd.DataFrame(np.log2(1 + rng.gamma(1, 20, (60, len(genes())))), lines, genes())
    tpm.to_csv(tmp_path / "expression.csv")
    pd.DataFrame(rng.normal(size=(3, 60)), ["a", "b", "c"], lines).to_csv(tmp_path / "ic50.csv")
    (tmp_path / "smiles.txt").write_text("a\tCCO\nb\tCCCO\nc\tCCN\n")
    files = {"ic50_path": "ic50.csv", "smiles_path": "smiles.txt", "expression_path": "expression.csv"}
    flags = {name: tmp_path / file for name, file in files.items()} | {
        "values": "log2",
        "epochs": 2,
        "device": "cpu",
        "val_fraction": 0.2,
    }
    run("downstream.drug_response", **flags, model_path=place / layout, out_path=tmp_path / "out")
    saved = load_model(tmp_path / "out" / "model", "drug_response")
    assert saved.options["latent_dim"] == {"rna": 40, "scbert": 512, "student": 128}[layout]


def test_perturbation_from_imported_cells(place, tmp_path):
    rng, perturbed = np.random.default_rng(0), genes()[:6]
    labels = ["ctrl"] * 30 + np.repeat([f"{gene}+ctrl" for gene in perturbed], 20).tolist()
    counts = csr_matrix(rng.poisson(20, (len(labels), len(genes()))).astype(np.float32))
    obs = pd.DataFrame({"condition": labels}, index=[f"cell{i}" for i in range(len(labels))])
    ad.AnnData(counts, obs, pd.DataFrame(index=genes())).write(tmp_path / "cells.h5ad")
    flags = {"epochs": 1, "cycle_epochs": 1, "folds": 3, "device": "cpu", "out_path": tmp_path / "out"}
    run("downstream.perturbation", data_path=tmp_path / "cells.h5ad", model_path=place / "student", **flags)
    assert json.loads((tmp_path / "out" / "perturbation.json").read_text())["scores"]
