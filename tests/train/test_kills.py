"""Killed, stopped or moved to other processes, a run ends as if nothing had happened."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.helpers import RNA, ROOT, assert_same_records, command_line, records, run
from tests.train.kills import LONG, Processes, assert_same_run, finish, kill_and_resume, model_folder, training_scripts
from utils.train.guards import STOPPED
from utils.train.log import workshop

SCRIPTS = [
    "pretrain_rna",
    "pretrain_atac",
    "pretrain_multimodal",
    "pretrain_missing_mod",
    "train_missing_celltype_func",
]


@pytest.mark.parametrize(("script", "size"), [*((script, 1) for script in SCRIPTS), ("pretrain_rna", 2)])
def test_killed_runs_end_like_an_uninterrupted_one(script, size, ready_file, runs, tmp_path):
    flags = training_scripts(ready_file, runs)[script]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    finish(script, flags | {"ckpt_dir": tmp_path / "whole"}, size, tmp_path / "output.txt")
    hits = kill_and_resume(script, flags | {"ckpt_dir": tmp_path / "killed"}, size, kills=2, seed=0, longest=0.3)
    assert hits == 2
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "whole" / "run")


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGTERM, 0.1), (signal.SIGUSR1, 0)])
@pytest.mark.parametrize("size", [1, 2])
def test_a_scheduler_that_stops_a_run_loses_no_step(number, seconds, size, ready_file, runs, tmp_path):
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
    state = json.loads((workshop(model_folder(flags)) / "state" / "state.json").read_text())["progress"]
    text = (tmp_path / "output.txt").read_text()
    assert f"stopped by {number.name} after step {state['step']}; go on with --resume" in text
    assert "Traceback" not in text
    finish("pretrain_rna", flags | {"resume": True}, size, tmp_path / "output.txt")
    assert_same_run(tmp_path / "stopped" / "run", tmp_path / "whole" / "run")


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_another_number_of_processes_goes_on_with_the_same_losses(first, then, ready_file, tmp_path):
    flags = {"data_path": ready_file, "model_name": "run"} | RNA | LONG
    run("pretrain_rna", **flags | {"ckpt_dir": tmp_path / "whole"})
    flags |= {"ckpt_dir": tmp_path / "moved", "batch_size": flags["batch_size"] // first}
    finish("pretrain_rna", flags | {"max_steps": 14}, first, tmp_path / "output.txt")  # ten steps an epoch
    finish("pretrain_rna", flags | {"resume": True}, then, tmp_path / "output.txt")
    assert "8 cells per step, as before" in (tmp_path / "output.txt").read_text()
    ours = [record for record in records(tmp_path / "moved" / "run") if record["step"] % 10 == 0]
    assert_same_records(ours, records(tmp_path / "whole" / "run"), rel=1e-5)


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
        while "training and" not in (tmp_path / "log.txt").read_text():
            assert time.monotonic() < end and process.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.01)
        workers = [p for p in psutil.Process(process.pid).children() if "pretrain_rna.py" in " ".join(p.cmdline())]
        workers[1].kill()
        assert process.wait(timeout=90) == 0, (tmp_path / "log.txt").read_text()
    finally:
        process.kill()
    assert "resuming run at epoch" in (tmp_path / "log.txt").read_text()
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "whole" / "run")
