"""Model folders as published checkpoints."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from models import published
from utils.errors import UserError, reading
from utils.train.model_folder import NEUTRAL, NO_MODEL, PRETRAINED, SavedModel, load_model
from utils.train.published import KEPT, UNREAD, first_names


def export_published(path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a model folder under their published names.

    Parameters
    ----------
    path : folder of stage I to III or of a classifier, trained here or imported

    Returns
    -------
    Tensors by name, and notes on what the file cannot hold

    Raises
    ------
    UserError
        If the published layouts have no such model.
    """
    saved = load_model(path, *PRETRAINED, "celltype")
    _check_exportable(saved)
    layout, state, notes = saved.kind, dict(saved.state), []
    if saved.options.get("other_modality") == "none":
        layout = "scbert"
    kept, prefix, classifier = _kept(saved)
    if "head.mean" in state and (state["head.mean"].any() or (state["head.deviation"] != 1).any()):
        # The release does not standardise: the first layer does it instead.
        weight, mean, deviation = state["head.layers.1.weight"], state["head.mean"], state["head.deviation"]
        state["head.layers.1.bias"] = state["head.layers.1.bias"] - weight @ (mean / deviation)
        state["head.layers.1.weight"] = weight / deviation
    if saved.fitted.get("temperature", 1.0) != 1.0:
        notes.append(f"divide logits by {saved.fitted['temperature']:.4f}: the file does not hold the temperature")
    if "mixture" in saved.fitted:
        notes.append("the file holds the model alone, not the simple classifiers that its folder mixes it with")
    rna = saved.config.get("rna")
    if rna is not None and rna.tokens == "expressed":
        notes.append("the model was trained on expressed genes alone; the release reads all genes as tokens")
    if rna is not None and (rna.binning == "round") != (layout not in ("rna", "scbert")):
        notes.append(f"the model was trained with --binning {rna.binning}; the release does otherwise at this stage")
    table = published.table_of(layout, *_depths(saved), classifier)
    tensors = published.to_theirs(state, table)
    if left := state.keys() - {place.ours for place in table.values()} - {*NEUTRAL, *UNREAD}:
        raise UserError(
            f"{path}: {first_names(left)} has no name in the published layouts; this model cannot be exported"
        )
    tensors = published.constants(layout) | tensors | kept
    return {prefix + name: tensor for name, tensor in tensors.items()}, notes


def _kept(saved: SavedModel) -> tuple[dict[str, Tensor], str, tuple[str, str]]:
    """Of an imported folder, the tensors kept for export, and how its file named all of them; else our own choice."""
    path = saved.path / KEPT
    if not path.is_file():
        return {}, "", published.CLASSIFIER
    with reading(path, *NO_MODEL), safe_open(path, framework="pt") as file:
        names = file.metadata()
        first, second = names["classifier"].split()
        return load_file(path), names["prefix"], (first, second)


def _check_exportable(saved: SavedModel) -> None:
    """Refuse a model that the published layouts have no names for."""
    options = saved.options
    problem = ""
    if "atac" in saved.config and saved.config["atac"].patch_maps == "own":
        problem = "has a linear map for each patch (--patch_maps own)"
    elif "student" in saved.config and options.get("missing") == "rna":
        problem = "has a student that replaces RNA"
    elif options.get("other_modality") == "zeros":
        problem = "reads zeros in the place of a modality"
    if problem:
        raise UserError(f"{saved.path}: {problem}, which no published model does; train one as published")


def _depths(saved: SavedModel) -> tuple[int, int]:
    return tuple(saved.config[name].depth if name in saved.config else 0 for name in ("rna", "atac"))
