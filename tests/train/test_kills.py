"""Killed, stopped or moved to other processes, a run ends as if nothing had happened."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers import RNA, ROOT, assert_same_records, command_line, lacks, python, records, run
from tests.processes import STARTED, Processes, finish
from tests.train.kills import LONG, assert_same_run, kill_and_resume, model_folder, training_scripts, training_time
from utils.train.folders import is_there
from utils.train.guards import STOPPED
from utils.train.log import training_folder
from utils.train.state import saved_step

SCRIPTS = [
    "pretrain_rna",
    "pretrain_atac",
    "pretrain_multimodal",
    "pretrain_missing_mod",
    "train_missing_celltype_func",
]


TWO = pytest.param("pretrain_rna", 2, marks=pytest.mark.slow)


@pytest.mark.parametrize(("script", "size"), [*((script, 1) for script in SCRIPTS), TWO])
def test_killed_runs_end_like_an_uninterrupted_one(script, size, ready_file, runs, tmp_path):
    flags = training_scripts(ready_file, runs)[script]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    seconds = training_time(script, flags | {"ckpt_dir": tmp_path / "whole"}, size, tmp_path / "output.txt")
    longest = min(0.3, seconds / 4)  # so that both kills hit it on a fast machine, too
    hits = kill_and_resume(script, flags | {"ckpt_dir": tmp_path / "killed"}, size, kills=2, seed=0, longest=longest)
    assert hits == 2
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "whole" / "run")


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGTERM, 0.1), (signal.SIGUSR1, 0), (signal.SIGINT, 0.05)])
@pytest.mark.parametrize("size", [1, 2])
def test_a_scheduler_or_a_person_that_stops_a_run_loses_no_step(number, seconds, size, ready_file, runs, tmp_path):
    flags = training_scripts(ready_file, runs)["pretrain_rna"] | {"save_steps": 1000}
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    finish("pretrain_rna", flags | {"ckpt_dir": tmp_path / "whole"}, size, tmp_path / "output.txt")
    flags |= {"ckpt_dir": tmp_path / "stopped"}
    processes = Processes("pretrain_rna", flags, size, tmp_path / "output.txt").start()
    assert processes.wait_until(processes.started)
    time.sleep(seconds)
    processes.send(number)
    assert processes.join() == [STOPPED] * size
    state = json.loads((training_folder(model_folder(flags)) / "state" / "state.json").read_text())["progress"]
    text = (tmp_path / "output.txt").read_text()
    assert lacks(text, number.name, f"step {state['step']}", "--resume") == []
    assert "Traceback" not in text
    finish("pretrain_rna", flags | {"resume": True}, size, tmp_path / "output.txt")
    assert_same_run(tmp_path / "stopped" / "run", tmp_path / "whole" / "run")


SLOW = {"batch_size": 1, "grad_acc": 200, "save_steps": 1000}
"""Steps that take long enough to be interrupted twice."""


@pytest.mark.parametrize(("size", "pause", "code"), [(1, 0.2, 130), (2, 2.2, 130), (2, 0.2, STOPPED)])
def test_a_second_interrupt_ends_a_run_at_once(size, pause, code, ready_file, runs, tmp_path):
    """What reaches several processes twice, as one Ctrl-C does under a launcher, is one."""
    flags = training_scripts(ready_file, runs)["pretrain_rna"] | SLOW | {"ckpt_dir": tmp_path}
    flags |= {"grad_acc": 1000} if pause > 2 else {}
    processes = Processes("pretrain_rna", flags, size, tmp_path / "output.txt").start()
    assert processes.wait_until(processes.started)
    state = training_folder(model_folder(flags)) / "state"
    assert processes.wait_until(lambda: is_there(state))
    processes.send(signal.SIGINT)
    time.sleep(pause)
    processes.send(signal.SIGINT)
    assert processes.join() == [code] * size
    text = (tmp_path / "output.txt").read_text()
    assert "Traceback" not in text
    assert saved_step(state) == (0 if code == 130 else 1)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_interrupt_before_training_ends_a_script_without_a_traceback(tmp_path):
    main = "lambda: (os.kill(os.getpid(), 2), time.sleep(9))"
    code = f"import os, time; from utils.cli import run_script; run_script({main})"
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    done = python("-c", code, preexec_fn=restore)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.count("\n") <= 1
    assert "Traceback" not in done.stderr


def test_the_same_command_again_does_not_wipe_a_stopped_run(ready_file, runs, tmp_path):
    flags = training_scripts(ready_file, runs)["pretrain_rna"] | {"batch_size": 1, "ckpt_dir": tmp_path}
    folder, output = model_folder(flags), tmp_path / "output.txt"
    state = training_folder(folder) / "state"
    processes = Processes("pretrain_rna", flags, 1, output).start()
    assert processes.wait_until(lambda: is_there(state) and (saved_step(state) or 0) > 0)
    processes.send(signal.SIGTERM)
    assert processes.join() == [STOPPED]
    assert not folder.exists()
    step, before = saved_step(state), (state / "manifest.json").read_bytes()

    def refused(where: Path) -> None:
        assert Processes("pretrain_rna", flags, 1, output).start().join() == [2]
        text = output.read_text()
        assert lacks(text, f"step {step}", "--resume", "--overwrite", state) == []
        assert (where / "manifest.json").read_bytes() == before

    refused(state)
    torn = state.with_name(".state.previous")
    state.rename(torn)
    refused(torn)
    finish("pretrain_rna", flags | {"resume": True, "max_steps": step + 1}, 1, output)
    assert f"optimiser step {step}\n" in output.read_text()
    finish("pretrain_rna", flags | {"overwrite": True, "epochs": 1}, 1, output)
    assert "resuming" not in output.read_text()
    assert records(folder, "train")[0]["step"] == records(folder)[-1]["step"]  # of one epoch alone


def test_a_run_stopped_before_its_first_step_has_nothing_to_lose(ready_file, runs, tmp_path):
    flags = training_scripts(ready_file, runs)["pretrain_rna"] | SLOW | {"ckpt_dir": tmp_path}
    processes = Processes("pretrain_rna", flags, 1, tmp_path / "output.txt").start()
    assert processes.wait_until(lambda: is_there(training_folder(model_folder(flags)) / "state"))
    processes.send(signal.SIGKILL)
    assert processes.join() == [-signal.SIGKILL]
    assert saved_step(training_folder(model_folder(flags)) / "state") == 0
    finish("pretrain_rna", flags | {"epochs": 1, "grad_acc": 1}, 1, tmp_path / "output.txt")


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_another_number_of_processes_goes_on_with_the_same_losses(first, then, ready_file, tmp_path):
    flags = {"data_path": ready_file, "model_name": "run"} | RNA | LONG
    run("pretrain_rna", **flags | {"ckpt_dir": tmp_path / "whole"})
    flags |= {"ckpt_dir": tmp_path / "moved", "batch_size": flags["batch_size"] // first}
    finish("pretrain_rna", flags | {"max_steps": 14}, first, tmp_path / "output.txt")  # ten steps an epoch
    finish("pretrain_rna", flags | {"resume": True}, then, tmp_path / "output.txt")
    assert "8 cells per step" in (tmp_path / "output.txt").read_text()
    ours = [record for record in records(tmp_path / "moved" / "run") if record["step"] % 10 == 0]
    assert_same_records(ours, records(tmp_path / "whole" / "run"), rel=1e-5)


@pytest.mark.slow
def test_torchrun_starts_a_killed_worker_again(ready_file, runs, tmp_path):
    flags = training_scripts(ready_file, runs)["pretrain_rna"]
    (tmp_path / "whole").mkdir()
    finish("pretrain_rna", flags | {"ckpt_dir": tmp_path / "whole"}, 2, tmp_path / "output.txt")
    words = command_line(flags | {"ckpt_dir": tmp_path / "killed"})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen([*launcher, "pretrain_rna.py", *words], cwd=ROOT, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 90
        while STARTED not in (tmp_path / "log.txt").read_text():
            assert time.monotonic() < end and process.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.01)
        workers = [p for p in psutil.Process(process.pid).children() if "pretrain_rna.py" in " ".join(p.cmdline())]
        workers[1].kill()
        assert process.wait(timeout=90) == 0, (tmp_path / "log.txt").read_text()
    finally:
        process.kill()
    assert "resuming" in (tmp_path / "log.txt").read_text()
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "whole" / "run")
