"""Read and write checkpoints as torch.save makes them (.pth), and the arrays and lists beside them; nothing unpickles.

A .pth is a zip archive with a pickle that lists tensors. `torch.load(weights_only=True)` reads that list without
running code, and `mmap=True` leaves the tensors on disk until they are used.
"""

import argparse
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy._core.multiarray import scalar
from torch import Tensor

from utils.errors import UserError, first_line, reading
from utils.files.file_hash import file_hash
from utils.files.write import whole_file

STATE = "model_state_dict"
"""Key of a published file under which its weights lie."""
AGAIN = "download or copy it again"
HARMLESS = [
    argparse.Namespace,
    *(np.dtype, *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")}),
    *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
"""What training scripts save beside weights: their flags, and losses as numpy numbers. Making them runs no code, and
they are not used."""
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
"""First bytes of a zip archive, and of a pickle."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint.

    Attributes
    ----------
    path : the file
    tensors : name → tensor, mapped from the file; names without `prefix`
    prefix : what all names of the file begin with, of `prefixes`; empty if there is none
    others : keys of the file beside the weights, such as an optimiser's state, which is not read
    sha256 : hash of the file
    """

    path: Path
    tensors: dict[str, Tensor]
    prefix: str = ""
    others: list[str] = field(default_factory=list)
    sha256: str = ""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def read_checkpoint(path: str | Path, prefix: str = "") -> Checkpoint:
    """Read tensors by name: under the key model_state_dict of a file, or the file's own entries.

    Parameters
    ----------
    path : a file of torch.save
    prefix : is removed if all names begin with it

    Raises
    ------
    UserError
        If the file is of another kind or damaged, holds anything but tensors, or a tensor is not whole.
    """
    path = Path(path)
    _check_kind(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # of damaged and of very old files, which the errors below are about
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            raise UserError(
                f"{path}: holds more than tensors and plain values, so loading it could run code; if you trust it, "
                f"save its tensors alone: torch.save(torch.load(FILE, weights_only=False)['{STATE}'], 'weights.pth')"
            ) from error
        raise UserError(f"{path}: cannot be read as a file of torch.save ({first_line(error)}); {AGAIN}") from error
    with reading(path, "cannot be read as a table of tensors", AGAIN):
        return _tensors_of(content, path, prefix)


def _tensors_of(content: object, path: Path, prefix: str) -> Checkpoint:
    others = []
    if isinstance(content, Mapping) and isinstance(content.get(STATE), Mapping):
        others = sorted(str(key) for key in content if key != STATE)
        content = content[STATE]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: holds no tensors by name; give a state_dict, bare or under the key {STATE}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.]{1,300}", name):
            raise UserError(f"{path}: {str(name)[:40]!r} is no name of a weight; give a state_dict")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise UserError(f"{path}: {name} is no plain tensor; give a state_dict, bare or under the key {STATE}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} repeats its numbers instead of holding all of them; {AGAIN}")
    prefix = prefix if all(name.startswith(prefix) for name in content) else ""
    tensors = {name.removeprefix(prefix): tensor.detach() for name, tensor in content.items()}
    return Checkpoint(path, tensors, prefix, others, file_hash(path))


def _check_kind(path: Path) -> None:
    """Refuse what is no file of torch.save, with the way from there to one."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a checkpoint, .pth")
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(ZIP):
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path}: is cut off, since the end of the zip archive is missing; {AGAIN}")
        with reading(path, "is a damaged zip archive", AGAIN), zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = {member.filename.rpartition("/")[2] for member in members}
            is_stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            damaged = archive.testzip() if is_stored else None  # compares checksums, which torch.load does not
        if "constants.pkl" in names:
            raise UserError(
                f"{path}: is a TorchScript archive, a program and not only weights; save its weights: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
            )
        if "data.pkl" not in names or not is_stored:  # torch.save compresses nothing
            raise UserError(f"{path}: is a zip archive, but not from torch.save; give a checkpoint, .pth")
        if damaged:
            raise UserError(f"{path}: is damaged in {damaged!r}; {AGAIN}")
    elif start.startswith(PICKLE):
        raise UserError(
            f"{path}: is a pickle or a file of torch before 1.6, and loading it could run code; if you trust it, save "
            "it anew: torch.save(torch.load(FILE, weights_only=False), 'weights.pth')"
        )
    elif start[8:9] == b"{":
        raise UserError(
            f"{path}: is a safetensors file; give a model folder where one is asked for, or save its tensors as "
            "published files are: torch.save(safetensors.torch.load_file(FILE), 'weights.pth')"
        )
    else:
        what = "empty" if not start else "no file of torch.save"
        raise UserError(f"{path}: is {what}; give a checkpoint, .pth")


def check_numbers_of(checkpoint: Checkpoint, integers: set[str]) -> None:
    """Refuse tensors that are not finite float32, except for the named counters.

    Raises
    ------
    UserError
        The message names the tensor.
    """
    for name, tensor in checkpoint.tensors.items():
        wanted = torch.int64 if name in integers else torch.float32
        if tensor.dtype != wanted:
            kind, wanted = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, wanted))
            raise UserError(
                f"{checkpoint.path}: {name} is {kind}, not {wanted}; give the file as it was published, since other "
                "numbers give other results"
            )
        # The least and the largest value say it, in a thirtieth of the time that a test of every value takes.
        if tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
            raise UserError(f"{checkpoint.path}: {name} has values that are not finite; {AGAIN}")


def write_checkpoint(tensors: dict[str, Tensor], path: str | Path) -> None:
    """Write tensors under the key model_state_dict, in a file that `torch.load` opens.

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    # A part of a larger tensor would be written with all of it.
    whole = {name: tensor.clone() if _is_part(tensor) else tensor for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        torch.save({STATE: whole}, partial)


def _is_part(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def read_array(path: str | Path, flag: str) -> np.ndarray:
    """Read a .npy file without unpickling.

    Parameters
    ----------
    path : the file
    flag : the flag that named it, for messages

    Raises
    ------
    UserError
        If it is anything else, or holds Python objects.
    """
    if not Path(path).is_file():
        raise UserError(f"{flag} {path}: no such file; give a .npy of numpy.save")
    with reading(f"{flag} {path}", "cannot be read as an array", "give a .npy of numpy.save without Python objects"):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def read_class_names(path: str | Path, flag: str = "--labels") -> list[str]:
    """Read names of classes in their order: from a text with a name per line, or from a .npy.

    Parameters
    ----------
    path : the file
    flag : the flag that named it, for messages

    Raises
    ------
    UserError
        If the file cannot be read, is a pickle, or a name is empty or occurs twice.
    """
    if Path(path).suffix == ".npy":
        names = [str(name).strip() for name in read_array(path, flag).ravel().tolist()]
    else:
        if not Path(path).is_file():
            raise UserError(f"{flag} {path}: no such file; give a text with the name of a class on each line")
        content = Path(path).read_bytes()
        if content.startswith(PICKLE):
            raise UserError(
                f"{flag} {path}: is a pickle, which could run code; if you trust it, turn it into text with the two "
                "lines `import pickle` and "
                f"`print(*pickle.load(open('{Path(path).name}', 'rb')), sep='\\n', file=open('labels.txt', 'w'))`"
            )
        with reading(f"{flag} {path}", "is no text", "give a text with the name of a class on each line"):
            names = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice or not names or "" in names:
        problem = f"names {twice[0]!r} twice" if twice and twice[0] else "has an empty line or none at all"
        raise UserError(f"{flag} {path}: {problem}; give each class once, in the order of the classifier's outputs")
    return names
