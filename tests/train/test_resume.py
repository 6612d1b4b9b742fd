"""Resuming: an interrupted run ends as if it had not been, and only the same run is resumed."""

import json

import pytest
import torch

from models import objectives
from tests.helpers import (
    assert_same_records,
    assert_same_tensors,
    lacks,
    last_weights,
    make_stage,
    records,
    take,
    train,
    weights,
)
from utils.errors import UserError
from utils.train.log import training_folder


@pytest.mark.parametrize("kind", ["rna", "pairs", "student", "celltype"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(kind, cells, tmp_path):
    """Five steps an epoch: stopped in the middle of the first, and at the end of the second."""
    cells = take(cells, 37, 8)
    fresh = lambda: make_stage(kind, cells)
    settings = {"epochs": 3, "batch_size": 4, "grad_acc": 2}
    train(fresh(), tmp_path / "whole", **settings)
    for stop in (3, 10):
        cut = tmp_path / f"cut after step {stop}"
        train(fresh(), cut, **settings, max_steps=stop)
        assert records(cut)[-1]["step"] == stop
        train(fresh(), cut, **settings, resume=True)
        assert_same_tensors(last_weights(cut), last_weights(tmp_path / "whole"))
        ends = [record for record in records(cut, "val") if record["epoch"] == int(record["epoch"])]
        assert_same_records(ends, records(tmp_path / "whole", "val"))


@pytest.mark.parametrize("stop", [1, 8])
def test_the_training_loss_of_an_interrupted_epoch_is_that_of_all_its_cells(stop, cells, tmp_path):
    cells = take(cells, 37, 8)
    train(make_stage("rna", cells), tmp_path / "whole")
    train(make_stage("rna", cells), tmp_path / "cut", max_steps=stop)
    train(make_stage("rna", cells), tmp_path / "cut", resume=True)
    ends = [record for record in records(tmp_path / "cut", "train") if record["epoch"] == int(record["epoch"])]
    assert_same_records(ends, records(tmp_path / "whole", "train"), rel=1e-6)


@pytest.mark.parametrize("kind", ["rna", "celltype"])
def test_a_killed_run_ends_like_an_uninterrupted_one(kind, cells, tmp_path):
    """Killed in the middle of a step of the second epoch, with the state saved after every step."""
    cells = take(cells, 37, 8)
    fresh = lambda: make_stage(kind, cells)
    settings = {"epochs": 3, "save_steps": 1}
    train(fresh(), tmp_path / "whole", **settings)
    stage = fresh()
    before_step = stage.objective.before_step

    def killed(step: int) -> None:
        before_step(step)
        if step == 7:
            raise KeyboardInterrupt

    stage.objective.before_step = killed
    with pytest.raises(KeyboardInterrupt):
        train(stage, tmp_path / "cut", **settings)
    assert json.loads((training_folder(tmp_path / "cut") / "state" / "state.json").read_text())["progress"]["step"] == 7
    train(fresh(), tmp_path / "cut", **settings, resume=True)
    assert_same_tensors(last_weights(tmp_path / "cut"), last_weights(tmp_path / "whole"))
    assert_same_tensors(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert_same_records(records(tmp_path / "cut", "val"), records(tmp_path / "whole", "val"))


def test_resuming_crosses_a_redraw_of_the_random_features(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "FEATURE_REDRAW_STEPS", 4)
    cells = take(cells, 16, 4)
    initial = make_stage("rna", cells).objective.state_dict()
    train(make_stage("rna", cells), tmp_path / "whole", epochs=3)
    for stop in (4, 5):  # just before a redraw, and just behind it
        train(make_stage("rna", cells), tmp_path / "cut", epochs=3, max_steps=stop, overwrite=True)
        train(make_stage("rna", cells), tmp_path / "cut", epochs=3, resume=True)
        assert_same_tensors(last_weights(tmp_path / "cut"), last_weights(tmp_path / "whole"))
    for name, features in last_weights(tmp_path / "whole").items():
        if name.endswith(".features"):
            assert not torch.equal(features, initial[name.removeprefix("objective.")])


def test_a_finished_run_can_go_on(cells, tmp_path):
    cells = take(cells, 16, 8)
    settings = {"warmup_epochs": 1, "cycle_epochs": 2}
    train(make_stage("student", cells, dropout=0.3), tmp_path / "whole", epochs=4, **settings)
    train(make_stage("student", cells, dropout=0.3), tmp_path / "part", epochs=2, **settings)
    with open(training_folder(tmp_path / "part") / "metrics.jsonl", "a") as file:
        file.write('{"phase": "tr')  # what a kill or a full disk may leave
    train(make_stage("student", cells, dropout=0.3), tmp_path / "part", epochs=4, resume=True, **settings)
    assert_same_tensors(last_weights(tmp_path / "part"), last_weights(tmp_path / "whole"))
    assert_same_tensors(weights(tmp_path / "part"), weights(tmp_path / "whole"))
    assert_same_records(records(tmp_path / "part"), records(tmp_path / "whole"))


def test_an_interruption_does_not_use_up_patience(cells, tmp_path):
    """Without learning nothing gets better: epoch 1 is the best, and two more use up a patience of 2."""
    cells = take(cells, 24, 8)
    settings = {"epochs": 10, "patience": 2, "learning_rate": 0.0}
    train(make_stage("rna", cells), tmp_path / "whole", **settings)
    train(make_stage("rna", cells), tmp_path / "cut", **settings, max_steps=4)
    train(make_stage("rna", cells), tmp_path / "cut", **settings, resume=True)
    ends = [[r["epoch"] for r in records(tmp_path / name, "val")][-1] for name in ("whole", "cut")]
    assert ends == [3.0, 3.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 2e-3}, ("--learning_rate 0.001", "0.002")),
        ({"batch_size": 4}, ("--batch_size 8", "4")),
        ({"grad_acc": 2}, ("--grad_acc 1", "2")),
        ({"seed": 1}, ("--seed 0", "1")),
        ({"precision": "bf16"}, ("--precision fp32", "bf16")),
    ],
)
def test_resuming_with_other_settings_is_refused(change, words, cells, tmp_path):
    cells = take(cells, 8, 4)
    train(make_stage("rna", cells), tmp_path / "run", epochs=1)
    before = last_weights(tmp_path / "run")
    with pytest.raises(UserError) as error:
        train(make_stage("rna", cells), tmp_path / "run", **{"epochs": 2, "resume": True} | change)
    assert lacks(str(error.value), tmp_path / "run", *words) == []
    assert_same_tensors(last_weights(tmp_path / "run"), before)


def test_resuming_what_is_not_there_or_does_not_fit(cells, tmp_path):
    cells = take(cells, 8, 4)
    with pytest.raises(UserError, match=r"run\.training.*--resume"):
        train(make_stage("rna", cells), tmp_path / "run", resume=True)
    train(make_stage("rna", cells), tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match=r"run\.training.*model"):
        train(make_stage("atac", cells), tmp_path / "run", resume=True)
    state = training_folder(tmp_path / "run") / "state" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"state\.safetensors: "):
        train(make_stage("rna", cells), tmp_path / "run", resume=True)
