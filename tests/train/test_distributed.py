"""Several real processes give the numbers of one, and a launcher changes nothing.

Most tests start their processes by `tests.processes`, since each process of a launcher imports everything again. For
the launcher's own tests, `torchrun -m tests.train.test_distributed <case> <ready file> <folder>` runs one of the cases.
"""

import math
import os
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from models.objectives import MaskedRNA
from tests.helpers import (
    CPU,
    KINDS,
    MULTIMODAL,
    RNA,
    assert_same_records,
    assert_same_tensors,
    command_line,
    last_weights,
    make_stage,
    python,
    records,
    run,
    take,
    torchrun,
    train,
    weights,
)
from tests.processes import Processes, finish
from utils.cells.minibatches import CellDataset
from utils.cells.preprocessed import Cells, read_cells
from utils.cli import run_script
from utils.errors import UserError
from utils.predict.infer import InferConfig, infer
from utils.train.distributed import Runtime, choose_device, distributed_run

# What the processes do ---------------------------------------------------------------------------------------------


def every_kind(cells: Cells, folder: Path, runtime: Runtime) -> None:
    """Each objective on cells that neither processes nor minibatches divide; rna once more, interrupted."""
    cells = take(cells, 21, 11)
    batch_size = 8 // runtime.world_size
    for kind in KINDS:
        train(make_stage(kind, cells), folder / kind, runtime, epochs=2, batch_size=batch_size)
    for more in ({"max_steps": 5}, {"resume": True}):
        train(make_stage("rna", cells), folder / "resumed", runtime, epochs=2, batch_size=batch_size, **more)


def few_cells(cells: Cells, folder: Path, runtime: Runtime) -> None:
    """Fewer cells than processes."""
    for kind in ("rna", "pairs"):
        train(make_stage(kind, take(cells, 1, 1)), folder / kind, runtime, batch_size=2 // runtime.world_size)


def lonely_rank(cells: Cells, folder: Path, runtime: Runtime) -> None:
    """No validation cell at all, and one process without a training cell."""
    train(make_stage("rna", take(cells, 1, 0)), folder / "rna", runtime, batch_size=2 // runtime.world_size)


def other_cells(cells: Cells, folder: Path, runtime: Runtime) -> None:
    """The processes do not read the same file."""
    train(make_stage("rna", take(cells, 9 + runtime.rank, 2)), folder / "rna", runtime)


class Failing(MaskedRNA):
    """Fails in the second process, in the third step."""

    how, steps = "", 0

    def forward(self, batch):
        self.steps += self.training
        if self.steps == 3 and int(os.environ["RANK"]) == 1:
            if self.how == "memory":
                torch.empty(10**15)
            raise {"mistake": UserError("cell X is odd; mend it"), "bug": ValueError("a bug")}[self.how]
        return super().forward(batch)


def failing(how: str):
    def case(cells: Cells, folder: Path, runtime: Runtime) -> None:
        stage = make_stage("rna", take(cells, 40, 4))
        stage.objective.__class__, stage.objective.how = Failing, how
        train(stage, folder / "rna", runtime, epochs=5)

    case.__name__ = f"fails_by_{how}"
    return case


class Skipping(MaskedRNA):
    """Has no finite loss in its second pass, in the last process alone."""

    passes = 0

    def forward(self, batch):
        loss, metrics = super().forward(batch)
        self.passes += self.training
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        is_bad = self.passes == 1 + (world_size > 1)  # several processes make one pass before the first step
        return (loss * math.inf if is_bad and int(os.environ.get("RANK", "0")) == world_size - 1 else loss), metrics


def bad_step_after_resuming(cells: Cells, folder: Path, runtime: Runtime) -> None:
    """Resumed in the middle of an epoch, the first step is left out, and the state is saved right after it."""
    settings = {"epochs": 1, "batch_size": 4 // runtime.world_size, "save_steps": 1}
    for objective, more in ((MaskedRNA, {"max_steps": 2}), (Skipping, {"max_steps": 3, "resume": True})):
        stage = make_stage("rna", take(cells, 20, 4))
        stage.objective.__class__ = objective
        train(stage, folder / "rna", runtime, **settings | more)


FAILURES = [failing(how) for how in ("mistake", "bug", "memory")]
OTHERS = [few_cells, lonely_rank, other_cells, bad_step_after_resuming]
CASES = {case.__name__: case for case in (every_kind, *OTHERS, *FAILURES)}


def in_turn(runtime: Runtime) -> None:
    """Each item is worked on once, all see all results in order, and an error of one is an error of all."""
    turns = list(runtime.in_turn(lambda item: (item, runtime.rank), range(5)))
    assert turns == [(item, item % runtime.world_size) for item in range(5)]

    def odd(item: int) -> int:
        if item == 3:
            raise UserError("cell 3 is odd; mend it")
        return item

    seen = []
    with pytest.raises(UserError, match="cell 3"):
        for item in runtime.in_turn(odd, range(9)):
            seen.append(item)
    assert seen == [0, 1, 2]


def main(case: str, ready_file: str, folder: str) -> None:
    with distributed_run("cpu") as runtime:
        size = runtime.world_size
        assert runtime.sum({"a": 1.0 + runtime.rank, "b": 10.0}) == {"a": size * (size + 1) / 2, "b": 10.0 * size}
        own = {"a": 1.0, f"only {runtime.rank}": 2.0} if runtime.is_main else {}  # a process may have nothing to add
        assert runtime.sum(own) == {"a": 1.0, "only 0": 2.0}
        assert runtime.gather([runtime.rank]) == [[rank] for rank in range(size)]
        in_turn(runtime)
        CASES[case](read_cells(ready_file, ("rna", "atac")), Path(folder), runtime)


# Tests -------------------------------------------------------------------------------------------------------------


def one_and_several(case: str, ready_file: Path, tmp_path: Path, size: int = 2) -> tuple[Path, Path]:
    """Folders of a case run by one process and by several."""
    several = {"case": case, "ready_file": ready_file, "folder": tmp_path / "several"}
    finish(main, several, size, tmp_path / "output.txt")
    CASES[case](read_cells(ready_file, ("rna", "atac")), tmp_path / "one", CPU)
    return tmp_path / "one", tmp_path / "several"


def test_one_process_takes_every_turn():
    in_turn(CPU)


@pytest.fixture(scope="module")
def one(cells, tmp_path_factory) -> Path:
    """Every kind of objective, trained by one process."""
    folder = tmp_path_factory.mktemp("one")
    every_kind(cells, folder, CPU)
    return folder


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_give_the_losses_of_one(size, one, ready_file, tmp_path):
    several = tmp_path / "several"
    flags = {"case": "every_kind", "ready_file": ready_file, "folder": several}
    finish(main, flags, size, tmp_path / "output.txt")
    for kind in KINDS:
        assert_same_records(records(several / kind), records(one / kind), rel=1e-5)
        assert_close_weights(last_weights(several / kind), last_weights(one / kind))
    assert_same_tensors(last_weights(several / "resumed"), last_weights(several / "rna"))
    assert_same_tensors(weights(several / "resumed"), weights(several / "rna"))


def assert_close_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name in [name for name in ours if name.startswith("objective.") and "to_qkv.bias" not in name]:
        assert (ours[name] - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-7, name


def test_fewer_cells_than_processes(ready_file, tmp_path):
    one, several = one_and_several("few_cells", ready_file, tmp_path)
    for kind in ("rna", "pairs"):
        assert_same_records(records(several / kind), records(one / kind), rel=1e-5)


def test_a_process_without_a_cell_and_no_validation_cells(ready_file, tmp_path):
    one, several = one_and_several("lonely_rank", ready_file, tmp_path)
    assert_same_records(records(several / "rna"), records(one / "rna"), rel=1e-5)


def test_a_bad_step_right_after_resuming_in_an_epoch(ready_file, tmp_path):
    one, several = one_and_several("bad_step_after_resuming", ready_file, tmp_path)
    assert records(one / "rna", "train")[-1]["skipped"] == 1
    assert_same_records(records(several / "rna"), records(one / "rna"), rel=1e-5)


def test_pretrain_rna_by_two_processes(ready_file, tmp_path):
    flags = {"data_path": ready_file, "ckpt_dir": tmp_path, "tokens": "expressed"} | RNA
    run("pretrain_rna", **flags, model_name="one")
    finish("pretrain_rna", flags | {"model_name": "two", "batch_size": 4}, 2, tmp_path / "output.txt")
    assert_same_records(records(tmp_path / "two"), records(tmp_path / "one"), rel=1e-5)
    assert weights(tmp_path / "two").keys() == weights(tmp_path / "one").keys()  # no `module.` in front


@pytest.mark.slow
def test_pretrain_multimodal_by_two_processes(ready_file, runs, tmp_path):
    flags = {"data_path": ready_file, "ckpt_dir": tmp_path} | MULTIMODAL
    flags |= {"rna_model_path": runs["rna"], "atac_model_path": runs["atac"]}
    run("pretrain_multimodal", **flags, model_name="one")
    finish("pretrain_multimodal", flags | {"model_name": "two", "batch_size": 4}, 2, tmp_path / "output.txt")
    assert_same_records(records(tmp_path / "two"), records(tmp_path / "one"), rel=1e-5)
    assert weights(tmp_path / "two").keys() == weights(tmp_path / "one").keys()


@pytest.mark.slow
def test_a_launcher_with_one_process_changes_nothing(ready_file, tmp_path):
    flags = {"data_path": ready_file, "ckpt_dir": tmp_path} | RNA
    run("pretrain_rna", **flags, model_name="plain")
    torchrun(1, "pretrain_rna.py", *command_line(flags | {"model_name": "launched"}))
    assert_same_records(records(tmp_path / "launched"), records(tmp_path / "plain"))
    assert_same_tensors(weights(tmp_path / "launched"), weights(tmp_path / "plain"))


# Results from several processes ------------------------------------------------------------------------------------


class Meeting:
    """Where threads that stand for processes exchange values."""

    def __init__(self, size: int):
        self.values, self.barrier = [None] * size, threading.Barrier(size, timeout=20)

    def gather(self, rank: int, value) -> list:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class ThreadRuntime(Runtime):
    """A process that is a thread."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def gather(self, value) -> list:
        return self.meeting.gather(self.rank, value)


def infer_by(world_size: int, stage, dataset: CellDataset, batch_size: int) -> list:
    """What each of `world_size` processes gets from `infer`; the error where there was one."""
    meeting, found = Meeting(world_size), [None] * world_size
    model = stage.objective.model

    def work(rank: int) -> None:
        runtime = ThreadRuntime(torch.device("cpu"), rank, world_size, meeting)
        try:
            found[rank] = infer(model, model, dataset, InferConfig(batch_size, "cpu"), runtime, "test")
        except Exception as error:
            meeting.barrier.abort()
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("n", "batch_size"), [(40, 4), (37, 64), (5, 1), (2, 2), (1, 4)])
def test_results_are_in_the_files_order(world_size, n, batch_size, cells):
    stage = make_stage("celltype", cells)
    values = {"rna": stage.train.values["rna"][:n]}
    dataset = CellDataset(values, cells.obs.index[:n])
    expected = [
        np.concatenate(parts)
        for parts in zip(*(infer_by(1, stage, single(dataset, i), 1)[0] for i in range(n)), strict=True)
    ]
    for result in infer_by(world_size, stage, dataset, batch_size):
        assert not isinstance(result, Exception), repr(result)
        for ours, theirs in zip(result, expected, strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_array_equal(ours, theirs)
    assert n == 1 or np.ptp(expected[0], axis=0).max() > 1e-3  # the cells do differ


def single(dataset: CellDataset, i: int) -> CellDataset:
    return CellDataset({"rna": dataset.values["rna"][i : i + 1]}, ["cell"])


# One process -------------------------------------------------------------------------------------------------------


def test_alone_nothing_is_exchanged():
    with distributed_run("cpu") as runtime:
        assert (runtime.rank, runtime.world_size, runtime.is_main) == (0, 1, True)
        assert runtime.sum({"a": 2.5}) == {"a": 2.5}
        assert runtime.gather("x") == ["x"]
        runtime.barrier()
        assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
def test_devices_without_a_gpu():
    assert choose_device("auto", 3) == choose_device("cpu") == torch.device("cpu")
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"--device {name}: "):
            choose_device(name)


def test_the_first_gpu_there_is_is_chosen(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == choose_device("mps").type == "mps"
    assert choose_device("auto", is_alone=False) == torch.device("cpu")
    with pytest.raises(UserError, match="--device mps: "):
        choose_device("mps", is_alone=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1, is_alone=False) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="process 2"):
        choose_device("auto", 2, is_alone=False)
    assert choose_device("cpu") == torch.device("cpu")


def test_only_the_main_process_speaks(capsys):
    for rank in (0, 1):
        Runtime(torch.device("cpu"), rank, 2).say(f"process {rank}")
    assert capsys.readouterr().out == "process 0\n"


FIRST_ERROR = {
    "fails_by_mistake": r"\[process 1\] main: error: cell X is odd",
    "fails_by_bug": "ValueError: a bug",
    "fails_by_memory": r"\[process 1\] main: error: out of memory",
    "other_cells": r"main: error: processes .*training cells",  # both processes see it
}


@pytest.mark.parametrize("case", FIRST_ERROR)
def test_one_process_that_fails_ends_all_and_is_heard_first(case, ready_file, tmp_path):
    flags = {"case": case, "ready_file": ready_file, "folder": tmp_path}
    processes = Processes(main, flags, 2, tmp_path / "output.txt").start()
    assert all(processes.join(seconds=60))
    assert_heard_first((tmp_path / "output.txt").read_text(), FIRST_ERROR[case], case)


@pytest.mark.slow
def test_a_launcher_shows_the_message_of_the_process_that_failed(ready_file, tmp_path):
    start = time.monotonic()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    case = ("-m", "tests.train.test_distributed", "fails_by_mistake", str(ready_file), str(tmp_path))
    done = python(*launcher, *case)
    assert time.monotonic() - start < 90  # of which starting takes the most
    assert done.returncode != 0
    assert_heard_first(done.stderr, r"\[process 1\] test_distributed.py: error: cell X is odd")


def assert_heard_first(text: str, message: str, case: str = "") -> None:
    """The first error is the expected one, and other processes only report that one of them has failed."""
    first, *rest = [line for line in text.splitlines() if re.search(r"error: |Error: ", line)]
    assert re.search(message, first), text
    if case != "other_cells":
        others = [line for line in rest if re.search(r"(main|test_distributed\.py): error: ", line)]
        assert all("another process" in line for line in others), text


if __name__ == "__main__":
    run_script(lambda: main(*sys.argv[1:]))
