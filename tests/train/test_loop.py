"""The training loop: the numbers do not depend on how a run is cut into minibatches, processes or sittings."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers import (
    CPU,
    KINDS,
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
from utils.cells.minibatches import MicroBatch, Plan, make_loader
from utils.errors import UserError
from utils.train import loop as engine
from utils.train.folders import write_folder
from utils.train.log import training_folder
from utils.train.loop import TrainConfig, decayed_groups, evaluate
from utils.train.schedule import learning_rate


def assert_close_weights(ours, theirs, rel: float) -> None:
    """Relative to the size of each tensor of weights; a gradient of 0 is left out, since Adam blows up its rounding."""
    names = [name for name in ours if name.endswith("exp_avg")]
    assert names
    for name in names:
        assert (ours[name] - theirs[name]).norm() <= rel * theirs[name].norm() + 1e-7, name
    for name in [name for name in ours if name.startswith("objective.") and "to_qkv.bias" not in name]:
        assert (ours[name] - theirs[name]).norm() <= rel * theirs[name].norm() + 1e-7, name


# The same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_minibatch_times_accumulation(kind, cells, tmp_path):
    cells = take(cells, 21, 11)  # neither divides by 8
    for batch_size, grad_acc in ((8, 1), (4, 2), (2, 4)):
        train(make_stage(kind, cells), tmp_path / str(batch_size), batch_size=batch_size, grad_acc=grad_acc)
        assert_same_records(records(tmp_path / str(batch_size)), records(tmp_path / "8"), rel=1e-5)
        assert_close_weights(last_weights(tmp_path / str(batch_size)), last_weights(tmp_path / "8"), rel=1e-4)
    losses = [record["loss"] for record in records(tmp_path / "8", "train")]
    assert len(set(losses)) == 2  # something was trained


@pytest.mark.parametrize("kind", ["rna", "pairs", "celltype"])
def test_same_seed_same_run_other_seed_another(kind, cells, tmp_path):
    cells = take(cells, 16, 8)
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        train(make_stage(kind, cells, seed), tmp_path / name, seed=seed)
    assert_same_records(records(tmp_path / "first"), records(tmp_path / "again"))
    assert_same_tensors(last_weights(tmp_path / "first"), last_weights(tmp_path / "again"))
    assert records(tmp_path / "first")[0]["loss"] != records(tmp_path / "other")[0]["loss"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_train", [21, 8, 3])
def test_losses_are_means_over_cells(kind, n_train, cells, tmp_path):
    """Without learning, an epoch's loss is the mean over single cells, however they are cut up."""
    cells = take(cells, n_train, 5)
    stage = make_stage(kind, cells)
    train(stage, tmp_path / "run", learning_rate=0.0, batch_size=4, grad_acc=2, epochs=1)
    found = {record["phase"]: record["loss"] for record in records(tmp_path / "run")}
    for phase, dataset in (("train", stage.train), ("val", stage.val)):
        one = np.ones(1, np.float32)
        stage.objective.train(phase == "train")
        with torch.no_grad():
            losses = [stage.objective(dataset[MicroBatch(np.array([i]), one, 0, 1)])[0] for i in range(len(dataset))]
        assert len(losses) == {"train": n_train, "val": 5}[phase]
        assert found[phase] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


@pytest.mark.parametrize(("batch_size", "grad_acc"), [(8, 1), (5, 1), (2, 4), (1, 5)])
@pytest.mark.parametrize("clip_norm", [0.0, 1e-3])
def test_a_step_follows_the_mean_gradient_of_its_cells(batch_size, grad_acc, clip_norm, cells, tmp_path):
    """Five cells, one step: Adam's first moment is a tenth of the gradient, whatever fills up the minibatches."""
    cells = take(cells, 5, 1)
    stage = make_stage("rna", cells)
    batch = stage.train[MicroBatch(np.arange(5), np.ones(5, np.float32), 0, 5)]
    stage.objective(batch)[0].mean().backward()
    order = [p for group in decayed_groups(stage.objective, 0.0) for p in group["params"]]  # of the optimiser
    gradient = torch.cat([p.grad.flatten() for p in order])
    assert gradient.norm() > 0.01
    if clip_norm:
        gradient *= clip_norm / gradient.norm()
    cut = {"batch_size": batch_size, "grad_acc": grad_acc, "clip_norm": clip_norm}
    train(make_stage("rna", cells), tmp_path / "run", epochs=1, **cut)
    state = last_weights(tmp_path / "run")
    numbers = sorted((name for name in state if name.endswith("exp_avg")), key=lambda name: int(name.split(".")[1]))
    moment = torch.cat([state[name].flatten() for name in numbers])
    assert (moment - 0.1 * gradient).norm() < 1e-5 * moment.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32_and_is_not_it(kind, cells, tmp_path):
    for precision in ("fp32", "bf16"):
        train(make_stage(kind, take(cells, 24, 8)), tmp_path / precision, precision=precision)
    full, half = (records(tmp_path / precision) for precision in ("fp32", "bf16"))
    assert [r["loss"] for r in half] == pytest.approx([r["loss"] for r in full], rel=0.03)
    assert [r["loss"] for r in half] != [r["loss"] for r in full]
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_run_learns(kind, cells, tmp_path):
    stage = make_stage(kind, take(cells, 12, 4))
    train(stage, tmp_path / "run", epochs=15, learning_rate=0.02)
    losses = [record["loss"] for record in records(tmp_path / "run", "train")]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


# What is kept, and when it stops -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("patience", "epochs"), [(1, 2), (3, 4), (0, 8)])
def test_early_stopping(patience, epochs, cells, tmp_path):
    """Without learning only the first epoch is an improvement."""
    train(make_stage("rna", take(cells, 8, 8)), tmp_path / "run", epochs=8, patience=patience, learning_rate=0.0)
    assert [record["epoch"] for record in records(tmp_path / "run", "val")] == list(range(1, epochs + 1))


def test_the_best_weights_are_kept_not_the_last(cells, tmp_path):
    stage = make_stage("celltype", take(cells, 6, 19))
    best = train(stage, tmp_path / "run", epochs=16, learning_rate=0.03)
    losses = [record["loss"] for record in records(tmp_path / "run", "val")]
    assert np.argmin(losses) < 15  # it does get worse at last
    assert best["loss"] == min(losses)
    assert best["epoch"] == np.argmin(losses) + 1
    loader = list(make_loader(stage.val, Plan(stage.val.lengths, 8)))
    last = evaluate(stage.objective, loader, TrainConfig(), CPU)["loss"]
    assert last == pytest.approx(losses[-1], rel=1e-6)
    stage.objective.load_state_dict(weights(tmp_path / "run"))
    assert evaluate(stage.objective, loader, TrainConfig(), CPU)["loss"] == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize(
    "stop", [3, 4, 6]
)  # steps: within an epoch, at the end of one that is not looked at, at a look
def test_validation_every_few_epochs_changes_no_weight(stop, keep, cells, tmp_path):
    """Seven epochs of two steps, looked at after the third, the sixth and the last; interrupted, they end the same."""
    cells, settings = take(cells, 16, 4), {"epochs": 7, "keep": keep, "patience": 0, "save_steps": 1}
    train(make_stage("rna", cells), tmp_path / "each", **settings)
    train(make_stage("rna", cells), tmp_path / "third", **settings, val_every=3)
    assert [record["epoch"] for record in records(tmp_path / "third", "val")] == [3, 6, 7]
    assert_same_records(records(tmp_path / "third", "train"), records(tmp_path / "each", "train"))
    assert_same_tensors(last_weights(tmp_path / "third"), last_weights(tmp_path / "each"))
    train(make_stage("rna", cells), tmp_path / "cut", **settings, val_every=3, max_steps=stop)
    assert records(tmp_path / "cut", "val")[-1]["epoch"] == stop / 2
    train(make_stage("rna", cells), tmp_path / "cut", **settings, val_every=3, resume=True)
    assert_same_tensors(weights(tmp_path / "cut"), weights(tmp_path / "third"))
    assert_same_tensors(last_weights(tmp_path / "cut"), last_weights(tmp_path / "each"))


def test_without_a_look_a_save_that_is_due_comes_all_the_same(cells, tmp_path, monkeypatch):
    """Ten epochs of two steps and a look at the last: a save every four steps, and the first and last."""
    saved, write = [], engine.write_state
    monkeypatch.setattr(engine, "write_state", lambda *of: saved.append(of[4].step) or write(*of))
    train(make_stage("rna", take(cells, 16, 4)), tmp_path / "run", epochs=10, val_every=10, patience=0, save_steps=4)
    assert sorted(set(saved)) == [0, 4, 8, 12, 16, 20]


def test_a_state_from_before_a_setting_is_refused(cells, tmp_path):
    """Its moments may stand in another order."""
    train(make_stage("rna", take(cells, 16, 4)), tmp_path / "run", epochs=1)
    path = training_folder(tmp_path / "run") / "state"
    told = json.loads((path / "state.json").read_text())
    del told["identity"]["adam_epsilon"]

    def older(folder):
        (folder / "state.json").write_text(json.dumps(told))
        (folder / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes())

    write_folder(tmp_path / "older", older)
    path.rename(path.with_name("gone"))
    (tmp_path / "older").rename(path)
    with pytest.raises(UserError, match="--adam_epsilon"):
        train(make_stage("rna", take(cells, 16, 4)), tmp_path / "run", epochs=2, resume=True)


def test_the_last_weights_are_kept_when_asked_for(cells, tmp_path):
    stage = make_stage("celltype", take(cells, 6, 19))
    kept = train(stage, tmp_path / "run", epochs=16, learning_rate=0.03, keep="last")
    losses = [record["loss"] for record in records(tmp_path / "run", "val")]
    assert kept["epoch"] == 16 and kept["loss"] == losses[-1] > min(losses)
    assert_same_tensors(weights(tmp_path / "run"), stage.objective.state_dict())


@pytest.mark.parametrize("keep", ["last", "best"])
def test_the_curve_and_the_last_line_name_the_kept_epoch(keep, cells, tmp_path, monkeypatch, capsys):
    marked = []
    monkeypatch.setattr("utils.evaluate.plots.loss_curve", lambda *of: marked.append(of[2:]))
    stage = make_stage("celltype", take(cells, 6, 19))
    kept = train(stage, tmp_path / "run", epochs=16, learning_rate=0.03, keep=keep)
    assert (kept["epoch"] == 16) == (keep == "last")
    assert marked == [("run", "cross-entropy of cell types (nats)", kept["epoch"], keep)]
    first, forecast, *_, last = capsys.readouterr().out.splitlines()
    n_all = sum(p.numel() for p in stage.objective.parameters())
    n_trained = sum(p.numel() for p in stage.objective.parameters() if p.requires_grad)
    assert lacks(first, f"{n_all:,} parameters", f"{n_trained:,}") == [] and n_trained < n_all
    assert lacks(forecast, "16 epochs", "1 step", "8 cells") == []
    assert lacks(last, tmp_path / "run", f"epoch {kept['epoch']:.0f}", keep) == []


def test_a_run_that_ends_within_an_epoch_keeps_a_part_of_it(cells, tmp_path, capsys):
    kept = train(make_stage("rna", take(cells, 20, 8)), tmp_path / "run", max_steps=4)
    assert kept["epoch"] == pytest.approx(4 / 3)
    *_, last = capsys.readouterr().out.splitlines()
    assert lacks(last, "part of epoch 2", "best", "loss") == []


def test_without_validation_cells_the_training_loss_decides(cells, tmp_path):
    best = train(make_stage("celltype", take(cells, 12, 0)), tmp_path / "run", epochs=4)
    rows = records(tmp_path / "run")
    assert [(row["phase"], row["epoch"]) for row in rows] == [("train", float(e)) for e in (1, 2, 3, 4)]
    assert best["loss"] == min(row["loss"] for row in rows)
    assert weights(tmp_path / "run")


@pytest.mark.parametrize("kind", ["rna", "pairs", "celltype"])
@pytest.mark.parametrize("n_val", [0, 1])
def test_few_validation_cells(kind, n_val, cells, tmp_path):
    train(make_stage(kind, take(cells, 9, n_val)), tmp_path / "run", epochs=1)
    assert len(records(tmp_path / "run", "val")) == n_val


def test_what_a_run_leaves(cells, tmp_path):
    train(make_stage("rna", take(cells, 20, 8)), tmp_path / "run", epochs=3, warmup_epochs=2, cycle_epochs=4)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"model.safetensors", "manifest.json", "metrics.jsonl", "loss_curve.png", "tensorboard"}
    assert (tmp_path / "run" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert any(
        path.name.startswith("events") and path.stat().st_size for path in (tmp_path / "run" / "tensorboard").iterdir()
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["epoch"], row["step"]) for row in rows] == [
        (phase, float(epoch), 3 * epoch) for epoch in (1, 2, 3) for phase in ("train", "val")
    ]
    for row in rows:
        assert 0 <= row["accuracy"] <= 1
        assert all(math.isfinite(value) for name, value in row.items() if name != "phase")
    for row in rows[::2]:  # the rate of the epoch's last step
        assert row["learning_rate"] == pytest.approx(learning_rate(row["epoch"] - 1 / 3, 1e-3, 2, 4))
        assert row["cells_per_second"] == pytest.approx(20 / row["seconds"], rel=0.05)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_max_steps_is_exact(steps, cells, tmp_path):
    train(make_stage("rna", take(cells, 16, 4)), tmp_path / "run", epochs=10, max_steps=steps)
    assert records(tmp_path / "run")[-1]["step"] == steps
    assert records(tmp_path / "run")[-1]["epoch"] == steps / 2


def test_a_model_of_the_same_name_is_not_replaced_unasked(cells, tmp_path):
    cells = take(cells, 8, 4)
    train(make_stage("rna", cells), tmp_path / "run", epochs=1)
    before = weights(tmp_path / "run")
    with pytest.raises(UserError, match=r"run: .*--resume.*--overwrite"):
        train(make_stage("rna", cells, seed=1), tmp_path / "run", epochs=1, seed=1)
    assert_same_tensors(weights(tmp_path / "run"), before)
    train(make_stage("rna", cells, seed=1), tmp_path / "run", epochs=2, seed=1, overwrite=True)
    assert len(records(tmp_path / "run", "val")) == 2
    train(make_stage("rna", cells, seed=1), tmp_path / "alone", epochs=2, seed=1)
    assert_same_tensors(weights(tmp_path / "run"), weights(tmp_path / "alone"))


@pytest.mark.parametrize("seed", [42, 20260131, 2**32 - 1])
def test_any_seed_will_do(seed, cells, tmp_path):
    train(make_stage("celltype", take(cells, 8, 4), seed, 0.3), tmp_path / "run", seed=seed, epochs=1)
    assert math.isfinite(records(tmp_path / "run")[0]["loss"])


def test_labels_of_one_class_or_none_still_make_pairs(cells, tmp_path):
    cells = take(cells, 16, 8)
    for name, kinds in (("one", "T"), ("missing", None)):
        obs = cells.obs.assign(cell_type=kinds)
        train(make_stage("pairs", replace(cells, obs=obs)), tmp_path / name, epochs=1)
        row = records(tmp_path / name)[0]
        assert 0 < row["pair_accuracy"] < 1
        assert math.isfinite(row["loss"])
