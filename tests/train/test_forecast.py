"""The forecast that a run prints before it begins; and that measuring for it changes nothing."""

from pathlib import Path

import pytest
import torch

from tests.helpers import (
    CPU,
    assert_same_records,
    assert_same_tensors,
    last_weights,
    make_stage,
    records,
    take,
    train,
    weights,
)
from tests.processes import finish
from utils.cells.minibatches import Plan
from utils.cells.preprocessed import Cells, read_cells
from utils.train import forecast as module
from utils.train.config import TrainConfig
from utils.train.distributed import Runtime, distributed_run

KINDS = ("rna expressed", "pairs", "celltype")
PASSES = ("never", "always")


def measured_and_not(cells: Cells, folder: Path, runtime: Runtime) -> int:
    """Runs of each kind, with dropout, whole and interrupted, unmeasured and measured; how often that was."""
    measured, really = [], module.seconds_per_pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "seconds_per_pass", lambda *of: measured.append(of) or really(*of))
        for name, share in (("never", 0), ("always", 1)):
            patch.setattr(module, "SHARE", share)
            for kind in KINDS:
                for max_steps, resume in ((3, False), (0, True)):
                    stage = make_stage(kind, take(cells, 21, 6), dropout=0.3)
                    how = {"batch_size": 4, "grad_acc": 2, "max_steps": max_steps, "resume": resume}
                    train(stage, folder / name / kind, runtime, **how)
    return len(measured)


def work(ready_file: Path, folder: Path) -> None:
    """The part of one of several processes."""
    with distributed_run("cpu") as runtime:
        assert measured_and_not(read_cells(ready_file, ("rna", "atac")), folder, runtime) == 2 * len(KINDS)


def check(folder: Path) -> None:
    for kind in KINDS:
        never, always = (folder / name / kind for name in PASSES)
        assert_same_records(records(always), records(never))
        assert_same_tensors(last_weights(always), last_weights(never))
        assert_same_tensors(weights(always), weights(never))


def test_measuring_changes_no_bit(cells, tmp_path):
    torch.manual_seed(5)
    assert measured_and_not(cells, tmp_path, CPU) == 2 * len(KINDS)
    check(tmp_path)


def test_measuring_changes_no_bit_of_several_processes(ready_file, tmp_path):
    finish(work, {"ready_file": ready_file, "folder": tmp_path}, 2, tmp_path / "output.txt")
    check(tmp_path)


def test_measuring_leaves_random_numbers_and_gradients_alone(cells):
    stage = make_stage("celltype", take(cells, 20, 4), dropout=0.3)
    before = {name: tensor.clone() for name, tensor in stage.objective.state_dict().items()}
    state = torch.random.get_rng_state()
    forward = lambda batch: stage.objective(batch)
    assert module.seconds_per_pass(stage.objective, forward, stage.train, Plan(stage.train.lengths, 4, 2), 3) > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in stage.objective.parameters())
    assert_same_tensors(stage.objective.state_dict(), before)


@pytest.fixture
def words(cells, monkeypatch):
    """The forecast of a run of 21 training and 6 validation cells, a pass of which takes 2 s."""
    stage = make_stage("rna", take(cells, 21, 6))
    asked = []
    monkeypatch.setattr(module, "seconds_per_pass", lambda *of: asked.append(of[4]) or 2.0)

    def ask(steps_done: int = 0, grad_acc: int = 2, **config) -> tuple[str, list[int]]:
        asked.clear()
        plans = (Plan(cells.lengths, 4, grad_acc) for cells in (stage.train, stage.val))
        return module.forecast(stage.objective, None, stage.train, *plans, TrainConfig(**config), steps_done), [*asked]

    return ask


def test_a_forecast_counts_all_steps_and_their_time(words):
    # 3 steps of 8 cells in 2 passes, 6 s, and a validation of 2 passes at a third, 4/3 s: 16 s an epoch rounded
    text, asked = words(epochs=100, patience=10)
    assert text == "100 epochs × 3 steps of 8 cells: about 22 minutes, less if the loss stops falling (--patience)"
    assert asked == [3]
    assert words(epochs=100, patience=0)[0].endswith("about 22 minutes")
    assert words(epochs=100, patience=0, val_every=50)[0].endswith("about 20 minutes")
    text, _ = words(epochs=100, patience=0, steps_done=225)
    assert "of which 75 steps are left" in text and text.endswith("about 5.6 minutes")
    text, _ = words(epochs=100, patience=0, max_steps=150)
    assert "--max_steps" in text and text.endswith("about 11 minutes")


def test_measuring_takes_at_most_a_fiftieth_of_a_run(words):
    text, asked = words(epochs=8)  # 48 passes
    assert text == "8 epochs × 3 steps of 8 cells" and asked == []
    assert words(epochs=1)[0].startswith("1 epoch × ")
    assert words(epochs=9)[1] == [1] and words(epochs=17)[1] == [2] and words(epochs=1000)[1] == [3]
    assert words(epochs=1000, steps_done=2990)[1] == []
