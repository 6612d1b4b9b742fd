"""What the tests of the data path, the engine and the scripts share: tiny shapes, and ways to run things."""

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.atac_encoder import ATACEncoder, ATACEncoderConfig
from models.objectives import Denoising, Distillation, FineTuning, JointPairs, MaskedATAC, MaskedRNA, Objective
from models.rna_encoder import RNAEncoder, RNAEncoderConfig
from models.scmomer import ScMomer, ScMomerConfig
from models.shapes import ClassifierConfig, FusionConfig
from models.student import StudentConfig
from utils.cells.labels import encode_labels
from utils.cells.minibatches import CellDataset, train_and_val
from utils.cells.preprocessed import Cells
from utils.cli import run_script
from utils.train.cell_types import CELL_TYPES
from utils.train.distributed import Runtime
from utils.train.log import METRICS, training_folder
from utils.train.loop import TrainConfig, fit

ROOT = Path(__file__).resolve().parents[1]
CPU = Runtime(torch.device("cpu"))

# Scripts ---------------------------------------------------------------------------------------------------------

TRAINING = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "warmup_epochs": 1, "device": "cpu"}
ENCODER = {"dim": 16, "depth": 2, "heads": 2, "dim_head": 8}
RNA = {**TRAINING, **ENCODER, "grad_acc": 1}
ATAC = {**TRAINING, **ENCODER, "n_patches": 10}
MULTIMODAL = {**TRAINING, "latent_dim": 16}


def command_line(flags: dict) -> list[str]:
    """`{"epochs": 2, "resume": True}` → `--epochs 2 --resume`."""
    return [word for name, value in flags.items() for word in ([f"--{name}"] if value is True else _words(name, value))]


def _words(name: str, value) -> list[str]:
    return [f"--{name}", str(value)]


def call(script: str, *words: str) -> None:
    """What `python <script>.py <words>` does, in this process; an exit code raises SystemExit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *words])
        run_script(importlib.import_module(script).main)


def run(script: str, **flags) -> None:
    """A script that must succeed."""
    call(script, *command_line(flags))


def error_of(capsys, script: str, **flags) -> str:
    """The one line on stderr of a script that a user's mistake must stop with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(script, **flags)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{script}.py: error: ")
    return lines[0]


def lacks(text: str, *words: object) -> list[str]:
    """The words that a text should hold and does not; compared as strings."""
    return [str(word) for word in words if str(word) not in text]


def python(*words: str, timeout: int = 120, preexec_fn=None, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own, one thread each, in the repository."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        env.pop(name, None)
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        preexec_fn=preexec_fn,
    )


def torchrun(processes: int, *words: str) -> subprocess.CompletedProcess:
    """Several processes on a free port of this machine; they must all succeed."""
    done = python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


# What a run leaves -------------------------------------------------------------------------------------------------

TIMES = ("seconds", "cells_per_second")


def records(folder: Path, phase: str | None = None) -> list[dict]:
    """The records of metrics.jsonl, of one phase or all, without those that tell the time."""
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in TIMES}
        for row in rows
        if phase in (None, row["phase"])
    ]


def assert_same_records(ours: list[dict], theirs: list[dict], rel: float = 0.0) -> None:
    """All numbers of all records, relative to their size; the very same numbers if `rel` is 0."""
    assert [(r["phase"], r["epoch"], r["step"]) for r in ours] == [(r["phase"], r["epoch"], r["step"]) for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        if rel:
            other = {name: other[name] if name == "phase" else pytest.approx(other[name], rel=rel) for name in other}
        assert mine == other


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a model folder: those of the best epoch."""
    return load_file(folder / "model.safetensors")


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, buffers and Adam's moments as they were at the end of the run."""
    return load_file(training_folder(folder) / "state" / "state.safetensors")


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


# The engine --------------------------------------------------------------------------------------------------------

KINDS = ("rna", "rna expressed", "atac", "pairs", "denoising", "student", "celltype")
RNA_SHAPE = RNAEncoderConfig(dim=16, depth=2, heads=2, dim_head=8)
ATAC_SHAPE = ATACEncoderConfig(n_patches=10, dim=16, depth=2, heads=2, dim_head=8)
FUSION_SHAPE = FusionConfig(latent_dim=16, pair_hidden=8)


@dataclass
class Stage:
    """A real objective with the cells it is trained on."""

    objective: Objective
    train: CellDataset
    val: CellDataset


def take(cells: Cells, n_train: int, n_val: int) -> Cells:
    """The first training and validation cells of a file, taken from the types in turn."""
    turn = cells.obs.groupby(["split", "cell_type"], observed=True).cumcount().to_numpy()
    first = lambda rows, n: rows[np.argsort(turn[rows], kind="stable")][:n]
    rows = np.sort(np.concatenate([first(cells.rows("train"), n_train), first(cells.rows("val"), n_val)]))
    return replace(
        cells, obs=cells.obs.iloc[rows], values={name: matrix[rows] for name, matrix in cells.values.items()}
    )


def make_stage(kind: str, cells: Cells, seed: int = 0, dropout: float = 0.1) -> Stage:
    """One of KINDS at a tiny size; weights, masks and pairs follow from `seed`."""
    torch.manual_seed(seed)
    n_genes, n_peaks = len(cells.features["rna"]), len(cells.features["atac"])
    if kind.startswith("rna"):
        shape = replace(RNA_SHAPE, tokens="expressed" if kind == "rna expressed" else "all")
        return Stage(MaskedRNA(RNAEncoder(shape, n_genes), seed), *train_and_val(cells, seed))
    if kind == "atac":
        return Stage(MaskedATAC(ATACEncoder(ATAC_SHAPE, n_peaks)), *train_and_val(cells, seed))
    if kind == "denoising":
        model = ScMomer(ScMomerConfig(RNA_SHAPE, None, FUSION_SHAPE), n_genes, 0)
        return Stage(Denoising(model), *train_and_val(cells, seed))
    config = ScMomerConfig(RNA_SHAPE, ATAC_SHAPE, FUSION_SHAPE)
    if kind == "pairs":
        model = ScMomer(config, n_genes, n_peaks)
        return Stage(JointPairs(model), *train_and_val(cells, seed, pairs=(None, None)))
    config = replace(config, student=StudentConfig(16, dropout), other_modality="student")
    if kind == "student":
        model = ScMomer(config, n_genes, n_peaks)
        rng = np.random.default_rng(seed)
        latents = {name: rng.normal(size=(len(cells.obs), 16)).astype(np.float32) for name in ("rna", "atac")}
        return Stage(Distillation(model), *train_and_val(cells, seed, latents=latents))
    codes, classes = encode_labels(cells, "cell_type")
    model = ScMomer(config, n_genes, n_peaks, CELL_TYPES.make_head(ClassifierConfig(8, dropout), classes))
    return Stage(FineTuning(model), *train_and_val(cells, seed, keep=codes >= 0, targets={"cell_type": codes}))


def train(stage: Stage, folder: Path, runtime: Runtime = CPU, **config) -> dict[str, float]:
    """`fit` with settings for tiny runs; the folder holds nothing but the objective's weights."""
    settings = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "warmup_epochs": 1, "patience": 0, "device": "cpu"}
    write = lambda path: save_file(
        {name: tensor.cpu().contiguous() for name, tensor in stage.objective.state_dict().items()},
        path / "model.safetensors",
    )
    return fit(stage.objective, stage.train, stage.val, TrainConfig(**settings | config), runtime, folder, write)


def squeeze(text: str) -> str:
    """Runs of white space as one space, none at the ends."""
    return re.sub(r"\s+", " ", text).strip()
