"""The state of a training run on disk: begin or resume a run, and refuse to resume one with other settings or data."""

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from utils.errors import UserError, reading
from utils.train.config import TrainConfig
from utils.train.distributed import Runtime
from utils.train.folders import is_there, read_folder
from utils.train.log import training_folder
from utils.train.model_folder import load_strictly, part
from utils.train.sums import Sums

MAY_CHANGE = {
    *("epochs", "patience", "max_steps", "device", "deterministic", "save_steps", "resume", "overwrite"),
    *("data_path", "ckpt_dir", "dir_train", "dir_val", "model_path", "rna_model_path", "atac_model_path"),
    *("pretrained_model_path", "pseudo_labels_from", "gene_embedding_path", "continue_from"),
    *("mix_baselines", "calibrate_across", "label_hierarchy"),
}
"""Settings that may differ between a run and its resumption. Files and parent models may have moved; hashes of their
contents are compared instead. What is fitted or mixed after training changes no step of it."""


@dataclass
class Progress:
    """The position of a run: everything in its state that is not a tensor.

    Attributes
    ----------
    epoch : completed epochs
    step_in_epoch : optimiser steps taken in the current epoch
    step : optimiser steps taken in all epochs
    step_size : cells per optimiser step, over all micro-batches and processes
    skipped : steps left out because their loss or gradient was not finite
    best : lowest validation loss so far
    epochs_since_best : epochs since that loss, for --patience
    sums : metrics of the current epoch so far, summed over all processes
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    step_size: int = 0
    skipped: int = 0
    best: float = math.inf
    epochs_since_best: int = 0
    sums: Sums = field(default_factory=dict)


def starts_anew(folder: Path, config: TrainConfig, runtime: Runtime) -> bool:
    """Return whether `fit` begins at the first step, rather than where an earlier run stopped.

    Parameters
    ----------
    folder : the model folder
    config : of which --resume and --overwrite count
    runtime : this process

    Raises
    ------
    UserError
        If neither --resume nor --overwrite is given, but the model folder exists, or the training state of a run that
        has taken at least one step.
    """
    state_folder = training_folder(folder) / "state"
    if config.resume or (runtime.restarted and is_there(state_folder)):
        return False
    if config.overwrite or runtime.restarted:
        return True
    if is_there(folder):
        raise UserError(f"{folder}: exists already; add --resume, --overwrite, or choose another --model_name")
    step = saved_step(state_folder)
    if step != 0:
        what = "a training state that cannot be read" if step is None else f"a run that has reached step {step}"
        raise UserError(
            f"{state_folder}: holds {what}; add --resume to go on, --overwrite to start anew, or choose another "
            "--model_name"
        )
    return True


def write_state(path: Path, objective, optimizer, identity: dict, progress: Progress, best_metrics: dict) -> None:
    """Write what resuming needs: trained weights, buffers and Adam's moments as safetensors, the rest as JSON.

    Parameters
    ----------
    path : an empty folder
    objective, optimizer : the tensors to save; frozen weights are left out, since the parent models have them
    identity : settings of the run and hashes of its cells and parents; resuming compares them
    progress, best_metrics : position of the run, and metrics of the model that is kept so far
    """
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    trained |= {name for name, _ in objective.named_buffers()}
    state = objective.state_dict()
    tensors = {f"objective.{name}": state[name] for name in trained & state.keys()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path / "state.safetensors"
    )
    (path / "state.json").write_text(
        json.dumps({"progress": asdict(progress), "best_metrics": best_metrics, "identity": identity}, indent=1)
    )


def saved_step(path: Path) -> int | None:
    """Return the optimiser step of a saved state; 0 if there is no state, None if it cannot be read."""
    if not is_there(path):
        return 0
    with suppress(UserError, ValueError, KeyError, TypeError):
        return int(_read_json(path)["progress"]["step"])
    return None


def saved_batch_size(path: Path) -> dict[str, int] | None:
    """Return the batch_size and grad_acc of a saved state; None if it cannot be read."""
    with suppress(UserError, ValueError, KeyError, TypeError):
        identity = _read_json(path)["identity"]
        return {name: identity[name] for name in ("batch_size", "grad_acc")}
    return None


def _read_json(path: Path) -> dict:
    return read_folder(path, lambda place, _: json.loads((place / "state.json").read_text()), "state.json")


def load_state(path: Path, objective, optimizer, identity: dict) -> tuple[Progress, dict]:
    """Load a saved state into the objective and the optimiser.

    Parameters
    ----------
    path : folder made by `write_state`
    objective, optimizer : changed in place
    identity : of the run that resumes; it must match the saved one, except for `MAY_CHANGE`

    Returns
    -------
    progress, best_metrics : as saved

    Raises
    ------
    UserError
        If there is no state, it is damaged, or it belongs to a different run.
    """
    if not is_there(path):
        raise UserError(f"{path}: nothing to resume; run the same command without --resume")

    def load(place: Path, _: str) -> tuple[Progress, dict]:
        with reading(path, "is not a valid training state", "start anew with --overwrite"):
            return _load(place, path, objective, optimizer, identity)

    return read_folder(path, load, "state.json", "state.safetensors")


def _load(place: Path, path: Path, objective, optimizer, identity: dict) -> tuple[Progress, dict]:
    """Load the files in `place`; messages name the folder `path`, which the user knows."""
    saved = json.loads((place / "state.json").read_text())
    for name, value in saved["identity"].items():
        if name in MAY_CHANGE or identity.get(name) == value:
            continue
        if name in ("cells", "parents"):
            what = {"cells": "training cells", "parents": "parent models"}[name]
            raise UserError(f"{path}: was made from other {what}; resume with the same, or start anew with --overwrite")
        raise UserError(f"{path}: was made with --{name} {value}, not {identity.get(name)}; resume with the same")
    if unknown := identity.keys() - saved["identity"].keys() - MAY_CHANGE:
        flags = ", ".join(f"--{name}" for name in sorted(unknown))
        raise UserError(f"{path}: was made by an older version, without {flags}; start anew with --overwrite")
    tensors = load_file(place / "state.safetensors")
    # Frozen weights are not saved; the objective already has them from the parent models.
    frozen = {name: p for name, p in objective.named_parameters() if not p.requires_grad}
    load_strictly(objective, frozen | part(tensors, "objective."), path)
    moments = {}
    for name, tensor in part(tensors, "optimizer.").items():
        index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return Progress(**saved["progress"]), saved["best_metrics"]


def keep_step_size(config: TrainConfig, step_size: int, runtime: Runtime) -> TrainConfig:
    """Adapt batch_size and grad_acc so that a resumed run keeps its number of cells per optimiser step.

    Parameters
    ----------
    config : training settings, for the same number of processes as before
    step_size : cells per optimiser step before the interruption
    runtime : this process; the number of processes may differ from before

    Returns
    -------
    Settings with micro-batches that are at most as large as before

    Raises
    ------
    UserError
        If the processes cannot share the cells of a step evenly.
    """
    if step_size == config.batch_size * config.grad_acc * runtime.world_size:
        return config
    cells_per_process, rest = divmod(step_size, runtime.world_size)
    if rest:
        raise UserError(
            f"--resume: {runtime.world_size} processes cannot share the run's {step_size} cells per step evenly; start "
            f"a number of processes that divides {step_size}"
        )
    sizes = range(1, min(cells_per_process, config.batch_size) + 1)
    batch_size = max(size for size in sizes if cells_per_process % size == 0)
    runtime.say(
        f"{runtime.world_size} processes with micro-batches of {batch_size}: {step_size} cells per step, as before"
    )
    return replace(config, batch_size=batch_size, grad_acc=cells_per_process // batch_size)
