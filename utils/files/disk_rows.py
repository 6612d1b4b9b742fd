"""Cells that stay in their file until a minibatch needs them: any rows, in any order, at the speed of the page cache.

Why HDF5 is bypassed: even its smallest read takes about 0.1 ms, far too long for one cell. So HDF5 is asked once where
the numbers lie (`plain_array`), and rows are then read by the operating system. Nothing is cached here: whatever the
size of the file, memory holds one minibatch.
"""

import os
from copy import copy
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix, hstack

from utils.errors import reading
from utils.files.cell_hashes import cell_hashes
from utils.files.plain_array import PlainArray

if TYPE_CHECKING:  # training on values in memory needs no HDF5
    import h5py

BLOCK_CELLS = 64
"""Neighbouring cells that `shuffled` keeps near each other, and that are read ahead together."""
REMEMBERED_BLOCKS = 1024
"""Number of recently announced blocks to remember: more than one window of `shuffled` has, so that the operating system
is asked to read ahead only once for each."""


def shuffled(n: int, rng: np.random.Generator, window: int = 2**13) -> np.ndarray:
    """Return a random order of cells that reads a file in stretches rather than all over.

    Blocks of `BLOCK_CELLS` neighbouring cells are shuffled first, then the cells within each `window` of the result. Up
    to `window` cells, every permutation is equally likely.

    Parameters
    ----------
    n : number of cells
    rng : source of randomness
    window : cells that are mixed with each other

    Returns
    -------
    [n] int64, a permutation
    """
    if n <= window:
        return rng.permutation(n)
    blocks = rng.permutation(-(-n // BLOCK_CELLS))
    order = (blocks[:, None] * BLOCK_CELLS + np.arange(BLOCK_CELLS)).ravel()  # [blocks] → [blocks · BLOCK_CELLS]
    order = order[order < n]
    for start in range(0, n, window):
        rng.shuffle(order[start : start + window])
    return order


class FileRows:
    """[cells, features] of an uncompressed CSR matrix in a file; `rows[numbers]` reads cells in any order.

    `disk_matrix.Matrix` reads every layout in file order through an open HDF5 file, and uses this class for scattered
    rows where the layout allows it. These reads outlive the HDF5 file.

    Parameters
    ----------
    group : CSR matrix as anndata writes it, without compression other than that of `plain_array.packing`
    path : its file
    dtype : of the rows that are read; None for that of the file
    remedy : what the user can do if the file is damaged

    Attributes
    ----------
    path : the file
    width : number of features
    row_starts : [rows of the file + 1] position of each row's first value
    order : [cells] row of the file that each cell is
    hashes : [rows of the file] hash of each row's values, where they are known; else None

    Raises
    ------
    ValueError
        If the matrix is stored in another way.
    """

    hashes: np.ndarray | None = None

    def __init__(
        self,
        group: "h5py.Group",
        path: str | Path,
        dtype: type | None = np.float32,
        remedy: str = "run preprocess.py on the raw file again",
    ):
        self.path, self.remedy = Path(path).resolve(), remedy
        self.values, self.indices = PlainArray(group["data"]), PlainArray(group["indices"])
        self.row_starts = group["indptr"][:].astype(np.int64)
        self.dtype = self.values.dtype if dtype is None else np.dtype(dtype)
        self.width = int(group.attrs["shape"][1])
        if Path(group.file.filename).resolve() != self.path:
            raise ValueError("in another file")
        n_values, starts = min(self.values.size, self.indices.size), self.row_starts
        if not len(starts) or starts[0] or (np.diff(starts) < 0).any() or starts[-1] > n_values:
            raise ValueError("the row starts are not in order")
        self.order = np.arange(len(starts) - 1)
        self._announced = set()
        # Shared by all copies that `take` makes, and closed with the last of them. It keeps the present file readable
        # even if another file is moved to its path.
        self._file = FileIO(self.path)
        self._identity = self._identify()

    def _identify(self) -> tuple[int, int]:
        """Return size and time of the last change of the open file, which differ once the file was overwritten."""
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and features."""
        return len(self.order), self.width

    @property
    def lengths(self) -> np.ndarray:
        """[cells] number of stored values of each cell."""
        return np.diff(self.row_starts)[self.order]

    def take(self, rows: np.ndarray) -> "FileRows":
        """Return some of the cells, in the given order; nothing is read."""
        part = copy(self)
        part.order = self.order[rows]
        return part

    def __getitem__(self, rows) -> csr_matrix:
        """Read cells as CSR, with sorted indices and without stored zeros.

        Raises
        ------
        UserError
            If the file is damaged, or was written to since it was opened.
        """
        rows = self.order[rows]
        with reading(self.path, "is damaged", self.remedy):
            if self._identify() != self._identity:
                raise ValueError("it was written to in the meantime")
            file = self._file.fileno()
            starts, stops = self.row_starts[rows], self.row_starts[rows + 1]
            spans = np.stack([starts, stops], axis=1).tolist()
            self._announce(rows, file)
            values, indices = (array.read(file, spans) for array in (self.values, self.indices))
            offsets = np.concatenate([[0], np.cumsum(stops - starts)])
            if len(indices) and (indices.min() < 0 or indices.max() >= self.width):
                raise ValueError("an entry lies outside the matrix")
            part = csr_matrix((values.astype(self.dtype), indices, offsets), shape=(len(rows), self.width))
            if not part.has_canonical_format:
                part.sum_duplicates()
            if not part.data.all():
                part.eliminate_zeros()
        return part

    def _announce(self, rows: np.ndarray, file: int) -> None:
        """Let the operating system read ahead the blocks that these rows belong to.

        `shuffled` keeps the cells of a block near each other, so the rest of each block is needed soon.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        for block in set((rows // BLOCK_CELLS).tolist()) - self._announced:
            if len(self._announced) > REMEMBERED_BLOCKS:
                self._announced.clear()
            self._announced.add(block)
            first, last = block * BLOCK_CELLS, min((block + 1) * BLOCK_CELLS, len(self.row_starts) - 1)
            for array in (self.values, self.indices):
                for _, offset, length in array.byte_ranges(int(self.row_starts[first]), int(self.row_starts[last])):
                    if offset >= 0:
                        os.posix_fadvise(file, offset, length, os.POSIX_FADV_WILLNEED)


Rows = csr_matrix | FileRows
CHECKED_CELLS = 64
"""Cells whose values are compared with the hashes in their file."""


def use_hashes(rows: FileRows, hashes: np.ndarray | None) -> None:
    """Take the hashes that a file has of its cells, if they are those of some cells chosen at random."""
    n = rows.shape[0]
    if hashes is None or hashes.shape != (n,) or hashes.dtype != np.uint64:
        return
    some = np.sort(np.random.default_rng(0).permutation(n)[:CHECKED_CELLS])
    if np.array_equal(cell_hashes(rows[some]), hashes[some]):
        rows.hashes = hashes


def hashes_of(matrix: Rows) -> np.ndarray:
    """Return [cells] uint64, a hash of each cell's values; all are read unless the file has the hashes."""
    if isinstance(matrix, FileRows) and matrix.hashes is not None:
        return matrix.hashes[matrix.order]
    starts = range(0, matrix.shape[0], 2**12)
    return np.concatenate([np.empty(0, np.uint64), *(cell_hashes(matrix[start : start + 2**12]) for start in starts)])


def select(matrix: Rows, rows: np.ndarray) -> Rows:
    """Return some of the cells, in the given order; the rows of a file stay in the file."""
    return matrix.take(rows) if isinstance(matrix, FileRows) else matrix[rows]


class SideBySide:
    """Matrices of the same cells, read as one whose columns are theirs, in order.

    Parameters
    ----------
    matrices : [cells, …] each
    """

    def __init__(self, matrices: list[Rows]):
        self.matrices = matrices

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of cells and of all columns."""
        return self.matrices[0].shape[0], sum(matrix.shape[1] for matrix in self.matrices)

    def __getitem__(self, rows) -> csr_matrix:
        return hstack([matrix[rows] for matrix in self.matrices], format="csr")


def side_by_side(values: dict[str, Rows]) -> Rows | SideBySide:
    """Return the values of all modalities of the same cells as one matrix, in their order."""
    return next(iter(values.values())) if len(values) == 1 else SideBySide(list(values.values()))


def row_lengths(matrix: Rows) -> np.ndarray:
    """Return [cells] number of stored values of each cell."""
    return matrix.lengths if isinstance(matrix, FileRows) else np.diff(matrix.indptr)
