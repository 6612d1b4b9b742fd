"""--mix_baselines: a folder whose probabilities are a mixture of the model's and of simple classifiers'."""

import json
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from tests.helpers import CPU, TRAINING, error_of, lacks, run, weights
from tests.scripts.test_predict import forge
from utils.cells.labels import encode_labels
from utils.cells.minibatches import CellDataset, train_and_val
from utils.evaluate import boxed, mixture
from utils.evaluate.mixture import OURS
from utils.predict import annotate
from utils.predict.explain import explain, take
from utils.predict.infer import decode, predict
from utils.train.config import InferConfig
from utils.train.model_folder import load_model

HOW = InferConfig(device="cpu")
FLAGS = TRAINING | {"epochs": 3, "learning_rate": 0.01, "patience": 0}


@pytest.fixture(scope="module")
def flags(ready_file, runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    return FLAGS | {"data_path": ready_file, "pretrained_model_path": runs["student_atac"], "ckpt_dir": folder}


@pytest.fixture(scope="module")
def folders(flags):
    """The same training twice, without and with a mixture."""
    run("train_missing_celltype_func", **flags, model="plain")
    run("train_missing_celltype_func", **flags, model="mixed", mix_baselines="yes")
    return flags["ckpt_dir"]


@pytest.fixture
def dataset(cells):
    return CellDataset({"rna": cells.values["rna"]}, cells.obs.index)


def test_the_model_is_the_same_and_so_is_what_the_mixture_does_not_touch(folders, dataset):
    plain, mixed = (load_model(folders / name, "celltype") for name in ("plain", "mixed"))
    for name, weight in weights(folders / "plain").items():
        np.testing.assert_array_equal(weight, weights(folders / "mixed")[name])
    for name, array in plain.arrays.items():
        np.testing.assert_array_equal(array, mixed.arrays[name])
    assert "mixture" not in plain.fitted and set(mixed.fitted["mixture"]) == {OURS, *boxed.NAMES}
    alone, both = (decode(saved, dataset, HOW, CPU, "test") for saved in (plain, mixed))
    np.testing.assert_array_equal(alone[0], both[0])  # the embedding, and so the novelty
    # Without a mixture, the logits are those of the network, to the bit.
    _, bare = decode(plain, dataset, HOW, CPU, "test", model=plain.build())
    np.testing.assert_array_equal(alone[1]["logits"], bare["logits"])
    expected = torch.softmax(torch.from_numpy(alone[1]["logits"]) / plain.fitted["temperature"], 1).numpy()
    np.testing.assert_array_equal(predict(plain, dataset, HOW, CPU)["probability"], expected)


def test_type_confidence_and_sets_are_those_of_the_mixture(folders, dataset, cells):
    """The product of the members' probabilities to the powers of the folder, counted again."""
    plain, mixed = (load_model(folders / name, "celltype") for name in ("plain", "mixed"))
    _, alone = decode(plain, dataset, HOW, CPU, "test")
    others = boxed.boxed_probabilities(mixed.arrays, cells.values["rna"], len(mixed.outputs))
    power = mixed.fitted["mixture"]
    product = torch.softmax(torch.from_numpy(alone["logits"]).double(), 1).numpy() ** power[OURS]
    for name in boxed.NAMES:
        product *= (0.999 * others[name] + 0.001 / len(mixed.outputs)) ** power[name]
    product **= 1 / mixed.fitted["temperature"]
    product /= product.sum(1, keepdims=True)
    found = predict(mixed, dataset, HOW, CPU)
    np.testing.assert_allclose(found["probability"], product, atol=2e-3)
    np.testing.assert_array_equal(found["confidence"], found["probability"].max(1))
    types = np.array(mixed.outputs)[found["probability"].argmax(1)]
    np.testing.assert_array_equal(found["predicted_cell_type"], types)
    given = np.array(mixed.outputs)[boxed.boxed_types(mixed.arrays, cells.values["rna"])]
    np.testing.assert_allclose(found["agreement"], (1 + (given == types).sum(0)) / 4)


def test_the_mixture_is_better_than_a_model_that_has_learned_little(folders, cells, dataset):
    """Over all cells, whose types the simple classifiers know; the model has seen each training cell three times."""
    truth = cells.obs["cell_type"].astype(str).to_numpy()
    right = {
        name: (
            predict(load_model(folders / name, "celltype"), dataset, HOW, CPU)["predicted_cell_type"] == truth
        ).mean()
        for name in ("plain", "mixed")
    }
    assert right["mixed"] > 0.9 and right["mixed"] > right["plain"] + 0.1


def test_a_cell_does_not_depend_on_its_block(folders, cells, dataset, monkeypatch):
    saved = load_model(folders / "mixed", "celltype")
    _, whole = decode(saved, dataset, HOW, CPU, "test")
    monkeypatch.setattr(boxed, "BLOCK", 7)
    _, again = decode(saved, dataset, InferConfig(5, device="cpu"), CPU, "test")
    np.testing.assert_array_equal(whole["logits"], again["logits"])
    for row in (0, 17, 95):
        _, alone = decode(saved, take(dataset, np.array([row])), HOW, CPU, "test")
        np.testing.assert_array_equal(alone["logits"][0], whole["logits"][row])


def test_script_and_python_give_the_same(folders, query, tmp_path):
    out = tmp_path / "out.h5ad"
    run("predict_cell_type", data_path=query, model_path=folders / "mixed", out_path=out, device="cpu")
    written, found = ad.read_h5ad(out), annotate(ad.read_h5ad(query), folders / "mixed")
    for name in ("predicted_cell_type", "prediction_set", "confidence", "margin", "agreement"):
        np.testing.assert_array_equal(written.obs[name].to_numpy(), found.obs[name].to_numpy())
    pd.testing.assert_frame_equal(written.obsm["cell_type_probability"], found.obsm["cell_type_probability"])
    kept = load_model(folders / "mixed", "celltype").fitted["mixture"]
    assert written.uns["scmomer"]["mixture"] == kept
    assert lacks((folders / "mixed" / "README.md").read_text(), *(f"{weight:g}" for weight in kept.values())) == []


def test_a_finished_run_gets_a_mixture_without_training_again(flags, folders, tmp_path):
    for name in ("plain", "plain.training"):
        shutil.copytree(folders / name, tmp_path / name)
    run(
        "train_missing_celltype_func", **flags | {"ckpt_dir": tmp_path}, model="plain", mix_baselines="yes", resume=True
    )
    later, mixed = load_model(tmp_path / "plain", "celltype"), load_model(folders / "mixed", "celltype")
    assert later.fitted == mixed.fitted
    run("train_missing_celltype_func", **flags | {"ckpt_dir": tmp_path}, model="plain", resume=True)
    assert load_model(tmp_path / "plain", "celltype").fitted == load_model(folders / "plain", "celltype").fitted


def test_auto_mixes_where_validation_cells_say_that_it_helps(flags, folders, tmp_path, monkeypatch):
    """Here it helps; where more were asked for, the folder is that of the model alone."""
    for name in ("plain", "plain.training"):
        shutil.copytree(folders / name, tmp_path / name)
    again = flags | {"ckpt_dir": tmp_path, "model": "plain", "resume": True, "mix_baselines": "auto"}
    run("train_missing_celltype_func", **again)
    auto, mixed = load_model(tmp_path / "plain", "celltype"), load_model(folders / "mixed", "celltype")
    assert auto.fitted == mixed.fitted and auto.fitted["mixture_gain"] > mixture.LEAST_GAIN
    monkeypatch.setattr(mixture, "LEAST_GAIN", 1.1)
    run("train_missing_celltype_func", **again)
    alone = load_model(tmp_path / "plain", "celltype").fitted
    assert alone.pop("mixture_gain") == auto.fitted["mixture_gain"]
    assert alone == load_model(folders / "plain", "celltype").fitted


def test_across_batches_each_model_has_its_own_mixture(flags, folders):
    """The thresholds come from cells left out alone, so they differ only if the models without them are mixed, too."""
    run("train_missing_celltype_func", **flags, model="across", calibrate_across="donor")
    run("train_missing_celltype_func", **flags, model="across_mixed", calibrate_across="donor", mix_baselines="yes")
    names = ("mixed", "across", "across_mixed")
    mixed, alone, across = (load_model(folders / name, "celltype").fitted for name in names)
    assert across["mixture"] == mixed["mixture"] and "mixture" not in alone
    assert across["sets"]["n_cells"] == across["across"]["across"]["n_cells"] == 96
    assert across["sets"]["threshold"] != alone["sets"]["threshold"]
    assert across["mixture_gain"] != mixed["mixture_gain"] and "mixture_gain" not in alone


@pytest.mark.parametrize("above", [True, False])
def test_across_batches_the_cells_left_out_choose_the_mixture(above, flags, folders, monkeypatch):
    flags = flags | {"calibrate_across": "donor", "overwrite": True}
    run("train_missing_celltype_func", **flags, model="across", mix_baselines="no" if above else "yes")
    known = load_model(folders / "across", "celltype").fitted
    run("train_missing_celltype_func", **flags, model="across_mixed", mix_baselines="yes")
    other = load_model(folders / "across_mixed", "celltype").fitted
    monkeypatch.setattr("utils.predict.left_out.LEAST_GAIN", other["mixture_gain"] + (1e-9 if above else 0))
    run("train_missing_celltype_func", **flags, model="across_auto", mix_baselines="auto")
    found = load_model(folders / "across_auto", "celltype").fitted
    assert found == known | {"mixture_gain": other["mixture_gain"]}


def test_explanations_name_the_weight_of_the_model(folders, cells, dataset, tmp_path):
    saved = load_model(folders / "mixed", "celltype")
    codes, _ = encode_labels(cells, "cell_type")
    found = explain(saved, lambda rows: take(dataset, rows), codes, 2, HOW)
    assert f"{saved.fitted['mixture'][OURS]:g}" in found.lines[-1] and found.share == saved.fitted["mixture"][OURS]
    assert np.isfinite(found.table["attribution"]).all() and len(found.table)


@pytest.mark.parametrize("value", [-1.0, None, "gain"])
def test_a_damaged_mixture_is_refused(value, folders, query, tmp_path, capsys):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        config["fitted"]["mixture"][OURS] = value
        if value is None:
            del config["fitted"]["mixture"][OURS]
        if value == "gain":
            config["fitted"] |= {"mixture": {OURS: 1.0}, "mixture_gain": "much"}
        (folder / "config.json").write_text(json.dumps(config))

    forge(folders / "mixed", tmp_path / "model", damage)
    line = error_of(capsys, "predict_cell_type", data_path=query, model_path=tmp_path / "model")
    assert lacks(line, "config.json", "mixture") == []


def test_without_enough_validation_cells_the_model_stays_alone(cells, folders, tmp_path):
    from utils.predict.calibrate import calibrate

    shutil.copytree(folders / "mixed", tmp_path / "model")
    codes, _ = encode_labels(cells, "cell_type")
    few = np.zeros(len(codes), dtype=bool)
    few[cells.rows("val")[:9]] = True
    train, _ = train_and_val(cells, 0, keep=codes >= 0, targets={"cell_type": codes})
    _, val = train_and_val(
        cells, 0, keep=few | (cells.obs["split"] == "train").to_numpy(), targets={"cell_type": codes}
    )
    assert "mixture" not in calibrate(tmp_path / "model", "celltype", val, HOW, CPU, train, mix="yes")
