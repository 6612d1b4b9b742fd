"""Check a model folder's configuration against its weights, by reading only the header of the weights file.

A forged or damaged `config.json` may ask for a million layers. It is refused before a model of that size is built.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from models.shapes import MODALITIES
from utils.errors import UserError

Shapes = dict[str, tuple[int, ...]]  # name of a tensor → its shape

LARGEST = 2**16
"""A number in the configuration may always be this large: it may belong to a part that has no weights in the folder."""
MOST_BLOCKS = 2**8
"""The same limit for the number of an encoder's blocks."""
NAMED = 3
"""An error message names at most this many tensors."""
REMEDY = "restore the folder, or train the model again"


def stored_shapes(path: Path) -> Shapes:
    """Return the shapes of the tensors in a safetensors file, without reading their values."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def shapes_of(tensors: dict[str, Tensor]) -> Shapes:
    """Return the shapes of tensors, which may lack values (device `meta`)."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_declared(parts: dict[str, dict], kind: str, stored: Shapes, path: Path) -> None:
    """Refuse a configuration with numbers that are larger than the weights allow.

    Parameters
    ----------
    parts : part of the model → its settings, as in config.json
    kind : kind of the model; where it is a single encoder, names of weights do not begin with a tower
    stored : shapes of the weights
    path : path of config.json, for messages

    Raises
    ------
    UserError
        If a number is too large; building such a model could take far more time and memory than its weights need.
    """
    most = max([LARGEST, *(size for shape in stored.values() for size in shape)])
    for part, settings in parts.items():
        inside = {name: shape for name, shape in stored.items() if _part_of(name, kind) == part}
        blocks = {name.split("blocks.")[1].split(".")[0] for name in inside if "blocks." in name}
        features = [shape for name, shape in inside.items() if name.endswith("attention.features")]
        for name, value in settings.items():
            if not isinstance(value, int):
                continue
            limit = most
            if name == "depth":
                limit = len(blocks) or MOST_BLOCKS
            elif name == "n_features":
                limit = max((shape[0] for shape in features), default=LARGEST // 16)
            elif name == "dim_head" and features:
                limit = max(shape[-1] for shape in features)
            if value > limit:
                raise UserError(f"{path}: {part} has {name} {value}, but the weights allow {limit} at most; {REMEDY}")


def _part_of(tensor: str, kind: str) -> str:
    """Return the name of the encoder that a tensor belongs to."""
    return next((name for name in MODALITIES if f"towers.{name}." in tensor), kind)


def check_shapes(
    expected: Shapes, found: Shapes, path: str | Path | None, optional: Iterable[str] = (), remedy: str = REMEDY
) -> None:
    """Refuse weights whose names or shapes differ from those of a model.

    Parameters
    ----------
    expected, found : shapes of the model's tensors and of those in the file
    path : path of the folder, for messages
    optional : names that may be missing
    remedy : what the user can do

    Raises
    ------
    UserError
        If tensors are missing, unknown or of a different shape; the message names the first ones.
    """
    wrong = []
    for name in [*expected, *(name for name in found if name not in expected)]:
        if name not in found and name not in optional:
            wrong.append(f"{name} is missing")
        elif name not in expected:
            wrong.append(f"{name} belongs to no part of the model")
        elif name in found and found[name] != expected[name]:
            wrong.append(f"{name} is {_sizes(found[name])}, not {_sizes(expected[name])}")
    if wrong:
        more = f", and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise UserError(f"{path}: weights do not fit the model's shape ({', '.join(wrong[:NAMED])}{more}); {remedy}")


def _sizes(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "a number"


def check_finite(state: dict[str, Tensor], path: str | Path) -> None:
    """Refuse weights that are not all finite.

    Raises
    ------
    UserError
        If a value is not finite; the message names its tensor.
    """
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} has values that are not finite; {REMEDY}")


def load_strictly(module: nn.Module, state: dict[str, Tensor], path: str | Path | None) -> None:
    """Load weights into a module, which must have exactly these names and shapes.

    Raises
    ------
    UserError
        If a tensor is missing, unknown or of a different shape.
    """
    check_shapes(shapes_of(module.state_dict()), shapes_of(state), path)
    module.load_state_dict(state, strict=True)
