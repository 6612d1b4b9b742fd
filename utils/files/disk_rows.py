"""Cells that stay in their file until they are wanted: any rows, at the speed of the page cache.

HDF5 takes about 0.1 ms for the smallest read. But what is stored without compression lies in the file as plain numbers,
in pieces whose places HDF5 reports; rows are then read by the system alone. Nothing is kept: whatever the size of the
file, memory holds one minibatch.
"""

import os
from io import FileIO
from pathlib import Path

import h5py
import numpy as np
from scipy.sparse import csr_matrix

from utils.errors import reading

BLOCK_CELLS = 64
"""Neighbours in the file that are wanted at about the same time (see `shuffled`)."""


def shuffled(n: int, rng: np.random.Generator, window: int = 2**13) -> np.ndarray:
    """A random order in which neighbours stay near each other, so that a disk is read in stretches.

    Blocks of `BLOCK_CELLS` are shuffled, then the cells of each `window`; up to `window` cells it is any permutation.

    Returns
    -------
    [n] int64, a permutation
    """
    if n <= window:
        return rng.permutation(n)
    blocks = rng.permutation(-(-n // BLOCK_CELLS))
    order = (blocks[:, None] * BLOCK_CELLS + np.arange(BLOCK_CELLS)).ravel()
    order = order[order < n]
    for start in range(0, n, window):
        rng.shuffle(order[start : start + window])
    return order


class PlainArray:
    """A one-dimensional HDF5 dataset without filters, read past HDF5.

    Attributes
    ----------
    dtype, size : of the dataset
    piece : values per piece
    offsets : [pieces] where in the file each begins, in bytes

    Raises
    ------
    ValueError
        If it is compressed, not whole, or otherwise no plain numbers.
    """

    def __init__(self, dataset: h5py.Dataset):
        self.dtype, self.size = dataset.dtype, int(dataset.shape[0])
        if dataset.ndim != 1 or self.dtype.kind not in "iuf" or not self.dtype.isnative:
            raise ValueError("no plain numbers")
        if dataset.id.get_create_plist().get_nfilters() or dataset.file.userblock_size or dataset.is_virtual:
            raise ValueError("not stored as plain numbers")
        if dataset.chunks is None:
            self.piece, offset = max(self.size, 1), dataset.id.get_offset()
            if offset is None:
                raise ValueError("not stored in the file")
            self.offsets = np.array([offset])
        else:
            self.piece = dataset.chunks[0]
            self.offsets = np.full(-(-self.size // self.piece), -1, dtype=np.int64)
            pieces = []
            dataset.id.chunk_iter(lambda info: pieces.append((info.chunk_offset[0] // self.piece, info.byte_offset)))
            for number, offset in pieces:
                self.offsets[number] = offset
            if (self.offsets < 0).any():
                raise ValueError("some of its pieces are missing")

    def places(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(offset, length) in bytes of what holds the values `start` … `stop`."""
        found = []
        while start < stop:
            number, first = divmod(start, self.piece)
            n = min(stop - start, self.piece - first)
            found.append((int(self.offsets[number]) + first * self.dtype.itemsize, n * self.dtype.itemsize))
            start += n
        return found

    def read(self, file: int, start: int, stop: int) -> bytes:
        """The values `start` … `stop` as they lie in the file."""
        parts = [os.pread(file, length, offset) for offset, length in self.places(start, stop)]
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(whole) != (stop - start) * self.dtype.itemsize:
            raise ValueError("the file ends too early")
        return whole


class FileRows:
    """Cells × features in a file, or some of the cells in some order; `rows[numbers]` reads them as CSR.

    Parameters
    ----------
    group : CSR matrix as anndata writes it, uncompressed
    path : its file

    Raises
    ------
    ValueError
        If it is stored in another way.
    """

    def __init__(self, group: h5py.Group, path: str | Path):
        self.path = Path(path).resolve()
        self.values, self.indices = PlainArray(group["data"]), PlainArray(group["indices"])
        self.starts = group["indptr"][:].astype(np.int64)
        self.width = int(group.attrs["shape"][1])
        if Path(group.file.filename).resolve() != self.path:
            raise ValueError("in another file")
        n_values = min(self.values.size, self.indices.size)
        if not len(self.starts) or self.starts[0] or (np.diff(self.starts) < 0).any() or self.starts[-1] > n_values:
            raise ValueError("the rows' beginnings are not in order")
        self.order = np.arange(len(self.starts) - 1)
        self._advised = set()
        self._file = FileIO(self.path)  # shared by all that are taken of these rows, and closed with the last of them
        self._identity = self._identify()

    def _identify(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.order), self.width

    @property
    def lengths(self) -> np.ndarray:
        """[cells] stored values of each."""
        return np.diff(self.starts)[self.order]

    def take(self, rows: np.ndarray) -> "FileRows":
        """Some of the cells, in some order; nothing is read."""
        part = object.__new__(FileRows)
        part.__dict__ |= self.__dict__ | {"order": self.order[rows]}
        return part

    def __getitem__(self, rows) -> csr_matrix:
        """Read cells: float32, sorted, without zeros.

        Raises
        ------
        UserError
            If the file is damaged.
        """
        rows = self.order[rows]
        with reading(self.path, "is damaged", "run preprocess.py on the raw file again"):
            if self._identify() != self._identity:
                raise ValueError("it was written to in the meantime")
            file, spans = self._file.fileno(), np.stack([self.starts[rows], self.starts[rows + 1]], 1).tolist()
            self._advise(rows, file)
            values, indices = (
                np.frombuffer(bytearray().join(array.read(file, *span) for span in spans), array.dtype)
                for array in (self.values, self.indices)
            )
            offsets = np.concatenate([[0], np.cumsum(self.starts[rows + 1] - self.starts[rows])])
            if len(indices) and (indices.min() < 0 or indices.max() >= self.width):
                raise ValueError("an entry lies outside the matrix")
            part = csr_matrix((values.astype(np.float32), indices, offsets), shape=(len(rows), self.width))
            if not part.has_canonical_format:
                part.sum_duplicates()
            if not part.data.all():
                part.eliminate_zeros()
        return part

    def _advise(self, rows: np.ndarray, file: int) -> None:
        """Tell the system which stretches of the file will be wanted soon: the blocks that these cells are of."""
        if not hasattr(os, "posix_fadvise"):
            return
        for block in set((rows // BLOCK_CELLS).tolist()) - self._advised:
            if len(self._advised) > 1024:
                self._advised.clear()
            self._advised.add(block)
            first, last = block * BLOCK_CELLS, min((block + 1) * BLOCK_CELLS, len(self.starts) - 1)
            for array in (self.values, self.indices):
                for offset, length in array.places(int(self.starts[first]), int(self.starts[last])):
                    os.posix_fadvise(file, offset, length, os.POSIX_FADV_WILLNEED)


Rows = csr_matrix | FileRows


def select(matrix: Rows, rows: np.ndarray) -> Rows:
    """Some of the cells; those of a file stay there."""
    return matrix.take(rows) if isinstance(matrix, FileRows) else matrix[rows]


def row_lengths(matrix: Rows) -> np.ndarray:
    """[cells] number of values of each."""
    return matrix.lengths if isinstance(matrix, FileRows) else np.diff(matrix.indptr)
