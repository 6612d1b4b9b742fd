"""Writing files: whole or not at all, and large ones a block of cells at a time."""

import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
from anndata.io import sparse_dataset, write_elem
from scipy.sparse import csr_matrix

from utils.errors import DiskFullError, UserError, first_line

CHUNK = 2**16
"""Values per piece of the file."""
FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)]


def check_target(path: str | None, suffix: str, inputs: Iterable[str | None]) -> None:
    """Refuse an output before anything is computed.

    Raises
    ------
    UserError
        If no output is named, its suffix does not fit, it is an input, or its folder cannot be written to.
    """
    if path is None:
        raise UserError(f"--out_path is missing: name the {suffix} file to write")
    target = Path(path)
    if target.is_dir():
        raise UserError(f"--out_path {path}: is a folder; name a file in it")
    if target.suffix != suffix:
        raise UserError(f"--out_path {path}: must end in {suffix}, which is what these cells are written as")
    if any(target.resolve() == Path(name).resolve() for name in inputs if name):
        raise UserError(f"--out_path {path}: is the input; name another file")
    with whole_file(path, rename=False) as trial:
        trial.touch()


@contextmanager
def whole_file(path: str | Path, rename: bool = True) -> Iterator[Path]:
    """A path beside the target to write to; it is renamed to the target only when all went well (and `rename` is True).

    Raises
    ------
    UserError
        If the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    # HDF5 repeats itself for every handle of a file that it could not finish, past all handlers.
    silent = lambda *_: None
    hooks, (sys.excepthook, sys.unraisablehook) = (sys.excepthook, sys.unraisablehook), (silent, silent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if rename:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # HDF5 reports a full disk by either
        if isinstance(error, RuntimeError) and "errno" not in str(error):
            raise
        cause = _cause(error)
        if cause in FULL:
            raise DiskFullError(f"{path}: cannot be written ({cause}); free some space") from error
        raise UserError(f"{path}: cannot be written ({cause}); choose another --out_path") from error
    finally:
        sys.excepthook, sys.unraisablehook = hooks
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _cause(error: Exception) -> str:
    """The system's words, which HDF5 hides in the middle of its own."""
    number = re.search(r"errno = (\d+)", str(error))
    if number:
        return os.strerror(int(number[1]))
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def write_whole(file: ad.AnnData | mudata.MuData, path: str | Path) -> None:
    """Write what is in memory.

    Raises
    ------
    UserError
        If the folder cannot be written to, or the disk is full.
    """
    with whole_file(path) as partial:
        file.write(partial)


@contextmanager
def write_in_blocks(
    path: str | Path, parts: dict[str, ad.AnnData], obs: pd.DataFrame, uns: dict
) -> Iterator["BlockWriter"]:
    """Write a file whose values come block by block.

    Parameters
    ----------
    path : .h5ad for one modality, .h5mu for two
    parts : modality → its annotation, without values
    obs : annotation of all cells
    uns : what else the file shall hold

    Yields
    ------
    BlockWriter, to append the blocks to
    """
    if Path(path).suffix == ".h5ad":
        (frame,) = parts.values()
        groups = dict.fromkeys(parts, "/")
    else:
        frame = mudata.MuData(parts)
        frame.obs = obs.loc[frame.obs_names]
        groups = {name: f"/mod/{name}" for name in parts}
    frame.uns.update(uns)
    with whole_file(path) as partial:
        frame.write(partial)
        with h5py.File(partial, "r+") as file:
            yield BlockWriter({name: file[group] for name, group in groups.items()})


class BlockWriter:
    """Appends cells to the modalities of an open file."""

    def __init__(self, groups: dict[str, h5py.Group]):
        self.groups, self.begun = groups, set()

    def append(self, modality: str, **blocks: csr_matrix) -> None:
        """Append cells; `X` goes to X, every other name to a layer."""
        for name, block in blocks.items():
            group = self.groups[modality] if name == "X" else self.groups[modality].require_group("layers")
            if (modality, name) in self.begun:
                sparse_dataset(group[name]).append(block)
                continue
            self.begun.add((modality, name))
            if name in group:
                del group[name]
            # 64-bit row starts: there may be more than 2^31 values by the end.
            write_elem(group, name, block, dataset_kwargs={"indptr_dtype": np.int64, "chunks": (CHUNK,)})
