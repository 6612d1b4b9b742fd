"""All stages by the scripts, for both modalities that can be missing, up to predictions for raw cells."""

import json
import os
import shutil
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix, hstack

from tests.helpers import MULTIMODAL, TRAINING, records, run, weights
from utils.features.gene_ids import translate
from utils.features.gene_symbols import load_gene_table
from utils.files.write import write_whole
from utils.train.log import training_folder
from utils.train.model_folder import load_model

MISSING = {"atac": "rna", "rna": "atac"}  # missing → measured
KIND_OF = {"student_atac": "student", "student_rna": "student", "celltype_atac": "celltype", "celltype_rna": "celltype"}


def label(cells: ad.AnnData | mudata.MuData, model: Path, folder: Path, **flags) -> ad.AnnData | mudata.MuData:
    """Write cells, predict, read what was written."""
    suffix = ".h5mu" if isinstance(cells, mudata.MuData) else ".h5ad"
    write_whole(cells, folder / f"query{suffix}")
    settings = {"model_path": model, "device": "cpu"} | flags
    run("predict_cell_type", data_path=folder / f"query{suffix}", **settings)
    out = folder / f"query.predicted{suffix}"
    return mudata.read_h5mu(out) if suffix == ".h5mu" else ad.read_h5ad(out)


def assert_same_predictions(ours: ad.AnnData, theirs: ad.AnnData) -> None:
    """By barcode, to the bit."""
    theirs = theirs[ours.obs_names]
    assert list(ours.obs["predicted_cell_type"].astype(str)) == list(theirs.obs["predicted_cell_type"].astype(str))
    np.testing.assert_array_equal(ours.obs["confidence"], theirs.obs["confidence"])
    np.testing.assert_array_equal(ours.obsm["X_scmomer"], theirs.obsm["X_scmomer"])


@pytest.fixture(params=MISSING)
def missing(request) -> str:
    return request.param


@pytest.fixture
def query(simulation, missing) -> ad.AnnData:
    """Raw cells of the one modality that is measured, without their types."""
    adata = simulation.mdata[MISSING[missing]].copy()
    adata.obs = adata.obs[["donor"]].copy()
    return adata


@pytest.fixture
def model(runs, missing) -> Path:
    return runs[f"celltype_{missing}"]


@pytest.fixture
def labelled(query, model, tmp_path) -> ad.AnnData:
    folder = tmp_path / "labelled"
    folder.mkdir()
    return label(query, model, folder)


# Model folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rna", "atac", "multimodal", *KIND_OF])
def test_every_stage_leaves_a_whole_model_folder(runs, name):
    saved = load_model(runs[name], KIND_OF.get(name, name))
    names = {path.name for path in runs[name].iterdir()}
    features = {"rna": {"genes.txt"}, "atac": {"peaks.txt"}}.get(name, {"genes.txt", "peaks.txt"})
    features |= {"fitted.safetensors"} if name.startswith("celltype") else set()
    assert names == features | {
        "model.safetensors",
        "config.json",
        "README.md",
        "manifest.json",
        "metrics.jsonl",
        "loss_curve.png",
        "tensorboard",
    }
    listed = json.loads((runs[name] / "manifest.json").read_text())
    assert listed.keys() == features | {"model.safetensors", "config.json", "README.md"}
    assert [r["phase"] for r in records(runs[name])][:2] == ["train", "val"]
    if name not in ("rna", "atac"):
        state = saved.build().state_dict()
        assert state.keys() == saved.state.keys()


def test_stage_one_encoders_are_taken_over_and_only_the_last_blocks_are_trained(runs):
    """--trainable_blocks 2 of 2: the embeddings stay, the blocks move."""
    joint = weights(runs["multimodal"])
    rna, atac = weights(runs["rna"]), weights(runs["atac"])
    for kept in ("encoder.token_embedding.weight", "encoder.gene_embedding.weight"):
        assert (joint[f"towers.rna.{kept}"] == rna[kept]).all()
    for kept in ("encoder.peak_rows", "encoder.positions", "encoder.cls_token"):
        assert (joint[f"towers.atac.{kept}"] == atac[kept]).all()
    moved = "encoder.blocks.1.feed_forward.0.weight"
    assert not (joint[f"towers.rna.{moved}"] == rna[moved]).all()
    assert not (joint[f"towers.atac.{moved}"] == atac[moved]).all()


@pytest.mark.parametrize(("missing", "tower"), [("atac", "rna"), ("rna", "atac")])
def test_the_student_is_added_to_an_unchanged_teacher(runs, missing, tower):
    teacher, student = weights(runs["multimodal"]), weights(runs[f"student_{missing}"])
    assert {name.split(".")[0] for name in student.keys() - teacher.keys()} == {"student"}
    assert all((student[name] == teacher[name]).all() for name in teacher if name.startswith("towers."))
    assert not (student["fusion.linear.weight"] == teacher["fusion.linear.weight"]).all()
    celltype = weights(runs[f"celltype_{missing}"])
    assert {name.split(".")[1] for name in celltype if name.startswith("towers.")} == {tower}
    assert all((celltype[name] == student[name]).all() for name in student if name.startswith("student."))


def test_parents_are_signed(runs):
    parents = {name: load_model(runs[name], KIND_OF.get(name, name)).parents for name in ("multimodal", *KIND_OF)}
    digest = lambda name: load_model(runs[name], KIND_OF.get(name, name)).hash
    assert parents["multimodal"] == {"rna": digest("rna"), "atac": digest("atac")}
    for missing in MISSING:
        assert parents[f"student_{missing}"] == {"teacher": digest("multimodal")}
        assert parents[f"celltype_{missing}"] == {"pretrained": digest(f"student_{missing}")}


def test_latents_are_the_teachers_by_barcode(runs, cells):
    for split in ("train", "val"):
        latents = ad.read_h5ad(runs["latents"] / f"{split}.h5ad")
        assert list(latents.obs_names) == list(cells.obs.index[cells.rows(split)])
        assert latents.uns["teacher"] == load_model(runs["multimodal"], "multimodal").hash
        for name in ("rna", "atac"):
            values = latents.obsm[name]
            assert values.shape == (len(cells.rows(split)), 16)
            np.testing.assert_allclose(values.mean(1), 0, atol=0.01)  # a LayerNorm, hardly trained, comes last
            np.testing.assert_allclose(values.std(1), 1, atol=0.05)
        fusion = load_model(runs["multimodal"], "multimodal").state
        joined = np.hstack([latents.obsm["atac"], latents.obsm["rna"]])
        expected = joined @ fusion["fusion.linear.weight"].numpy().T + fusion["fusion.linear.bias"].numpy()
        np.testing.assert_allclose(latents.X, expected, rtol=1e-3, atol=1e-4)


# Predictions -------------------------------------------------------------------------------------------------------


def test_predictions_of_raw_cells(labelled, query, model, simulation):
    assert list(labelled.obs_names) == list(query.obs_names)
    assert list(labelled.var_names) == list(query.var_names)
    assert (labelled.X != query.X).nnz == 0
    assert (labelled.obs["donor"] == query.obs["donor"]).all()
    types = set(simulation.mdata.obs["cell_type"])
    assert set(labelled.obs["predicted_cell_type"]) <= types == set(load_model(model, "celltype").outputs)
    assert ((labelled.obs["confidence"] > 1 / 3) & (labelled.obs["confidence"] <= 1)).all()
    assert labelled.obsm["X_scmomer"].shape == (96, 16)
    assert np.isfinite(labelled.obsm["X_scmomer"]).all()
    assert np.ptp(labelled.obsm["X_scmomer"], axis=0).min() > 1e-3
    truth = simulation.mdata.obs["cell_type"].astype(str)
    commonest = truth.value_counts(normalize=True).iloc[0]
    assert (labelled.obs["predicted_cell_type"].astype(str) == truth).mean() > commonest


def test_predictions_follow_the_files_order(labelled, query, model, tmp_path):
    order = np.random.default_rng(0).permutation(96)
    out = label(query[order].copy(), model, tmp_path)
    assert list(out.obs_names) == list(query.obs_names[order])
    assert_same_predictions(out, labelled)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_predictions_do_not_depend_on_the_minibatch(labelled, query, model, tmp_path, batch_size):
    assert_same_predictions(label(query, model, tmp_path, batch_size=batch_size), labelled)


def test_columns_in_any_order_and_unknown_ones_change_nothing(labelled, query, model, tmp_path):
    rng = np.random.default_rng(0)
    if "rna" in model.name:  # the cells are ATAC
        extra = [f"chr1:{start}-{start + 100}" for start in range(1000, 6000, 1000)]
    else:
        extra = [gene for gene in ("TP53", "NOT-A-GENE", "XIST", "EGFR", "GAPDH") if gene not in query.var_names]
    more = csr_matrix(rng.poisson(3, (96, len(extra))).astype(np.float32))
    names = [*query.var_names, *extra]
    order = rng.permutation(len(names))
    counts = hstack([query.X, more]).tocsr()[:, order]
    changed = ad.AnnData(counts, query.obs, pd.DataFrame(index=[names[i] for i in order]))
    assert_same_predictions(label(changed, model, tmp_path), labelled)


@pytest.mark.parametrize("kind", ["rna", "atac"])
def test_one_modality_alone_is_enough(kind, runs, simulation, ready_file, tmp_path):
    """From a stage-I encoder to predictions; its weights are taken over, and the model has no other tower."""
    run(
        "train_missing_celltype_func",
        **TRAINING | {"data_path": ready_file, "ckpt_dir": tmp_path, "learning_rate": 1e-2},
        pretrained_model_path=runs[kind],
        model="alone",
        other_modality="zeros",
        trainable_blocks=0,
    )
    alone, encoder = weights(tmp_path / "alone"), weights(runs[kind])
    assert {name.split(".")[1] for name in alone if name.startswith("towers.")} == {kind}
    blocks = [name for name in encoder if ".blocks." in name]
    assert blocks and all((alone[f"towers.{kind}.{name}"] == encoder[name]).all() for name in blocks)
    predicted = label(simulation.mdata[kind].copy(), tmp_path / "alone", tmp_path)
    types = load_model(tmp_path / "alone", "celltype").outputs
    assert set(predicted.obs["predicted_cell_type"]) <= set(types) == set(simulation.mdata.obs["cell_type"])
    assert np.ptp(predicted.obsm["X_scmomer"], axis=0).max() > 1e-3


def test_outdated_symbols_change_nothing(runs, simulation, tmp_path):
    query = simulation.mdata["rna"].copy()
    expected = label(query, runs["celltype_atac"], tmp_path)
    table = load_gene_table().set_index("symbol")["previous"]
    old = {}
    for gene in query.var_names:
        candidates = [name for name in table[gene].split("|") if name and name not in query.var_names]
        placed = [name for name in candidates if translate([name], "human").symbols[0] == gene]
        old |= {gene: placed[0]} if placed else {}
    assert len(old) >= 20
    query.var_names = [old.get(gene, gene) for gene in query.var_names]
    assert_same_predictions(label(query, runs["celltype_atac"], tmp_path), expected)


def test_counts_are_normalised_once(labelled, query, model, ready_file, tmp_path):
    """A preprocessed file, and one with log values in X, give what their counts give."""
    paired = mudata.read_h5mu(ready_file)
    done = label(paired, model, tmp_path)
    assert list(done.obs["predicted_cell_type"].astype(str)) == list(labelled.obs["predicted_cell_type"].astype(str))
    np.testing.assert_allclose(done.obsm["X_scmomer"], labelled.obsm["X_scmomer"], rtol=1e-4, atol=1e-5)
    query.layers["counts"] = query.X.copy()
    query.X = query.X.log1p()
    assert_same_predictions(label(query, model, tmp_path), labelled)


def test_a_cell_without_counts_stays_unassigned(labelled, query, model, tmp_path):
    counts = query.X.toarray()
    counts[[3, 50]] = 0
    query.X = csr_matrix(counts)
    out = label(query, model, tmp_path)
    assert list(np.flatnonzero(out.obs["predicted_cell_type"] == "unassigned")) == [3, 50]
    assert (out.obs["confidence"].iloc[[3, 50]] == 0).all()
    assert np.isfinite(out.obsm["X_scmomer"]).all()
    others = np.delete(np.arange(96), [3, 50])
    assert_same_predictions(out[others], labelled)


def test_paired_cells_are_labelled_by_the_one_modality(labelled, simulation, model, tmp_path):
    out = label(simulation.mdata.copy(), model, tmp_path)
    assert_same_predictions(out, labelled)


def test_cells_that_lack_the_modality_get_no_type(simulation, runs, tmp_path):
    mdata = simulation.mdata
    part = mudata.MuData({"rna": mdata["rna"][10:60].copy(), "atac": mdata["atac"].copy()})
    out = label(part, runs["celltype_atac"], tmp_path)
    with_rna = out.obs_names.isin(mdata.obs_names[10:60])
    assert with_rna.sum() == 50
    assert (out.obs["predicted_cell_type"].notna() == with_rna).all()
    assert (out.obs["confidence"].notna() == with_rna).all()
    assert (np.isfinite(out.obsm["X_scmomer"]).all(1) == with_rna).all()


def test_named_by_folder_and_ckpt_dir_and_to_a_chosen_file(labelled, query, model, runs, tmp_path):
    write_whole(query, tmp_path / "cells.h5ad")
    run(
        "predict_cell_type",
        data_path=tmp_path / "cells.h5ad",
        model_path=model.name,
        ckpt_dir=runs.folder,
        out_path=tmp_path / "new" / "out.h5ad",
        device="cpu",
    )
    assert sorted(os.listdir(tmp_path)) == ["cells.h5ad", "labelled", "new"]
    assert_same_predictions(ad.read_h5ad(tmp_path / "new" / "out.h5ad"), labelled)


def test_a_model_folder_is_enough_by_itself(labelled, query, model, runs, ready_file, tmp_path):
    """Moved elsewhere, while everything it was made from is out of reach."""
    moved = Path(shutil.copytree(model, tmp_path / "elsewhere" / "renamed"))
    hidden = [(runs.folder, tmp_path / "hidden runs"), (ready_file, tmp_path / "hidden.h5mu")]
    for path, away in hidden:
        shutil.move(path, away)
    try:
        out = label(query, moved, tmp_path)
    finally:
        for path, away in hidden:
            shutil.move(away, path)
    assert_same_predictions(out, labelled)


def test_training_goes_on_from_a_folder_whose_training_state_is_deleted(runs, ready_file, tmp_path):
    student = Path(shutil.copytree(runs["student_atac"], tmp_path / "student"))
    assert not training_folder(student).exists()
    settings = TRAINING | {"epochs": 1}
    run(
        "train_missing_celltype_func",
        data_path=ready_file,
        pretrained_model_path=student,
        ckpt_dir=tmp_path,
        model="celltype",
        **settings,
    )
    shutil.rmtree(training_folder(tmp_path / "celltype"))
    assert load_model(tmp_path / "celltype", "celltype").build()


# Other ways --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "missing", "towers"),
    [("zeros", "atac", {"rna"}), ("zeros", "rna", {"atac"}), ("measured", "atac", {"rna", "atac"})],
)
def test_without_a_student(runs, ready_file, simulation, tmp_path, other, missing, towers):
    run(
        "train_missing_celltype_func",
        data_path=ready_file,
        pretrained_model_path=runs["multimodal"],
        ckpt_dir=tmp_path,
        model="celltype",
        other_modality=other,
        missing=missing,
        **TRAINING,
    )
    saved = load_model(tmp_path / "celltype", "celltype")
    assert set(saved.build().towers) == set(saved.model_config.inputs) == towers
    mdata = simulation.mdata
    query = mdata.copy() if other == "measured" else mdata[MISSING[missing]].copy()
    out = label(query, tmp_path / "celltype", tmp_path)
    assert set(out.obs["predicted_cell_type"]) <= set(mdata.obs["cell_type"])
    assert np.isfinite(out.obsm["X_scmomer"]).all()


def test_a_stage_three_run_resumes_as_if_it_had_not_stopped(runs, ready_file, tmp_path):
    paths = {"data_path": ready_file, "model_path": runs["multimodal"], "ckpt_dir": tmp_path}
    paths |= {"dir_train": runs["latents"], "dir_val": runs["latents"] / "val.h5ad"}
    run("pretrain_missing_mod", **paths, **TRAINING, model_name="whole")
    run("pretrain_missing_mod", **paths, **TRAINING, model_name="cut", max_steps=4)
    run("pretrain_missing_mod", **paths, **TRAINING, model_name="cut", resume=True)
    assert TRAINING["epochs"] == records(tmp_path / "cut")[-1]["epoch"]
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all((whole[name] == cut[name]).all() for name in whole)


def test_latents_are_joined_by_barcode_not_by_row(runs, ready_file, tmp_path):
    latents = ad.read_h5ad(runs["latents"] / "train.h5ad")
    write_whole(latents[np.random.default_rng(0).permutation(len(latents))].copy(), tmp_path / "train.h5ad")
    run(
        "pretrain_missing_mod",
        data_path=ready_file,
        model_path=runs["multimodal"],
        dir_train=tmp_path,
        dir_val=runs["latents"],
        ckpt_dir=tmp_path,
        model_name="student",
        **TRAINING,
    )
    assert records(tmp_path / "student") == records(runs["student_atac"])


@pytest.mark.parametrize("known", [0.0, 0.5])
def test_pretraining_needs_no_labels(simulation, runs, tmp_path, known):
    mdata = simulation.mdata.copy()
    kept = np.random.default_rng(0).random(96) < known
    for part in (mdata, mdata["rna"], mdata["atac"]):
        if known:
            part.obs["cell_type"] = part.obs["cell_type"].where(kept)
        else:
            del part.obs["cell_type"]
    write_whole(mdata, tmp_path / "raw.h5mu")
    run("preprocess", data_path=tmp_path / "raw.h5mu", out_path=tmp_path / "ready.h5mu", val_fraction=0.2)
    paths = {"data_path": tmp_path / "ready.h5mu", "ckpt_dir": tmp_path}
    encoders = {"rna_model_path": runs["rna"], "atac_model_path": runs["atac"]}
    run("pretrain_multimodal", **paths, **encoders, **MULTIMODAL, model_name="multimodal")
    row = records(tmp_path / "multimodal", "train")[0]
    assert 0 < row["pair_accuracy"] < 1
    assert np.isfinite(row["loss"])


def test_temperature_calibrates_the_confidence(labelled, model, query, tmp_path):
    """Confidence is the softmax of the saved logits over the saved temperature."""
    saved = load_model(model, "celltype")
    assert saved.fitted["temperature"] > 0
    weight, bias = ([saved.state[f"head.layers.{i}.{name}"].numpy() for i in (1, 4)] for name in ("weight", "bias"))
    mean, deviation = (saved.state[f"head.{name}"].numpy() for name in ("mean", "deviation"))
    assert mean.any() and (deviation != 1).all()
    hidden = np.maximum((labelled.obsm["X_scmomer"] - mean) / deviation @ weight[0].T + bias[0], 0)
    logits = (hidden @ weight[1].T + bias[1]) / saved.fitted["temperature"]
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    np.testing.assert_allclose(labelled.obs["confidence"], probability.max(1), rtol=1e-3)
    assert list(labelled.obs["predicted_cell_type"]) == [saved.outputs[i] for i in probability.argmax(1)]
