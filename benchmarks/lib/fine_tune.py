"""How the study fine-tunes: with few labels twice, first on the labelled cells alone; and how it makes mixtures."""

import shutil
from pathlib import Path

from benchmarks.lib.stages import Stages
from utils.train.model_folder import load_model

MIXED = "mixed"
"""The folder for copies of finished runs that get a mixture: the run itself stays as it is."""
RELABELLED = "_relabelled"
"""The end of the name of a run whose labels come from a mixture."""
MIX = "--resume --mix_baselines auto"
"""Flags that mix simple classifiers into a finished run, without training, where validation cells say that it helps."""
ALONE = "--mix_baselines no"
"""The flag of the model alone: --preset small would mix."""


def alone(n: int) -> str:
    """Return the flags of training on n labelled cells of each type alone: the fewer they are, the more epochs."""
    epochs = max(12, 1800 // n)
    return (
        f"--labels_per_type {n} --epochs {epochs} --cycle_epochs {epochs - 1} --val_every {epochs} "
        "--pretrained_lr_scale 0.1"
    )


def on_all_cells(n: int, first: str) -> str:
    """Return the flags of training on all cells, whose labels, but for n of each type, a first model has predicted."""
    return f"--labels_per_type {n} --pseudo_labels_from {first}"


def copy_to_mix(stages: Stages, stage: str, folder: Path, name: str, place: str = MIXED) -> None:
    """Copy a finished run, so that a stage can mix its copy, unless that stage has run already.

    Parameters
    ----------
    stages, stage : the record of stages, and the name of the one that mixes
    folder, name : the folder of models, and the name of the run
    place : its copy lies in this folder of `folder`
    """
    if stage in stages.used:
        return
    for end in ("", ".training"):
        copy = folder / place / f"{name}{end}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / f"{name}{end}", copy)


def is_mixed(folder: Path) -> bool:
    """Whether simple classifiers have been mixed into a cell type model."""
    return "mixture" in load_model(str(folder), "celltype").fitted
