"""Where a run stands, on disk: what resuming needs, and the refusal to resume what is another run."""

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file

from utils.errors import UserError, reading
from utils.train.folders import is_there, read_folder
from utils.train.model_folder import load_strictly, part
from utils.train.sums import Sums

# Settings that may differ between a run and its resumption.
MAY_CHANGE = {
    *("epochs", "patience", "max_steps", "device", "save_steps", "resume", "overwrite"),
    *("data_path", "ckpt_dir", "dir_train", "dir_val", "model_path", "rna_model_path", "atac_model_path"),
    *("pretrained_model_path", "gene_embedding_path"),
}


@dataclass
class Progress:
    """Where a run stands: all that is not a tensor."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    step_size: int = 0
    skipped: int = 0  # steps without a finite loss
    best: float = math.inf
    epochs_since_best: int = 0
    sums: Sums = field(default_factory=dict)  # of the epoch's metrics so far, over all processes


def write_state(path: Path, objective, optimizer, identity: dict, progress: Progress, best_metrics: dict) -> None:
    """All that resuming needs: trained weights, buffers, Adam's moments (safetensors) and the position (JSON).

    Parameters
    ----------
    identity : settings of the run, and hashes of its cells and parents; resuming compares them
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
    """The optimiser step of a state; 0 where there is none, None where it cannot be read."""
    if not is_there(path):
        return 0
    with suppress(UserError, ValueError, KeyError, TypeError):
        return int(_read_json(path)["progress"]["step"])
    return None


def saved_cut(path: Path) -> dict[str, int] | None:
    """How the run to be resumed cuts its steps: batch_size and grad_acc; None where there is nothing to read."""
    with suppress(UserError, ValueError, KeyError, TypeError):
        identity = _read_json(path)["identity"]
        return {name: identity[name] for name in ("batch_size", "grad_acc")}
    return None


def _read_json(path: Path) -> dict:
    return read_folder(path, lambda place, _: json.loads((place / "state.json").read_text()), "state.json")


def load_state(path: Path, objective, optimizer, identity: dict) -> tuple[Progress, dict]:
    """Put objective and optimizer back to where `write_state` left them.

    Raises
    ------
    UserError
        If there is no such state, it is damaged, or it belongs to another run.
    """
    if not is_there(path):
        raise UserError(f"{path}: nothing to resume; run the same command without --resume")

    def load(place: Path, _: str) -> tuple[Progress, dict]:
        with reading(path, "is not a valid training state", "start anew with --overwrite"):
            return _load(place, path, objective, optimizer, identity)

    return read_folder(path, load, "state.json", "state.safetensors")


def _load(place: Path, path: Path, objective, optimizer, identity: dict) -> tuple[Progress, dict]:
    """Read what lies at `place`; messages name the folder `path`."""
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
    # Frozen weights are not in it: they are those of the parents.
    frozen = {name: p for name, p in objective.named_parameters() if not p.requires_grad}
    load_strictly(objective, frozen | part(tensors, "objective."), path)
    moments = {}
    for name, tensor in part(tensors, "optimizer.").items():
        index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return Progress(**saved["progress"]), saved["best_metrics"]
