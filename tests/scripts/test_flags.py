"""The command lines: exactly the flags that are promised, each with help and default, and no other spelling."""

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.helpers import ROOT, call, command_line, lacks, python, squeeze
from utils.cli import SPIN

REQUIRED = "(required)"
OUTPUT = {"ckpt_dir": REQUIRED, "model_name": REQUIRED}
TRAINING = {
    "epochs": 100,
    "batch_size": None,
    "grad_acc": None,
    "learning_rate": 0.0001,
    "seed": 0,
    "precision": "fp32",
    "device": "auto",
    "patience": None,
    "max_steps": 0,
    "resume": False,
}
INTAKE = {"values": "auto", "species": "auto", "genome": None, "min_gene_coverage": 0.3, "min_count_coverage": 0.1}
SHAPE = {"depth": 6, "dim_head": 64}

# flag → its default; None stands for a default that is not fixed here, or for none at all.
FLAGS = {
    "preprocess": {
        "data_path": None,
        "rna_path": None,
        "atac_path": None,
        "out_path": None,
        "check": False,
        "json": False,
        "gene_reference": None,
        **INTAKE,
        "label_column": "cell_type",
        "split_by": None,
        "test_groups": None,
        "val_fraction": 0.1,
        "target_sum": "1e4",
        "shuffle_pairs": None,
    },
    "pretrain_rna": {"data_path": REQUIRED, **OUTPUT, **TRAINING, **SHAPE, "dim": 200, "heads": 10},
    "pretrain_atac": {"data_path": REQUIRED, **OUTPUT, **TRAINING, **SHAPE, "dim": 512, "heads": 8},
    "pretrain_multimodal": {
        "data_path": REQUIRED,
        "atac_model_path": None,
        "rna_model_path": None,
        "pair_labels": "none",
        "pairs_within": None,
        **OUTPUT,
        **TRAINING,
    },
    "get_latent_emb": {
        "data_path": REQUIRED,
        "model_path": REQUIRED,
        "what": "teacher",
        "without": None,
        "ckpt_dir": None,
        "out_path": None,
        **INTAKE,
    },
    "pretrain_missing_mod": {
        "data_path": REQUIRED,
        "model_path": REQUIRED,
        "dir_train": REQUIRED,
        "dir_val": REQUIRED,
        **OUTPUT,
        "missing": "atac",
        "teacher_weight": 1.0,
        "missing_weight": 1.0,
        **TRAINING,
    },
    "train_missing_celltype_func": {
        "data_path": REQUIRED,
        "pretrained_model_path": REQUIRED,
        "ckpt_dir": REQUIRED,
        "model": REQUIRED,
        "label_column": "cell_type",
        "mix_baselines": "no",
        **TRAINING,
        "patience": 5,
    },
    "import_published": {
        "checkpoint": REQUIRED,
        **OUTPUT,
        "gene_reference": None,
        "peak_reference": None,
        "gene2vec": None,
        "labels": None,
        "atac_heads": 8,
        "overwrite": False,
    },
    "export_published": {"model_path": REQUIRED, "out_path": REQUIRED},
    "predict_cell_type": {
        "data_path": None,
        "rna_path": None,
        "atac_path": None,
        "model_path": None,
        "ckpt_dir": None,
        "out_path": None,
        "prefix": None,
        **INTAKE,
    },
    "push_to_hub": {"model_path": REQUIRED, "repo": REQUIRED, "private": False, "license": None},
}
CELLS = {"data_path", "rna_path", "atac_path", "out_path", "genome"}
OPTIONAL = {
    "preprocess": {*CELLS, "gene_reference", "split_by", "test_groups", "shuffle_pairs"},
    "get_latent_emb": {"without", "ckpt_dir", "out_path", "genome"},
    "pretrain_rna": {"continue_from"},
    "pretrain_atac": {"continue_from"},
    "pretrain_multimodal": {"atac_model_path", "rna_model_path", "pairs_within"},
    "import_published": {"gene_reference", "peak_reference", "gene2vec", "labels"},
    "train_missing_celltype_func": {"pseudo_labels_from", "calibrate_across", "label_hierarchy"},
    "push_to_hub": {"license"},
    "predict_cell_type": {*CELLS, "model_path", "prefix", "sample_column", "label_column"},
}
CHOICES = [
    *[(script, "precision", ("fp32", "bf16")) for script in FLAGS if "precision" in FLAGS[script]],
    *[(script, "device", ("auto", "cpu", "cuda", "mps")) for script in FLAGS if "device" in FLAGS[script]],
    ("pretrain_missing_mod", "missing", ("atac", "rna")),
    ("get_latent_emb", "what", ("teacher", "cells", "genes")),
    *[(script, "values", ("auto", "counts", "log1p", "log2", "cpm")) for script in ("preprocess", "predict_cell_type")],
    *[(script, "species", ("auto", "human", "mouse", "other")) for script in ("preprocess", "predict_cell_type")],
]


@pytest.fixture
def help_of(monkeypatch, capsys):
    """script → the text of --help, and its flags with their help as one line each."""
    monkeypatch.setenv("COLUMNS", "400")

    def ask(script: str) -> tuple[str, dict[str, str]]:
        with pytest.raises(SystemExit) as stopped:
            call(script, "--help")
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        entries = re.split(r"\n  --", text.split("\noptions:\n")[1])[1:]
        return text, {re.match(r"\w+", entry)[0]: squeeze(entry) for entry in entries}

    return ask


def required(script: str) -> dict[str, str]:
    return {name: "x" for name, default in FLAGS[script].items() if default == REQUIRED}


@pytest.mark.parametrize("script", FLAGS)
def test_promised_flags_and_their_defaults(script, help_of):
    _, flags = help_of(script)
    assert FLAGS[script].keys() <= flags.keys()
    assert {name for name, line in flags.items() if line.endswith(REQUIRED)} == required(script).keys()
    for name, default in FLAGS[script].items():
        if default not in (None, REQUIRED):
            assert flags[name].endswith(f"(default: {default})"), flags[name]


@pytest.mark.parametrize("script", FLAGS)
def test_every_flag_has_help_and_says_what_happens_without_it(script, help_of):
    text, flags = help_of(script)
    free = OPTIONAL.get(script, set()) | {"gene_embedding_path"}
    for name, line in flags.items():
        assert name in free or re.search(r"\((required|default: [^)]+)\)$", line), line
        described = re.sub(
            r"^.*?(\]| [A-Z_0-9]+|\}) ", "", re.sub(r"\((required|default: [^)]+)\)$", "", line), count=1
        )
        assert len(re.findall(r"[a-z]{2,}", described)) >= 2, line
    assert f"python {script}.py --" in text  # the docstring shows how to call it


def refused(capsys, script: str, *words: str) -> str:
    """The last line on stderr of a command line that is refused with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(script, *words)
    assert stopped.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"{script}.py: error: ")
    return last


@pytest.mark.parametrize("script", FLAGS)
def test_an_abbreviated_flag_is_refused(script, capsys):
    """By every script, since argparse accepts abbreviations by default."""
    assert "--data_pat" in refused(capsys, script, *command_line(required(script)), "--data_pat", "x")


@pytest.mark.parametrize("words", [["--no_such_flag", "1"], ["stray"]], ids=["unknown", "no flag"])
def test_what_is_no_flag_is_refused(words, capsys):
    assert words[0] in refused(capsys, "pretrain_rna", *command_line(required("pretrain_rna")), *words)


def test_an_abbreviation_does_not_stand_for_a_required_flag(capsys):
    flags = required("pretrain_rna")
    flags["data_pat"] = flags.pop("data_path")
    assert "--data_path" in refused(capsys, "pretrain_rna", *command_line(flags))


@pytest.mark.parametrize("script", [script for script in FLAGS if required(script)])
def test_every_required_flag_is_asked_for(script, capsys):
    assert lacks(refused(capsys, script), *(f"--{name}" for name in required(script))) == []


@pytest.mark.parametrize(("script", "name", "choices"), CHOICES)
def test_choices(script, name, choices, help_of):
    assert f"{name} {{{','.join(choices)}}}" in help_of(script)[1][name]


def test_values_that_a_flag_cannot_take(capsys):
    """One of each kind: a choice, and a type."""
    for name, value in (("precision", "nonsense"), ("epochs", "many"), ("batch_size", "2.5"), ("resume", "perhaps")):
        line = refused(capsys, "pretrain_rna", *command_line(required("pretrain_rna")), f"--{name}", value)
        assert lacks(line, f"--{name}", value) == []


SCRIPTS = [*FLAGS, "evaluate", "demo"]
HEAVY = ("torch", "scanpy", "anndata", "mudata", "sklearn", "matplotlib", "pandas", "scipy", "h5py", "numba")
WORDS = {"--help": 0, "--no_such_flag": 2}
RUN_ALL = f"""
import os, runpy, sys
import transformers.hf_argparser, utils.cli  # all scripts need them: imported once

for script in {SCRIPTS}:
    for word, expected in {WORDS}.items():
        pid = os.fork()
        if not pid:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            sys.argv, code = [script + ".py", word], None
            try:
                runpy.run_path(script + ".py", run_name="__main__")
            except SystemExit as stopped:
                code = stopped.code or 0
            loaded = sorted({set(HEAVY)} & set(sys.modules))
            os.write(1, f"{{script}} {{word}}: {{code}} {{loaded}}\\n".encode())
            os._exit(0)
        os.waitpid(pid, 0)
"""


def test_help_and_mistaken_flags_wait_for_no_heavy_module():
    done = python("-c", RUN_ALL)
    assert done.returncode == 0, done.stderr
    expected = [f"{script} {word}: {code} []" for script in SCRIPTS for word, code in WORDS.items()]
    assert done.stdout.splitlines() == expected


def test_ctrl_c_during_imports_is_no_traceback():
    """The signal arrives when the script asks for torch."""
    code = (
        "import os, signal, sys\n"
        "from importlib.abc import MetaPathFinder\n"
        "class Interrupt(MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "import pretrain_rna\n"
        "from utils.cli import run_script\n"
        "sys.argv = ['pretrain_rna.py', '--data_path', 'x', '--ckpt_dir', 'y', '--model_name', 'z']\n"
        "run_script(pretrain_rna.main)\n"
    )
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, in a shell's background
    done = python("-c", code, preexec_fn=restore)
    assert done.returncode == 130
    assert done.stderr == ""


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def openmp_of(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A child process without our settings of OpenMP, but with the given ones."""
    env = {
        name: value for name, value in os.environ.items() if name not in (*WAITING, "NUMBA_NUM_THREADS")
    } | environment
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("own", [{}, *[{name: "7" if name != "OMP_WAIT_POLICY" else "PASSIVE"} for name in WAITING]])
def test_threads_spin_shortly_unless_the_user_has_chosen(own):
    code = f"import os, utils.cli; print(*[os.environ.get(name, '-') for name in {WAITING}])"
    expected = own or SPIN
    assert openmp_of(code, **own).stdout.split() == [expected.get(name, "-") for name in WAITING]


def test_a_limit_on_threads_holds_after_normalisation():
    """numba, which scanpy's normalisation calls, would set torch's threads to the number of cores."""
    code = """
import utils.cli, torch
from scipy.sparse import csr_matrix
from utils.features.normalise import log_normalise
log_normalise(csr_matrix([[1.0, 0.0], [2.0, 3.0]]), 1e4)
print(torch.get_num_threads())
"""
    assert openmp_of(code, OMP_NUM_THREADS="1").stdout.split() == ["1"]


@pytest.mark.slow
def test_openmp_takes_the_setting():
    """Torch's own OpenMP prints what it has read; the scripts load it after utils.cli."""
    ours = openmp_of("import utils.cli, torch", OMP_DISPLAY_ENV="VERBOSE").stderr
    if "GOMP_SPINCOUNT" not in ours:
        pytest.skip("torch does not use libgomp here")
    assert re.search(r"GOMP_SPINCOUNT = '20000'", ours)
    assert re.search(r"GOMP_SPINCOUNT = '300000'", openmp_of("import torch", OMP_DISPLAY_ENV="VERBOSE").stderr)
