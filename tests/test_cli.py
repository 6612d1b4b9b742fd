"""Command lines and their errors: names that are none, full memory, lost processes."""

import sys

import pytest
import torch
from torch.distributed import DistBackendError

from tests.helpers import error_of, python
from utils import cli
from utils.cli import run_script
from utils.errors import UserError
from utils.files.write import whole_file

NAMES = [
    "",
    "../x",
    "/x",
    "a\\b",
    "two\nlines",
    ".hidden",
    "rna.training",
    "rna.partial",
    "rna.previous",
    "x" * 101,
]
SCRIPTS = {
    "pretrain_rna": ("data_path",),
    "pretrain_atac": ("data_path",),
    "pretrain_multimodal": ("data_path", "rna_model_path", "atac_model_path"),
    "pretrain_missing_mod": ("data_path", "model_path", "dir_train", "dir_val"),
    "train_missing_celltype_func": ("data_path", "pretrained_model_path"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_models_name_is_no_path_and_not_hidden(name, tmp_path, capsys):
    line = error_of(capsys, "pretrain_rna", data_path="cells.h5ad", ckpt_dir=tmp_path, model_name=name)
    assert "--model_name" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_training_script_checks_the_name(script, tmp_path, capsys):
    flags = dict.fromkeys(SCRIPTS[script], tmp_path / "absent")
    assert "--model" in error_of(capsys, script, **flags, ckpt_dir=tmp_path, model_name="../x")


def stopped_by(error: Exception, capsys) -> tuple[int, str]:
    """Exit code and message of a script whose main raises an error."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    return stopped.value.code, capsys.readouterr().err


MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: str(error)[:20])
@pytest.mark.parametrize("flags", [{"batch_size", "tokens"}, {"batch_size"}, {"val_fraction"}], ids=sorted)
def test_advice_for_full_memory_names_flags_that_the_script_has(error, flags, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_flags", flags)
    code, message = stopped_by(error, capsys)
    assert code == 2 and "out of memory" in message
    for flag in ("batch_size", "tokens"):
        assert (f"--{flag}" in message) == (flag in flags)


LOST = [
    DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error"),
    RuntimeError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"),
    RuntimeError("NCCL communicator was aborted on rank 1."),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: str(error)[:20])
def test_a_lost_process_is_a_line_and_no_traceback(error, capsys):
    code, message = stopped_by(error, capsys)
    assert code == 1 and "another process" in message and len(message.splitlines()) == 1


def test_other_errors_keep_their_traceback():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_script(main)


def test_hooks_for_errors_are_restored_after_a_full_disk(tmp_path):
    before = sys.excepthook, sys.unraisablehook
    with pytest.raises(UserError, match=r"x\.h5ad"), whole_file(tmp_path / "x.h5ad") as partial:
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert (sys.excepthook, sys.unraisablehook) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("end", "code"), [("None", 0), ("sys.exit(75)", 75), ("1 / 0", 1), ("fail()", 2)])
def test_one_of_several_processes_ends_with_its_code_and_no_clean_up(end, code):
    """What the interpreter would do at its end, here a thread that it would wait for, is left out."""
    script = (
        "import sys, threading, time\n"
        "from utils.cli import run_script\n"
        "from utils.errors import UserError\n"
        "def fail(): raise UserError('cells.h5ad: is empty')\n"
        f"def main(): threading.Thread(target=time.sleep, args=(60,)).start(); print('done'); {end}\n"
        "run_script(main)\n"
    )
    done = python("-c", f"import os\nos.environ['WORLD_SIZE'] = '2'\n{script}", timeout=30)
    assert (done.returncode, done.stdout) == (code, "done\n")
    assert ("Traceback" in done.stderr) == (code == 1)
