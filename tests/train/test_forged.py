"""Model folders whose manifest fits and whose content does not: one sentence, before anything large is built."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fuzz import read_broken
from tests.helpers import lacks
from utils.errors import UserError
from utils.train.folders import MANIFEST, file_hash
from utils.train.model_folder import load_model

KIND = {"rna": "rna", "atac": "atac", "multimodal": "multimodal", "student_rna": "student", "celltype_atac": "celltype"}
MEMORY = 2**30


def sign(folder: Path) -> None:
    """Make the manifest fit what lies in the folder."""
    files = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({name: file_hash(folder / name) for name in files}))


def change_config(folder: Path, change: Callable[[dict], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder)


def change_weights(folder: Path, change: Callable[[dict], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    sign(folder)


@pytest.fixture
def model(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs["celltype_atac"], tmp_path / "model"))


# Sizes ---------------------------------------------------------------------------------------------------------------

SIZES = [
    *(("rna", name, 10**9) for name in ("depth", "dim", "heads", "dim_head", "n_features", "ff_mult")),
    ("rna", "depth", 10**6),
    ("rna", "n_features", 2**16),
    ("rna", "dim", 2**16),
    ("fusion", "latent_dim", 10**9),
    ("student", "student_hidden", 2**16),
    ("head", "classifier_hidden", 10**9),
]


@pytest.mark.parametrize(("part", "name", "size"), SIZES)
def test_a_size_that_the_weights_do_not_have(part, name, size, model, ready_file, tmp_path):
    change_config(model, lambda config: config["model"][part].update({name: size}))
    assert_refused(model, ready_file, tmp_path, "weights")


def test_ten_million_genes(model, ready_file, tmp_path):
    (model / "genes.txt").write_text("".join(f"G{i}\n" for i in range(10**7)))
    sign(model)
    assert_refused(model, ready_file, tmp_path, "10000000")


def test_a_million_labels(model, ready_file, tmp_path):
    change_config(model, lambda config: config.update(outputs=[f"type {i}" for i in range(10**6)]))
    assert_refused(model, ready_file, tmp_path, "1000000")


def assert_refused(model: Path, data: Path, tmp_path: Path, word: str) -> None:
    flags = {"data_path": data, "model_path": model, "device": "cpu", "out_path": tmp_path / "out.h5mu"}
    assert read_broken("predict_cell_type", flags, tmp_path / "output.txt", MEMORY) == ""
    text = (tmp_path / "output.txt").read_text()
    assert "Traceback" not in text
    (line,) = (line for line in text.splitlines() if "error: " in line)
    assert str(model) in line
    assert word in line


@pytest.mark.parametrize("run", KIND)
@pytest.mark.parametrize("by", [-1, 1])
def test_every_kind_of_folder_is_compared_with_its_weights(run, by, runs, tmp_path):
    folder = Path(shutil.copytree(runs[run], tmp_path / "model"))
    assert load_model(folder, KIND[run]).kind == KIND[run]
    part = "atac" if run == "atac" else "rna"
    change_config(folder, lambda config: config["model"][part].update(depth=config["model"][part]["depth"] + by))
    with pytest.raises(UserError) as error:
        load_model(folder, KIND[run])
    assert "depth 3" in str(error.value) if by > 0 else "blocks.1." in str(error.value)


def test_tensors_that_do_not_fit_are_named_with_both_shapes(model):
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(model / "model.safetensors").items()}
    hidden = shapes["head.layers.1.weight"][0]
    change_config(model, lambda config: config["model"]["head"].update(classifier_hidden=hidden + 1))
    with pytest.raises(UserError) as error:
        load_model(model, "celltype")
    text = str(error.value)
    assert lacks(text, "head.layers.1.weight", f"{hidden} × 16", f"{hidden + 1} × 16") == []
    assert len(text.replace(str(model), "")) < 300


def test_missing_and_extra_tensors_are_named(model):
    change_weights(model, lambda weights: weights.update(alien=weights.pop("fusion.linear.bias")))
    with pytest.raises(UserError, match=r"fusion\.linear\.bias.*alien"):
        load_model(model, "celltype")


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["fusion.linear.bias", "towers.rna.encoder.gene_embedding.weight"])
def test_weights_that_are_not_finite_are_named(value, name, model):
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(-1)[-1] = value

    change_weights(model, change)
    with pytest.raises(UserError, match=re.escape(f"model.safetensors: {name} ")):
        load_model(model, "celltype")


@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, "1", None, True, [1.0]], ids=str)
@pytest.mark.parametrize("name", ["temperature", "target_sum"])
def test_constants_that_make_no_sense_are_named(name, value, model):
    def change(config: dict) -> None:
        config["fitted" if name == "temperature" else "preprocessing"][name] = value

    change_config(model, change)
    with pytest.raises(UserError, match=rf"config\.json: {name} "):
        load_model(model, "celltype")


def test_the_folder_they_are_forged_from_is_a_good_one(model):
    change_config(model, lambda config: config["fitted"].update(temperature=np.pi))
    change_weights(model, lambda weights: weights["fusion.linear.bias"].zero_())
    assert load_model(model, "celltype").build().fusion.linear.bias.abs().sum() == 0
