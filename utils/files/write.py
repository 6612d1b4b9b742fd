"""Write files of cells: each file completely or not at all, and large files one block of cells at a time."""

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
from anndata.io import write_elem
from scipy.sparse import csr_matrix

from utils.errors import DiskFullError, UserError, first_line
from utils.files.plain_array import packing

CHUNK = 2**16
"""Values per HDF5 chunk. Chunks let a dataset grow; this size keeps their number and the memory per chunk small."""
CHUNK_ROWS = 2**12
"""Row starts per chunk."""
MOST_VALUES = np.iinfo(np.int32).max
"""Values of a matrix up to which its row starts have 32 bits."""
COMPRESSED = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
"""How layers are stored. Whole numbers of 32 bits shrink to a tenth; a higher level takes longer and gains little."""
DISK_FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)]
"""The system's messages for a full disk, a file over the size limit and a used-up quota."""


def check_target(path: str | None, suffix: str, inputs: Iterable[str | None]) -> None:
    """Check an output path before anything is computed.

    Parameters
    ----------
    path : value of --out_path, or None
    suffix : suffix that the file must have
    inputs : files that are read, which the output must not replace

    Raises
    ------
    UserError
        If the path is missing, has another suffix, is an input, or lies in a folder that cannot be written to.
    """
    if path is None:
        raise UserError(f"--out_path is missing: name the {suffix} file to write")
    target = Path(path)
    if target.is_dir():
        raise UserError(f"--out_path {path}: is a folder; name a file in it")
    if target.suffix != suffix:
        raise UserError(f"--out_path {path}: must end in {suffix}, the format for these cells")
    if any(target.resolve() == Path(name).resolve() for name in inputs if name):
        raise UserError(f"--out_path {path}: is the input; name another file")
    with whole_file(path, rename=False) as trial:
        trial.touch()


def check_folder(path: str | Path) -> Path:
    """Try whether a folder for results can be written to, before anything is computed; a new one is not kept.

    Raises
    ------
    UserError
        If it cannot; the message names --out_path.
    """
    if Path(path).is_file():
        raise UserError(f"--out_path {path}: is a file; name a folder")
    new = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
    with whole_file(Path(path) / "trial", rename=False) as trial:
        trial.touch()
    for folder in new:
        folder.rmdir()
    return Path(path)


def path_with_name(path: Path) -> Path:
    """Return a path that ends in a name, also of the folders `.` and `..`."""
    return path if path.name not in ("", "..") else path.resolve()


@contextmanager
def whole_file(path: str | Path, rename: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the target's folder, and rename it to the target when the block succeeds.

    If the block fails, the temporary file is removed and an existing target stays as it was.

    Parameters
    ----------
    path : the target; missing folders are made
    rename : False removes the temporary file even after success, to try whether the folder can be written to

    Raises
    ------
    UserError
        If the folder cannot be written to.
    DiskFullError
        If the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        with _no_messages_about(partial.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            if rename:
                with partial.open("rb") as file:
                    os.fsync(file.fileno())  # on disk before it has the target's name, even if the power fails
                os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # HDF5 reports a full disk by either
        if isinstance(error, RuntimeError) and "errno" not in str(error):
            raise
        cause = _cause(error)
        if cause in DISK_FULL:
            raise DiskFullError(f"{path}: cannot be written ({cause}); free some space") from error
        raise UserError(f"{path}: cannot be written ({cause}); choose another --out_path") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def _no_messages_about(name: str) -> Iterator[None]:
    """Within the block, silence the messages that h5py prints about the file `name` while it frees its handles.

    When the disk is full, the first failed write is raised as an exception. After it, every open handle of the file
    fails once more in its destructor. A destructor cannot raise, so h5py prints two tracebacks per handle through these
    two hooks, and no try/except can stop them. Errors that do not name the file are still printed.
    """
    hooks = sys.excepthook, sys.unraisablehook

    def excepthook(kind, error, traceback) -> None:
        if name not in str(error):
            hooks[0](kind, error, traceback)

    def unraisablehook(unraisable) -> None:
        if name not in str(unraisable.exc_value):
            hooks[1](unraisable)

    sys.excepthook, sys.unraisablehook = excepthook, unraisablehook
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = hooks


def _cause(error: Exception) -> str:
    """Return the system's message for an error; HDF5 only gives its number, within a message of its own."""
    number = re.search(r"errno = (\d+)", str(error))
    if number:
        return os.strerror(int(number[1]))
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def write_whole(file: ad.AnnData | mudata.MuData, path: str | Path) -> None:
    """Write cells from memory to .h5ad or .h5mu, completely or not at all.

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
    """Write a file whose matrices are appended one block of cells at a time.

    Parameters
    ----------
    path : .h5ad for one modality, .h5mu for two
    parts : modality → AnnData with the annotation, without matrices
    obs : annotation of all cells
    uns : entries for the file's uns

    Yields
    ------
    BlockWriter, which appends the blocks

    Raises
    ------
    UserError
        If the folder cannot be written to, or the disk is full.
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
    """Appends blocks of cells to the matrices of an open file.

    Parameters
    ----------
    groups : modality → HDF5 group of its AnnData
    """

    def __init__(self, groups: dict[str, h5py.Group]):
        self.groups, self.begun = groups, set()

    def add_uns(self, key: str, value: dict) -> None:
        """Add an entry to the file's uns, once its blocks are written."""
        write_elem(next(iter(self.groups.values())).file["uns"], key, value)

    def append(self, modality: str, X: csr_matrix, **layers: csr_matrix) -> None:
        """Append the same cells to X and to layers that have values in the same places.

        The places are stored once: `indices` and `indptr` of a layer are those of X, under a second name in the file.

        Parameters
        ----------
        modality : rna or atac
        X : [cells, features] values to append
        layers : layer → values to append; they are compressed, because training reads X alone

        Raises
        ------
        ValueError
            If a layer has values in other places than X.
        """
        group = self.groups[modality]
        if modality not in self.begun:
            self._begin(group, X, layers)
            self.begun.add(modality)
        for name, layer in layers.items():
            if not (np.array_equal(layer.indptr, X.indptr) and np.array_equal(layer.indices, X.indices)):
                raise ValueError(f"layers['{name}'] has values in other places than X")
            _extend(group["layers"][name]["data"], layer.data)
        matrix = group["X"]
        starts = X.indptr[1:] + np.int64(len(matrix["indices"]))
        if starts.max(initial=0) > MOST_VALUES and matrix["indptr"].dtype == np.int32:
            self._widen([matrix, *(group["layers"][name] for name in layers)])
        _extend(matrix["indptr"], starts)
        _extend(matrix["indices"], X.indices)
        _extend(matrix["data"], X.data)
        for held in (matrix, *(group["layers"][name] for name in layers)):
            held.attrs["shape"] = (len(matrix["indptr"]) - 1, X.shape[1])

    @staticmethod
    def _begin(group: h5py.Group, X: csr_matrix, layers: dict[str, csr_matrix]) -> None:
        """Make empty matrices, in the form in which anndata writes them (csr_matrix 0.1.0)."""
        growing = {"shape": (0,), "maxshape": (None,), "chunks": (CHUNK,)}
        if "X" in group:
            del group["X"]
        matrix = group.create_group("X")
        # Chunks that hold nothing but the fill value take no space: open peaks are all 1.
        is_constant = X.nnz and (X.data == X.data[0]).all()
        matrix.create_dataset("data", dtype=X.dtype, fillvalue=X.data[0] if is_constant else None, **growing)
        matrix.create_dataset("indices", dtype=np.int32, **growing, **packing(X.shape[1]))
        # Row starts have 32 bits like the indices, while they fit: SciPy refuses some slices where the widths differ.
        matrix.create_dataset("indptr", dtype=np.int32, **growing | {"chunks": (CHUNK_ROWS,)})
        _extend(matrix["indptr"], np.zeros(1, np.int32))
        held = {"X": matrix}
        for name, layer in layers.items():
            held[name] = group.require_group("layers").create_group(name)
            held[name].create_dataset("data", dtype=layer.dtype, **growing, **COMPRESSED)
            for part in ("indices", "indptr"):
                held[name][part] = matrix[part]  # a hard link
        for each in held.values():
            each.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})

    @staticmethod
    def _widen(held: list[h5py.Group]) -> None:
        """Give matrices that share their row starts 64 bits for them."""
        starts = held[0]["indptr"][:]
        for each in held:
            del each["indptr"]
        sizes = {"shape": starts.shape, "maxshape": (None,), "chunks": (CHUNK_ROWS,)}
        held[0].create_dataset("indptr", data=starts.astype(np.int64), **sizes)
        for each in held[1:]:
            each["indptr"] = held[0]["indptr"]


def _extend(dataset: h5py.Dataset, values: np.ndarray) -> None:
    """Append values; those that equal the fill value, where there is one, are not written."""
    start = len(dataset)
    dataset.resize((start + len(values),))
    if not dataset.fillvalue or (values != dataset.fillvalue).any():
        dataset[start:] = values
