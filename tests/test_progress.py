"""Bars on a terminal, lines in a log; silent libraries; real child processes."""

import os
import pty
import re
import subprocess
import sys
import termios
import warnings

import pytest

from tests.helpers import ROOT, python
from utils.cli import quiet_libraries
from utils.progress import duration

# A long bar and a short one, with lines every 0.2 s instead of every 30.
BARS = """
import time
from utils import progress
progress.SECONDS = 0.2
with progress.progress_bar(2_000, "epoch 3/12", initial=1_000) as bar:
    for i in range(20):
        time.sleep(0.05)
        bar.set_postfix(loss="0.25", refresh=False)
        bar.update(50)
short = progress.progress_bar(10, "short")
short.update(10)
short.close()
progress.progress_bar(10, "not the first process", shown=False).update(10)
"""


@pytest.mark.alone
def test_a_log_gets_whole_lines_now_and_then(tmp_path):
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        subprocess.run([sys.executable, "-c", BARS], cwd=ROOT, stderr=file, check=True)
    text = log.read_text()
    assert "\r" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert 2 <= len(lines) <= 5  # in one second or a little more
    for line in lines:
        match = re.fullmatch(
            r"epoch 3/12: (1,\d{3}|2,000) of 2,000 cells, ([\d.]+|1e\+03) cells/s(, \d+ seconds? left)?, loss 0.25",
            line,
        )
        assert match, line
        assert 100 < float(match[2]) <= 1000  # of the thousand that are new, in a second at least
    assert "left" in lines[0]


@pytest.mark.alone
def test_a_terminal_gets_a_bar():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with subprocess.Popen([sys.executable, "-c", BARS], cwd=ROOT, stderr=theirs) as process:
        os.close(theirs)
        text = ""
        while True:
            try:
                part = os.read(ours, 65536).decode()
            except OSError:  # the other end is closed
                break
            text += part
            if not part:
                break
    os.close(ours)
    assert process.returncode == 0
    assert text.count("\r") > 3 and "epoch 3/12: 100%" in text and "short: 100%" in text
    assert "not the first process" not in text


@pytest.mark.slow
def test_a_quick_script_leaves_nothing_in_a_log(raw_file, tmp_path):
    """Two scripts in one new process, so that all is imported once."""
    ready = tmp_path / "ready.h5mu"
    first = {"data_path": str(raw_file), "out_path": str(ready), "val_fraction": 0.2}
    then = {"data_path": str(ready), "ckpt_dir": str(tmp_path), "preset": "tiny", "epochs": 2, "device": "cpu"}
    code = f"from tests.helpers import run; run('preprocess', **{first}); run('pretrain_atac', **{then}, model='atac')"
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "epoch" in done.stdout


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "1 second"),
        (1.4, "1 second"),
        (59, "59 seconds"),
        (89, "89 seconds"),
        (120, "2 minutes"),
        (150, "2.5 minutes"),
        (14.2 * 60, "14 minutes"),
        (89 * 60, "89 minutes"),
        (2.25 * 3600, "2.2 hours"),
        (20 * 3600, "20 hours"),
        (3 * 86_400, "3 days"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


LEAKS = [
    ("Some cells have zero counts", UserWarning, "legacy_api_wrap"),
    ("Initializing zero-element tensors is a no-op", UserWarning, "torch.nn.init"),
    ("Transforming to str index.", UserWarning, "utils.predict.output"),
    ("Trying to modify attribute `.obs` of view, initializing view as actual.", UserWarning, "utils.predict.output"),
    ("From 0.4 .update() will not pull", FutureWarning, "mudata._core.mudata"),
    ("anything", UserWarning, "anndata._core.anndata"),
    ("is deprecated", DeprecationWarning, "somewhere"),
]


def warn(message, category, module):
    warnings.warn_explicit(message, category, "file.py", 1, module=module)


def test_scripts_silence_what_nobody_can_act_on_and_nothing_else():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet_libraries():
            for leak in LEAKS:
                warn(*leak)
            assert [str(w.message) for w in seen] == []
            warn("CUDA initialization: the driver is too old", UserWarning, "torch.cuda")
        for leak in LEAKS:
            warn(*leak)
    shown = [str(w.message) for w in seen]
    assert shown == ["CUDA initialization: the driver is too old", *[leak[0] for leak in LEAKS]]


def test_a_user_may_ask_for_all_warnings():
    code = "import warnings; from utils.cli import run_script; run_script(lambda: warnings.warn('x', FutureWarning))"
    assert "FutureWarning" not in python("-c", code).stderr
    assert "FutureWarning" in python("-W", "default", "-c", code).stderr
    assert "FutureWarning" in python("-c", code, PYTHONWARNINGS="default").stderr
