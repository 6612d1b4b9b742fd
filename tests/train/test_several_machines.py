"""Two launchers, as on two machines, train one model."""

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT, assert_same_records, records, torchrun
from tests.processes import free_port

TRAINING = (
    *("--preset", "tiny", "--epochs", "2", "--batch_size", "4", "--grad_acc", "1", "--device", "cpu"),
    *("--dim", "16", "--dim_head", "8", "--model_name", "rna"),
)


@pytest.mark.slow
def test_two_launchers_give_the_losses_of_one(ready_file, tmp_path):
    flags = ("pretrain_rna.py", "--data_path", str(ready_file), *TRAINING)
    torchrun(2, *flags, "--ckpt_dir", str(tmp_path / "one"))

    meeting = ("--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *meeting]
    launchers = [
        subprocess.Popen(
            [*command, "--local_addr=127.0.0.1", *flags, "--ckpt_dir", str(tmp_path / "two")],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    output = [launcher.communicate(timeout=200)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], output
    assert len(records(tmp_path / "one" / "rna")) == 4
    assert_same_records(records(tmp_path / "two" / "rna"), records(tmp_path / "one" / "rna"))
