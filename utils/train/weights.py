"""What a model folder declares against what its weights are, from the weights' header alone.

A forged or damaged `config.json` may ask for a million layers: it is refused before anything of that size is built.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from models.shapes import MODALITIES
from utils.errors import UserError

Shapes = dict[str, tuple[int, ...]]  # tensor → its shape

LARGEST = 2**16
"""What a number of the configuration may always be, as it may belong to a part that is not in the folder."""
MOST_BLOCKS = 2**8
"""The same for the number of an encoder's blocks."""
NAMED = 3
"""How many tensors that do not fit are named."""
REMEDY = "restore the folder, or train the model again"


def stored_shapes(path: Path) -> Shapes:
    """Shapes of the tensors in a safetensors file; its values are not read."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def shapes_of(tensors: dict[str, Tensor]) -> Shapes:
    """Shapes of tensors, which may have no values (device `meta`)."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_declared(parts: dict[str, dict], kind: str, stored: Shapes, path: Path) -> None:
    """Refuse numbers in a model's configuration that its weights cannot bear out.

    Parameters
    ----------
    parts : part of the model → its settings, as in config.json
    kind : of the model; an encoder's blocks stand under no tower where the folder holds one encoder alone
    stored : shapes of the weights
    path : of config.json, for the message

    Raises
    ------
    UserError
        If building such a model would take far more time or memory than its weights do.
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
    """The encoder that a tensor belongs to."""
    return next((name for name in MODALITIES if f"towers.{name}." in tensor), kind)


def check_shapes(expected: Shapes, found: Shapes, path: str | Path | None, optional: Iterable[str] = ()) -> None:
    """Refuse weights that are not exactly those of a model.

    Parameters
    ----------
    expected, found : shapes by name
    path : for the message
    optional : names that may be missing

    Raises
    ------
    UserError
        That names the first tensors which are missing, are too many or have another shape.
    """
    wrong = []
    for name in [*expected, *(name for name in found if name not in expected)]:
        if name not in found and name not in optional:
            wrong.append(f"{name} is missing")
        elif name not in expected:
            wrong.append(f"{name} belongs to no part of it")
        elif name in found and found[name] != expected[name]:
            wrong.append(f"{name} is {_sizes(found[name])}, not {_sizes(expected[name])}")
    if wrong:
        more = f", and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise UserError(f"{path}: weights do not fit the model's shape ({', '.join(wrong[:NAMED])}{more}); {REMEDY}")


def _sizes(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "a number"


def check_finite(state: dict[str, Tensor], path: str | Path) -> None:
    """Refuse weights with a value that is not finite.

    Raises
    ------
    UserError
        That names the tensor.
    """
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} has values that are not finite; {REMEDY}")


def load_strictly(module: nn.Module, state: dict[str, Tensor], path: str | Path | None) -> None:
    """Load weights; a missing, extra or misshapen one is an error.

    Raises
    ------
    UserError
        If the weights are not exactly those of the module.
    """
    check_shapes(shapes_of(module.state_dict()), shapes_of(state), path)
    module.load_state_dict(state, strict=True)
