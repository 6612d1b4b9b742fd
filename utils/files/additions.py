"""Add columns and arrays to cells: to a copy of their file, of which nothing else is read, or to cells in memory.

A `Part` is a table of cells that can take additions: a whole file, and in an .h5mu file also each of its modalities.
`FilePart` and `MemoryPart` have the same methods and leave the same result.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
from anndata.io import read_elem, write_elem

from utils.files.write import CHUNK, whole_file

Array = np.ndarray | h5py.Dataset


class FilePart:
    """A table of cells in an open HDF5 file.

    Parameters
    ----------
    group : as anndata writes it

    Attributes
    ----------
    names : [cells] their names
    """

    def __init__(self, group: h5py.Group):
        self.group = group
        for name in ("obsm", "uns"):
            if name not in group:
                write_elem(group, name, {})
        index = group["obs"].attrs["_index"]
        self.index = index.decode() if isinstance(index, bytes) else str(index)
        self.names = pd.Index(read_elem(group["obs"][self.index])).astype(str)

    def remove(self, kind: str, key: str) -> None:
        """Remove a column of obs or an entry of obsm, if it is there."""
        if key not in self.group[kind]:
            return
        del self.group[kind][key]
        if kind == "obs":
            self._order([name for name in self.group["obs"].attrs["column-order"] if name != key])

    def _order(self, columns: list[str]) -> None:
        self.group["obs"].attrs["column-order"] = np.array(columns, dtype=h5py.string_dtype())

    def columns(self, columns: pd.DataFrame) -> None:
        """Add columns to obs."""
        for name, values in columns.items():
            write_elem(self.group["obs"], name, values._values)  # the array behind the column, as anndata writes it
        held = [name for name in self.group["obs"].attrs["column-order"] if name not in columns]
        self._order([*held, *columns])

    def array(self, key: str, width: int) -> Array:
        """Return a new entry of obsm [cells, width] float32, to be filled; it holds NaN."""
        return self._empty(self.group["obsm"], key, (len(self.names), width))

    def table(self, key: str, columns: list[str]) -> list[Array]:
        """Return the columns [cells] float32 of a new DataFrame in obsm, to be filled; they hold NaN."""
        name = None if self.index == "_index" or self.index in columns else self.index
        frame = pd.DataFrame(index=pd.Index(self.names, name=name))
        write_elem(self.group["obsm"], key, frame)
        group = self.group["obsm"][key]
        group.attrs["column-order"] = np.array(columns, dtype=h5py.string_dtype())
        return [self._empty(group, name, (len(self.names),)) for name in columns]

    @staticmethod
    def _empty(group: h5py.Group, key: str, shape: tuple[int, ...]) -> h5py.Dataset:
        """Return a new dataset of NaN with anndata's marks."""
        row = int(np.prod(shape[1:]))
        chunks = (max(1, min(shape[0], CHUNK // row)), *shape[1:])
        how = {"maxshape": shape, "chunks": chunks, "fillvalue": np.float32(np.nan)}
        write_elem(group, key, np.empty((0, *shape[1:]), np.float32), dataset_kwargs=how)
        group[key].resize(shape)
        return group[key]

    def entry(self, key: str) -> object:
        """Return an entry of uns; None if there is none."""
        return read_elem(self.group["uns"][key]) if key in self.group["uns"] else None

    def set_entry(self, key: str, value: object) -> None:
        """Write an entry of uns in the place of any other."""
        write_elem(self.group["uns"], key, value)

    def move_entry(self, key: str, to: str) -> None:
        """Give an entry of uns another name, in the place of any other."""
        if to in self.group["uns"]:
            del self.group["uns"][to]
        self.group["uns"].move(key, to)


class MemoryPart:
    """A table of cells in memory, which is changed.

    Parameters
    ----------
    cells : the table

    Attributes
    ----------
    names : [cells] their names
    """

    def __init__(self, cells: ad.AnnData | mudata.MuData):
        self.cells, self.names = cells, cells.obs_names

    def remove(self, kind: str, key: str) -> None:
        """Remove a column of obs or an entry of obsm, if it is there."""
        held = getattr(self.cells, kind)
        if key in held:
            del held[key]

    def columns(self, columns: pd.DataFrame) -> None:
        """Add columns to obs."""
        for name, values in columns.items():
            self.cells.obs[name] = values._values

    def array(self, key: str, width: int) -> Array:
        """Return a new entry of obsm [cells, width] float32, to be filled; it holds NaN."""
        self.cells.obsm[key] = np.full((len(self.names), width), np.float32(np.nan))
        return self.cells.obsm[key]

    def table(self, key: str, columns: list[str]) -> list[Array]:
        """Return the columns [cells] float32 of a new DataFrame in obsm, to be filled; they hold NaN."""
        values = np.full((len(self.names), len(columns)), np.float32(np.nan), order="F")
        self.cells.obsm[key] = pd.DataFrame(values, self.names, columns, copy=False)
        return list(values.T)

    def entry(self, key: str) -> object:
        """Return an entry of uns; None if there is none."""
        return self.cells.uns.get(key)

    def set_entry(self, key: str, value: object) -> None:
        """Write an entry of uns in the place of any other."""
        self.cells.uns[key] = value

    def move_entry(self, key: str, to: str) -> None:
        """Give an entry of uns another name, in the place of any other."""
        self.cells.uns[to] = self.cells.uns.pop(key)


Part = FilePart | MemoryPart


@contextmanager
def copied_file(path: str | Path, target: str | Path) -> Iterator[list[FilePart]]:
    """Yield the parts of a copy of an .h5ad or .h5mu file; the copy stays if the block succeeds.

    Everything but the additions is the input's, bit for bit, and is never in memory.

    Parameters
    ----------
    path, target : the file, and the copy

    Yields
    ------
    The whole file, then each modality of an .h5mu file

    Raises
    ------
    UserError
        If the folder cannot be written to, or the disk is full.
    """
    with whole_file(target) as partial:
        shutil.copyfile(path, partial)
        with h5py.File(partial, "r+", rdcc_nbytes=2**20) as file:
            yield [FilePart(file), *(FilePart(group) for group in file.get("mod", {}).values())]


def parts_in_memory(cells: ad.AnnData | mudata.MuData) -> list[MemoryPart]:
    """Return the parts of cells in memory: the whole, then each modality of a MuData."""
    return [MemoryPart(part) for part in (cells, *(cells.mod.values() if isinstance(cells, mudata.MuData) else ()))]


def fill(array: Array, rows: np.ndarray, values: np.ndarray) -> None:
    """Set rows of an array, which may be in a file.

    Parameters
    ----------
    array : [cells, …]
    rows : [n] numbers of the rows; -1 for a row that the array does not have
    values : [n, …]
    """
    if isinstance(array, np.ndarray):
        array[rows[rows >= 0]] = values[rows >= 0]
        return
    order = np.argsort(rows, kind="stable")
    order = order[rows[order] >= 0]
    # In stretches of neighbouring rows: HDF5 is slow with scattered ones.
    for stretch in np.split(order, np.flatnonzero(np.diff(rows[order]) != 1) + 1):
        if len(stretch):
            array[rows[stretch[0]] : rows[stretch[-1]] + 1] = values[stretch]
