"""Matrices that are read a block of cells at a time, wherever they lie and however they are laid out.

Whatever a file holds (dense, CSR or CSC; in memory or in HDF5), `Matrix.rows` hands out cells as CSR, and no more of
the file is in memory than a block of about `BLOCK` values.
"""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from anndata.abc import CSCDataset, CSRDataset
from anndata.io import sparse_dataset
from scipy.sparse import csr_matrix, issparse
from scipy.sparse import vstack as stack

from utils.errors import reading

BLOCK = 2**21
"""Values per block: some tens of megabytes with their indices and a copy."""


class Matrix:
    """A [cells, features] matrix that is read by rows.

    Parameters
    ----------
    content : numpy or scipy matrix, or the HDF5 dataset or group of one as anndata writes it
    path : its file, for messages
    order : [cells] rows of the content that are the matrix's, or None for all
    """

    def __init__(self, content, path: str | Path, order: np.ndarray | None = None):
        self.path, self.order = path, order
        self._slab: tuple[int, int, csr_matrix] | None = None
        with self._reading():
            if isinstance(content, h5py.Group):
                content = sparse_dataset(content)
            elif issparse(content):
                content = csr_matrix(content)
            if len(content.shape) != 2:
                raise ValueError(f"a matrix has two dimensions, not {len(content.shape)}")
        self.content = content

    def _reading(self):
        return reading(self.path, "is damaged", "copy or download it again")

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and features."""
        n_rows, n_columns = (int(n) for n in self.content.shape)
        return (n_rows if self.order is None else len(self.order)), n_columns

    @property
    def block_rows(self) -> int:
        """Cells per block."""
        content, (n_rows, n_columns) = self.content, self.content.shape
        stored = n_rows * n_columns
        if isinstance(content, CSRDataset | CSCDataset):
            stored = content.group["data"].shape[0]
        elif issparse(content):
            stored = content.nnz
        return max(1, min(n_rows, int(BLOCK * n_rows / max(stored, 1))))

    def rows(self, start: int, stop: int) -> csr_matrix:
        """Cells `start` … `stop`, in the dtype of the file; explicit zeros and repeated entries are gone.

        Raises
        ------
        UserError
            If the file is damaged.
        """
        with self._reading():
            if self.order is not None:
                block = self._ordered(self.order[start:stop])
            elif isinstance(self.content, CSCDataset):
                block = self._rows_of_columns(start, stop)
            elif isinstance(self.content, CSRDataset):
                block = self._rows_on_disk(start, stop)
            else:
                block = csr_matrix(_wide(self.content[start:stop]))
            if block.dtype.kind not in "biuf":
                raise ValueError(f"values of type {block.dtype} are no numbers")
            block.check_format(full_check=True)
            block = csr_matrix(block, dtype=np.float32) if block.dtype.kind == "b" else block.copy()
            block.sum_duplicates()
            block.eliminate_zeros()
        return block

    def take(self, order: np.ndarray) -> "Matrix":
        """Some of the rows, in some order."""
        return Matrix(self.content, self.path, order if self.order is None else self.order[order])

    def _ordered(self, rows: np.ndarray) -> csr_matrix:
        """Any rows; the stretches of the file they lie in are read in turn, so rows nearly in order cost little."""
        source = Matrix(self.content, self.path)
        stretch = rows // source.block_rows
        parts, places = [csr_matrix((0, self.shape[1]), dtype=np.float32)], []
        for number in np.unique(stretch):
            mine = np.flatnonzero(stretch == number)
            first = number * source.block_rows
            block = source.rows(first, min(first + source.block_rows, source.shape[0]))
            parts.append(block[rows[mine] - first])
            places.append(mine)
        return csr_matrix(stack(parts))[np.argsort(np.concatenate([*places, np.empty(0, np.int64)]))]

    def blocks(self) -> Iterator[tuple[int, csr_matrix]]:
        """All cells in order: the number of a block's first cell, and the block."""
        for start in range(0, self.shape[0], self.block_rows):
            yield start, self.rows(start, min(start + self.block_rows, self.shape[0]))

    def sample(self, n_rows: int, n_parts: int = 8) -> csr_matrix:
        """About `n_rows` cells from `n_parts` stretches spread evenly over the file; all of a small file."""
        if self.shape[0] <= n_rows:
            return self.rows(0, self.shape[0])
        if isinstance(self.content, CSCDataset):  # every stretch would cost a scan of the file
            return self.rows(0, n_rows)
        size = max(1, n_rows // n_parts)
        starts = np.linspace(0, self.shape[0] - size, n_parts).astype(int)
        parts = [self.rows(start, start + size) for start in starts]
        return csr_matrix(
            (
                np.concatenate([p.data for p in parts]),
                np.concatenate([p.indices for p in parts]),
                np.concatenate([[0], np.cumsum(np.concatenate([np.diff(p.indptr) for p in parts]))]),
            ),
            shape=(size * n_parts, self.shape[1]),
        )

    def _rows_on_disk(self, start: int, stop: int) -> csr_matrix:
        group = self.content.group
        indptr = group["indptr"][start : stop + 1].astype(np.int64)
        entries = slice(indptr[0], indptr[-1])
        parts = (_wide(group["data"][entries]), group["indices"][entries], indptr - indptr[0])
        return csr_matrix(parts, shape=(stop - start, self.shape[1]))

    def _rows_of_columns(self, start: int, stop: int) -> csr_matrix:
        """Cells of a matrix that is stored by features: the file is scanned once for every slab of cells."""
        if self._slab is None or not (self._slab[0] <= start and stop <= self._slab[1]):
            last = min(max(stop, start + 8 * self.block_rows), self.shape[0])
            self._slab = None  # before the next one is made
            self._slab = start, last, self._scan(start, last)
        first, _, slab = self._slab
        return slab[start - first : stop - first]

    def _scan(self, start: int, stop: int) -> csr_matrix:
        group = self.content.group
        indptr, n_values = group["indptr"][:], group["data"].shape[0]
        if indptr[0] != 0 or indptr[-1] != n_values or (np.diff(indptr) < 0).any():
            raise ValueError("the columns' beginnings are not in order")
        rows, columns, values = [], [], []
        for first in range(0, n_values, BLOCK):
            index = group["indices"][first : first + BLOCK]
            if len(index) and (index.min() < 0 or index.max() >= self.content.shape[0]):
                raise ValueError("an entry lies outside the matrix")
            mine = np.flatnonzero((index >= start) & (index < stop))
            rows.append(index[mine] - start)
            columns.append((np.searchsorted(indptr, mine + first, side="right") - 1).astype(np.int32))
            values.append(_wide(group["data"][first : first + BLOCK][mine]))
        parts = [np.concatenate(part) if part else np.empty(0) for part in (values, rows, columns)]
        return csr_matrix((parts[0], (parts[1], parts[2])), shape=(stop - start, self.shape[1]))


def _wide(values):
    """Half-precision numbers in single precision, which scipy needs; any others as they are."""
    return values.astype(np.float32) if values.dtype == np.float16 else values
