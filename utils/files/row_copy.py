"""A matrix by rows in a temporary file, for layouts whose rows cannot be read in any order: CSC, compressed, dense.

Copying reads and writes each value a fixed number of times, whatever the number of cells. Without it, a file by
features is read once for every few blocks of cells, and cells in another order cost a block of the file each.
"""

import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
from anndata.abc import CSCDataset
from scipy.sparse import csr_matrix

from utils.errors import UserError
from utils.files.disk_rows import FileRows

CHUNK = 2**16
"""Values per chunk of the temporary file, while its size is unknown."""
REMEDY = "copy or download it again"


def copy_of_blocks(blocks: Iterator[csr_matrix], n_columns: int, path: str | Path) -> FileRows:
    """Copy blocks of cells, in their order.

    Parameters
    ----------
    blocks : [cells of the block, n_columns]
    n_columns : number of features
    path : the file that they come from, for messages
    """
    with _Copy(path) as copy:
        starts = [np.zeros(1, np.int64)]
        for block in blocks:
            starts.append(block.indptr[1:].astype(np.int64) + starts[-1][-1])
            copy.append("data", block.data)
            copy.append("indices", block.indices.astype(np.int32))
        return copy.rows(np.concatenate(starts), n_columns)


def copy_of_columns(content: CSCDataset, path: str | Path, block: int) -> FileRows:
    """Copy a matrix that is stored by features: values go to the place of a group of cells, and are sorted there.

    Parameters
    ----------
    content : the matrix
    path : its file, for messages
    block : values to hold in memory at a time

    Raises
    ------
    ValueError
        If the matrix is damaged.
    """
    group, (n_rows, n_columns) = content.group, (int(n) for n in content.shape)
    columns, n_values = group["indptr"][:], group["data"].shape[0]
    if columns[0] != 0 or columns[-1] != n_values or (np.diff(columns) < 0).any():
        raise ValueError("the column starts are not in order")
    pieces = [slice(first, min(first + block, n_values)) for first in range(0, n_values, block)]
    lengths = np.zeros(n_rows, np.int64)
    for piece in pieces:
        rows = group["indices"][piece]
        if len(rows) and (rows.min() < 0 or rows.max() >= n_rows):
            raise ValueError("an entry lies outside the matrix")
        lengths += np.bincount(rows, minlength=n_rows)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    # Groups of cells with about `block` values; a group's values have their final place from the start.
    cuts = np.unique(np.searchsorted(starts, np.arange(0, n_values, block), side="right") - 1)
    edges = np.concatenate([cuts, [n_rows]]) if n_values else np.array([0, n_rows])
    ends = starts[edges[:-1]]  # where the next value of a group goes
    with _Copy(path) as copy:
        data = copy.file.create_dataset("data", (n_values,), _kept_dtype(group["data"].dtype))
        indices, owners = (copy.file.create_dataset(name, (n_values,), np.int32) for name in ("indices", "rows"))
        for piece in pieces:
            rows = group["indices"][piece]
            values = group["data"][piece]
            # A value belongs to the last feature that begins at or before it.
            features = np.searchsorted(columns, np.arange(piece.start, piece.stop), side="right") - 1
            number = np.searchsorted(edges, rows, side="right") - 1
            order = np.argsort(number, kind="stable")
            bounds = np.searchsorted(number[order], np.arange(len(edges)))
            for i in np.unique(number):
                chosen = order[bounds[i] : bounds[i + 1]]
                place = slice(ends[i], ends[i] + len(chosen))
                data[place], indices[place], owners[place] = values[chosen], features[chosen], rows[chosen]
                ends[i] = place.stop
        for first, last in pairwise(edges):
            place = slice(starts[first], starts[last])
            order = np.argsort(owners[place], kind="stable")  # within a cell, features stay in order
            data[place], indices[place] = data[place][order], indices[place][order]
        return copy.rows(starts, n_columns)


def _kept_dtype(dtype: np.dtype) -> np.dtype:
    """Half precision becomes single, because scipy cannot handle it; truth values become numbers."""
    return np.dtype(np.float32) if dtype in (np.float16, np.bool_) else dtype


class _Copy:
    """A temporary file with a matrix; its name is gone once it is open for reading, its space when it is closed."""

    def __init__(self, path: str | Path):
        self.path = path

    def __enter__(self) -> "_Copy":
        self._folder = tempfile.TemporaryDirectory(prefix="scmomer_")
        self._place = Path(self._folder.name) / "rows.h5"
        self.file = h5py.File(self._place, "w")
        return self

    def append(self, name: str, values: np.ndarray) -> None:
        """Append values to a dataset."""
        if name not in self.file:
            dtype = _kept_dtype(values.dtype)
            self.file.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(CHUNK,))
        dataset = self.file[name]
        dataset.resize((len(dataset) + len(values),))
        dataset[len(dataset) - len(values) :] = values

    def rows(self, starts: np.ndarray, n_columns: int) -> FileRows:
        """The finished matrix; messages name the file that it was copied from."""
        for name, dtype in (("data", np.float32), ("indices", np.int32)):
            if name not in self.file:
                self.file.create_dataset(name, (0,), dtype)
        self.file["indptr"] = starts
        self.file.attrs["shape"] = (len(starts) - 1, n_columns)
        self.file.close()
        self.file = h5py.File(self._place)
        rows = FileRows(self.file, self._place, None, REMEDY)
        rows.path = Path(self.path)
        return rows

    def __exit__(self, kind, error, traceback) -> None:
        self.file.close()
        self._folder.cleanup()
        if isinstance(error, OSError):
            raise UserError(
                f"{self.path}: its cells cannot be sorted in the temporary folder {tempfile.gettempdir()} ({error}); "
                "free some space there, or name another folder in the environment variable TMPDIR"
            ) from error
