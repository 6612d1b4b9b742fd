"""One writer per model folder, and readers that do not mind it."""

import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import pytest
import torch

from tests.helpers import CPU, RNA, error_of, make_stage, take, train
from tests.processes import Processes, finish
from tests.train.kills import assert_same_run, model_folder, training_scripts
from utils.errors import UserError
from utils.predict.calibrate import calibrate
from utils.train.config import InferConfig
from utils.train.folders import write_folder
from utils.train.lock import _start_of, _this_process, lock_file, sole_writer
from utils.train.model_folder import load_model


@pytest.mark.parametrize("size", [1, 2])
def test_a_second_run_on_the_same_folder_is_refused(size, ready_file, runs, tmp_path):
    flags = training_scripts(ready_file, runs)["pretrain_rna"] | {"epochs": 30, "overwrite": True}
    for name in ("whole", "both"):
        (tmp_path / name).mkdir()
    finish("pretrain_rna", flags | {"ckpt_dir": tmp_path / "whole"}, 1, tmp_path / "output.txt")
    flags |= {"ckpt_dir": tmp_path / "both"}
    first = Processes("pretrain_rna", flags, 1, tmp_path / "first.txt").start()
    assert first.wait_until(first.started)
    second = Processes("pretrain_rna", flags, size, tmp_path / "second.txt").start()
    assert second.join() == [2] * size
    text = (tmp_path / "second.txt").read_text()
    assert f"process {first.pids[0]} on {os.uname().nodename}" in text
    assert str(lock_file(model_folder(flags))) in text
    assert "Traceback" not in text
    assert first.join() == [0]
    assert_same_run(tmp_path / "both" / "run", tmp_path / "whole" / "run")
    assert sorted(os.listdir(tmp_path / "both")) == ["run", "run.training"]


def test_the_lock_of_a_killed_run_is_taken_over(ready_file, runs, tmp_path):
    flags = training_scripts(ready_file, runs)["pretrain_rna"] | {"ckpt_dir": tmp_path}
    run = Processes("pretrain_rna", flags, 1, tmp_path / "output.txt").start()
    assert run.wait_until(run.started)
    run.send(signal.SIGKILL)
    assert run.join() == [-signal.SIGKILL]
    assert json.loads(lock_file(model_folder(flags)).read_text())["process"] == run.pids[0]
    finish("pretrain_rna", flags | {"overwrite": True}, 1, tmp_path / "output.txt")
    assert not lock_file(model_folder(flags)).exists()


def test_a_lock_from_another_machine_is_not_taken_over(ready_file, tmp_path, capsys):
    flags = {"data_path": ready_file, "ckpt_dir": tmp_path, "model_name": "run"} | RNA
    lock = lock_file(tmp_path / "run")
    lock.write_text(json.dumps(_this_process() | {"machine": "elsewhere", "boot": "another", "process": 12}))
    line = error_of(capsys, "pretrain_rna", **flags)
    assert all(word in line for word in ("process 12 on elsewhere", f"delete {lock}"))
    assert os.listdir(tmp_path) == [lock.name]


@pytest.fixture(params=["with locks", "without locks"])
def file_system(request, monkeypatch):
    """Where the system locks files, and where it does not: there the process's number and start decide."""
    if request.param == "without locks":

        def flock(*_):
            raise OSError(errno.ENOTSUP, "not supported")

        monkeypatch.setattr(fcntl, "flock", flock)


def written(folder, **changes) -> None:
    lock_file(folder).write_text(json.dumps(_this_process() | changes))


@pytest.mark.usefixtures("file_system")
@pytest.mark.parametrize("case", ["ended", "number used again", "restarted machine", "nobody", "half written"])
def test_stale_locks_are_taken_over(case, tmp_path):
    process = subprocess.Popen(["sleep", "60"])
    other = {"process": process.pid, "process_started": _start_of(process.pid)}
    try:
        if case == "ended":
            process.kill()
            process.wait()
        elif case == "number used again":
            other["process_started"] = "1"
        elif case == "restarted machine":
            other["boot"] = "the one before"
        written(tmp_path / "run", **other)
        if case in ("nobody", "half written"):
            lock_file(tmp_path / "run").write_text("" if case == "nobody" else '{"machine": "x", "pro')
        with sole_writer(tmp_path / "run", CPU):
            assert json.loads(lock_file(tmp_path / "run").read_text())["process"] == os.getpid()
        assert os.listdir(tmp_path) == []
    finally:
        process.kill()
        process.wait()


def test_without_locks_a_living_process_is_respected(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    process = subprocess.Popen(["sleep", "60"])
    try:
        written(tmp_path / "run", process=process.pid, process_started=_start_of(process.pid))
        with pytest.raises(UserError, match=f"process {process.pid} on "), sole_writer(tmp_path / "run", CPU):
            pass
        assert lock_file(tmp_path / "run").exists()
    finally:
        process.kill()
        process.wait()


def test_all_that_writes_a_model_takes_the_lock(cells, runs, tmp_path):
    folder = shutil.copytree(runs["celltype_atac"], tmp_path / "run")
    before = (folder / "manifest.json").read_bytes()
    stage = make_stage("celltype", take(cells, 8, 8))
    with sole_writer(folder, CPU):
        with pytest.raises(UserError, match=re.escape(str(folder))):
            train(stage, folder, overwrite=True)
        with pytest.raises(UserError, match=re.escape(str(folder))):
            calibrate(folder, "celltype", stage.val, InferConfig(device="cpu"), CPU)
    assert (folder / "manifest.json").read_bytes() == before
    calibrate(folder, "celltype", stage.val, InferConfig(device="cpu"), CPU)
    assert (folder / "manifest.json").read_bytes() != before


def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    with sole_writer(tmp_path / "run", CPU):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        with sole_writer(tmp_path / "run", CPU):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_writer_puts_the_previous_folder_back(runs, tmp_path):
    previous = shutil.copytree(runs["rna"], tmp_path / ".rna.previous")
    assert load_model(tmp_path / "rna", "rna").hash == load_model(runs["rna"], "rna").hash
    assert previous.exists()  # a reader leaves it where it is
    with sole_writer(tmp_path / "rna", CPU):
        assert os.listdir(tmp_path / "rna") != []
    assert os.listdir(tmp_path) == ["rna"]


def test_a_reader_beside_a_writer_gets_the_old_folder_or_the_new_one(runs, tmp_path):
    """Each version has one temperature, and one value in all of its weights."""
    saved, folder = load_model(runs["celltype_atac"], "celltype"), tmp_path / "run"

    def write(version: float) -> None:
        state = {name: torch.full_like(tensor, version) for name, tensor in saved.state.items()}
        write_folder(folder, replace(saved, fitted={"temperature": version}, state=state).write)

    write(1.0)
    writer = os.fork()
    if not writer:
        rng = random.Random(0)
        while True:
            for version in (2.0, 1.0):
                write(version)
                time.sleep(rng.uniform(0, 0.1))
    try:
        versions = []
        for _ in range(150):
            found = load_model(folder, "celltype")
            values = {float(value) for tensor in found.state.values() for value in tensor.unique()}
            assert values == {found.fitted["temperature"]}
            versions.append(found.fitted["temperature"])
        assert len({*versions}) == 2
        assert os.waitpid(writer, os.WNOHANG) == (0, 0)  # no reader has put anything in its way
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
