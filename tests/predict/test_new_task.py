"""A task of one's own: a number in obs is learned, saved, loaded and predicted, and only this file knows of it.

This is the worked example of `docs/add_a_task.md`. Head, task and training script stand in the order in which one
writes them.
"""

from dataclasses import dataclass
from typing import ClassVar

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from models.heads import Head
from models.objectives import FineTuning
from models.shapes import ScMomerConfig
from tests.helpers import TRAINING
from utils.cells.minibatches import train_and_val
from utils.errors import UserError
from utils.predict.calibrate import calibrate
from utils.predict.infer import embed_sample
from utils.predict.label import label_cells
from utils.train.config import TrainConfig
from utils.train.fine_tune import parts_for_head, with_head
from utils.train.model_folder import load_model
from utils.train.stage import training_stage
from utils.train.tasks import TASKS, TRAINED, Task, check_positive, register

# The head: from embeddings to outputs, loss and predictions -----------------------------------------------------------


@dataclass(frozen=True)
class NumberConfig:
    """Shape of the head for a number."""

    number_hidden: int = 8


class NumberHead(Head):
    """One output: the number, in units of the training cells' standard deviation."""

    loss_name = "squared error"

    def __init__(self, config: NumberConfig, latent_dim: int, n_outputs: int):
        super().__init__(latent_dim, n_outputs, config.number_hidden, dropout=0.0)

    def loss(self, outputs, target):
        error = F.mse_loss(outputs[:, 0], target["number"], reduction="none")
        return error, {"absolute_error": error.sqrt()}

    def decode(self, outputs):
        return {"number": outputs[:, 0]}


# The task: what its numbers mean --------------------------------------------------------------------------------------


class Number(Task):
    """A number in obs, such as the age of the donor."""

    name = "number"
    title = "a model of a number (tests/predict/test_new_task.py)"
    shape = NumberConfig
    head = NumberHead
    columns: ClassVar[dict[str, object]] = {"predicted_number": np.nan, "typical_error": np.nan}

    def targets(self, cells, column):
        if column not in cells.obs:
            raise UserError(f"{cells.path}: no column {column!r} in obs; name the numbers with --column")
        values = cells.obs[column].to_numpy(dtype=np.float32)
        return {"number": values}, np.isfinite(values), [column]

    def fit_after_training(self, decoded, targets, outputs):
        error = decoded["number"] - targets["number"]
        return {"typical_error": float(np.sqrt(np.mean(np.square(error))))}

    def check(self, fitted):
        check_positive("typical_error", fitted.get("typical_error", 1.0))

    def describe(self, fitted):
        return f"typical error {fitted['typical_error']:.3f}" if fitted else ""

    def predict(self, decoded, outputs, fitted):
        number = decoded["number"]
        return {"predicted_number": number, "typical_error": np.full_like(number, fitted["typical_error"])}

    def scores(self, truth, predicted):
        return {"rmse": float(np.sqrt(np.mean(np.square(truth - predicted))))}


# The script: data, model, objective, fit ------------------------------------------------------------------------------


@dataclass
class Flags:
    data_path: str
    ckpt_dir: str
    pretrained_model_path: str
    model_name: str = "number"
    column: str = "number"


def train_number(flags: Flags, config: TrainConfig) -> None:
    with training_stage("number", flags, config) as stage:
        parent = stage.start_from("pretrained", flags.pretrained_model_path, "student")
        parts, options = parts_for_head(parent, "student", "atac")
        cells = stage.read(*ScMomerConfig(**parts, **options).inputs)
        stage.check_fits(parent, cells)
        targets, known, outputs = TASKS["number"].targets(cells, flags.column)
        train, val = train_and_val(cells, config.seed, keep=known, targets=targets)

        torch.manual_seed(config.seed)
        shape = NumberConfig()
        model = with_head(parent, parts, options, TASKS["number"].make_head(shape, outputs))
        if stage.starts_anew:
            model.head.standardise(embed_sample(model, train, stage.infer_config, stage.runtime, config.seed))
        stage.fit(
            FineTuning(model, trainable_blocks=0, train_student=True),
            train,
            val,
            parts | {"head": shape},
            like=parent,
            saves=model,
            options=options,
            outputs=outputs,
        )
        calibrate(stage.folder, "number", val, stage.infer_config, stage.runtime)


# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task():
    """Known only while this module's tests run."""
    yield register(Number())
    del TASKS["number"], TRAINED["number"]


@pytest.fixture(scope="module")
def numbered(ready_file, tmp_path_factory):
    """The model-ready RNA of the shared cells, with a number that its expression determines; two cells have none."""
    import mudata

    cells = mudata.read_h5mu(ready_file)
    rna = cells.mod["rna"]
    number = (cells.obs["cell_type"] == cells.obs["cell_type"].iloc[0]).to_numpy(dtype=np.float64)
    number = (number - number.mean()) / number.std()
    out = ad.AnnData(rna.X, obs=cells.obs.assign(number=number), var=rna.var, layers=dict(rna.layers))
    out.uns["scmomer"] = cells.uns["scmomer"]
    out.obs.loc[out.obs_names[:2], "number"] = np.nan
    path = tmp_path_factory.mktemp("number") / "cells.ready.h5ad"
    out.write(path)
    return path


@pytest.fixture(scope="module")
def folder(task, numbered, runs, tmp_path_factory):
    where = tmp_path_factory.mktemp("models")
    flags = Flags(str(numbered), str(where), str(runs["student_atac"]))
    train_number(flags, TrainConfig(**TRAINING | {"epochs": 14, "learning_rate": 0.003, "patience": 0}))
    return where / "number"


def test_the_folder_says_what_it_predicts(folder):
    saved = load_model(folder, "number")
    assert saved.outputs == ["number"]
    assert set(saved.fitted) == {"typical_error"}
    assert saved.build().head.layers[-1].weight.shape == (1, 8)
    assert "typical error" in (folder / "README.md").read_text()


def test_new_cells_get_the_number(folder, task, numbered, tmp_path):
    """Clearly better than the training cells' mean, in a file with the same cells in the same order."""
    cells = label_cells(numbered, folder)
    before = ad.read_h5ad(numbered)
    assert list(cells.obs_names) == list(before.obs_names)
    val = (before.obs["split"] == "val").to_numpy() & before.obs["number"].notna().to_numpy()
    truth = before.obs["number"].to_numpy()
    error = task.scores(truth[val], cells.obs["predicted_number"].to_numpy()[val])["rmse"]
    at_mean = task.scores(truth[val], np.full(val.sum(), np.nanmean(truth[~val])))["rmse"]
    assert error < 0.7 * at_mean
    assert error == pytest.approx(load_model(folder, "number").fitted["typical_error"], rel=1e-4)
    assert cells.obsm["X_scmomer"].shape == (len(before), 16)
    assert cells.uns["scmomer"]["model"] == "number"
    assert cells.uns["scmomer"]["typical_error"] == pytest.approx(error, rel=1e-4)
    cells.write(tmp_path / "out.h5ad")
    pd.testing.assert_series_equal(
        ad.read_h5ad(tmp_path / "out.h5ad").obs["predicted_number"], cells.obs["predicted_number"]
    )


def test_a_cell_type_script_refuses_the_folder(folder):
    with pytest.raises(UserError, match="number"):
        load_model(folder, "celltype")
