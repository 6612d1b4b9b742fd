"""--batch_size auto: another cut of the same steps, within memory, the same after resuming."""

import numpy as np
import pytest
import torch

from tests.helpers import CPU, assert_same_records, assert_same_tensors, last_weights, make_stage, records, take, train
from utils.cells.minibatches import MicroBatch
from utils.errors import UserError
from utils.train import batch_size
from utils.train.batch_size import Step, free_memory, largest_fit, measure_steps
from utils.train.loop import TrainConfig

AUTO = None


def test_the_largest_minibatch_is_on_the_line_through_the_last_steps():
    steps = [Step(1, 1.0, 90.0), Step(2, 1.0, 100.0), Step(4, 1.0, 140.0)]
    assert largest_fit(steps, 140) == 4
    assert largest_fit(steps, 199) == 6  # 20 per cell
    assert largest_fit(steps, 200) == 7
    assert largest_fit(steps, 119) == 2
    assert largest_fit(steps[:1], 89) == 0
    assert largest_fit([], 1e9) == 0


@pytest.mark.alone
def test_measuring_changes_no_weight_and_stays_within_bounds(cells):
    stage = make_stage("rna", take(cells, 16, 4))
    before = {name: tensor.clone() for name, tensor in stage.objective.state_dict().items()}
    make = lambda n: stage.train[MicroBatch(np.resize(np.arange(16), n), np.ones(n, np.float32), 0, n)]
    steps = measure_steps(stage.objective, make, (1, 3), CPU.device)
    assert [step.cells for step in steps] == [1, 3]
    assert all(step.seconds > 0 for step in steps)
    assert steps[0].peak <= steps[-1].peak < free_memory(CPU.device)
    assert [step.cells for step in measure_steps(stage.objective, make, (1, 2, 4), CPU.device, memory=1)] == [1]
    assert_same_tensors(stage.objective.state_dict(), before)
    assert all(p.grad is None for p in stage.objective.parameters())


@pytest.mark.alone
def test_the_measured_peak_is_that_of_the_step(cells):
    """A tensor of 200 MB within the pass is seen; and is forgotten for the next measurement."""
    stage = make_stage("rna", take(cells, 8, 2))
    make = lambda n: stage.train[MicroBatch(np.arange(n), np.ones(n, np.float32), 0, n)]
    (plain,) = measure_steps(stage.objective, make, (1,), CPU.device)
    forward = stage.objective.forward

    def wasteful(batch):
        torch.ones(50_000_000).sum()
        return forward(batch)

    stage.objective.forward = wasteful
    (large,) = measure_steps(stage.objective, make, (1,), CPU.device)
    assert 150e6 < large.peak - plain.peak < 300e6
    stage.objective.forward = forward
    (again,) = measure_steps(stage.objective, make, (1,), CPU.device)
    assert again.peak < large.peak - 150e6


@pytest.mark.parametrize("kind", ["rna expressed", "celltype"])
def test_auto_is_another_cut_of_the_same_steps(kind, cells, tmp_path):
    cells = take(cells, 20, 8)
    train(make_stage(kind, cells), tmp_path / "auto", batch_size=AUTO, grad_acc=2)  # of 3 cells usually
    train(make_stage(kind, cells), tmp_path / "given", batch_size=6)
    assert_same_records(records(tmp_path / "auto"), records(tmp_path / "given"), rel=1e-5)


def test_a_resumed_run_keeps_the_cut(cells, tmp_path, monkeypatch):
    cells = take(cells, 20, 8)
    for name, first in (("whole", {}), ("resumed", {"max_steps": 3})):
        train(make_stage("rna", cells), tmp_path / name, batch_size=2, grad_acc=3, **first)
    monkeypatch.setattr(batch_size, "measure_steps", None)  # there is nothing to measure
    train(make_stage("rna", cells), tmp_path / "resumed", batch_size=AUTO, grad_acc=2, resume=True)
    assert_same_tensors(last_weights(tmp_path / "resumed"), last_weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("grad_acc", "fastest", "memory", "cut"), [(1, 3, 1e9, 3), (4, 12, 1e9, 12), (4, 4, 1e9, 4), (4, 12, 80, 6)]
)
def test_the_fastest_divisor_that_fits_is_taken(grad_acc, fastest, memory, cut, cells, monkeypatch):
    """Of 3 · grad_acc cells; a cell takes 10 bytes, and less time up to the fastest size."""
    steps = lambda objective, make, sizes, *_: [Step(n, n / min(n, fastest), 10.0 * n) for n in sizes]
    monkeypatch.setattr(batch_size, "measure_steps", steps)
    monkeypatch.setattr(batch_size, "free_memory", lambda device: memory)
    stage = make_stage("rna", take(cells, 20, 4))
    config = TrainConfig(batch_size=AUTO, grad_acc=grad_acc)
    chosen = batch_size.choose_batch_size(stage.objective, stage.train, config, CPU)
    assert (chosen.batch_size, chosen.batch_size * chosen.grad_acc) == (cut, 3 * grad_acc)


def test_nothing_fits(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_size, "free_memory", lambda device: 1.0)
    monkeypatch.setattr(batch_size, "weights_memory", lambda objective: 0)
    with pytest.raises(UserError, match="one cell"):
        train(make_stage("rna", take(cells, 8, 4)), tmp_path / "run", batch_size=AUTO)


def test_memory_of_weights_is_said_and_refused_before_the_run(cells, tmp_path, monkeypatch, capsys):
    """16 bytes for a trained number in float32 (itself, its gradient, two moments), 4 for a frozen one."""
    stage = make_stage("celltype", take(cells, 8, 4))
    trained, frozen = (
        sum(p.numel() for p in stage.objective.parameters() if p.requires_grad is grad) for grad in (True, False)
    )
    assert trained and frozen
    assert batch_size.weights_memory(stage.objective) == 16 * trained + 4 * frozen
    train(stage, tmp_path / "run", batch_size=4, epochs=1)
    assert f"{(16 * trained + 4 * frozen) / 1e6:,.0f} MB" in capsys.readouterr().out
    monkeypatch.setattr(batch_size, "free_memory", lambda device: 16 * trained)
    with pytest.raises(UserError, match=r"--dim.*--patch_maps shared"):
        train(make_stage("celltype", take(cells, 8, 4)), tmp_path / "other", batch_size=4, epochs=1)
    assert not list((tmp_path / "other").glob("*.safetensors"))


@pytest.mark.parametrize("value", [0, -3])
def test_no_such_minibatch(value):
    with pytest.raises(UserError, match=f"--batch_size {value} .*auto"):
        TrainConfig(batch_size=value)
