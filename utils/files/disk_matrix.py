"""Matrices that are read in blocks of cells, whatever their layout: dense, CSR or CSC, in memory or in HDF5.

Blocks are CSR. However large the file, memory holds about `BLOCK` values of it at a time (for CSC on disk, eight times
as many).
"""

from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
from anndata.abc import CSCDataset, CSRDataset
from anndata.io import sparse_dataset
from scipy.sparse import csr_matrix, issparse, vstack

from utils.errors import reading
from utils.files.disk_rows import FileRows

BLOCK = 2**21
"""Values per block: some tens of megabytes with their indices and a copy."""
SCATTERED = 2
"""Rows that span more than this many times their number are read one by one."""
BLOCKS_PER_SCAN = 8
"""Blocks of cells that one scan of a CSC file collects: fewer scans cost more memory."""


class Matrix:
    """A [cells, features] matrix that is read by rows.

    `disk_rows.FileRows` reads single cells in any order, bypassing HDF5, from one layout only. It is used here for
    scattered rows, where the layout allows it.

    Parameters
    ----------
    content : numpy or scipy matrix, or the HDF5 dataset or group of one as anndata writes it
    path : its file, for messages
    order : [cells] row of the content that each cell is, or None if the cells are all rows in order

    Raises
    ------
    UserError
        If the content is not a matrix.
    """

    def __init__(self, content, path: str | Path, order: np.ndarray | None = None):
        self.path, self.order, self._all = path, order, self
        self._slab: tuple[int, int, csr_matrix] | None = None  # first row, last row + 1, and the rows, of a CSC file
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
        """Number of cells and features."""
        n_rows, n_columns = (int(n) for n in self.content.shape)
        return (n_rows if self.order is None else len(self.order)), n_columns

    @property
    def block_rows(self) -> int:
        """Rows per block, so that a block holds about `BLOCK` stored values."""
        content, (n_rows, n_columns) = self.content, self.content.shape
        stored = n_rows * n_columns
        if isinstance(content, CSRDataset | CSCDataset):
            stored = content.group["data"].shape[0]
        elif issparse(content):
            stored = content.nnz
        return max(1, min(n_rows, int(BLOCK * n_rows / max(stored, 1))))

    def rows(self, start: int, stop: int) -> csr_matrix:
        """Read cells `start` to `stop` in the dtype of the file, without stored zeros and repeated entries.

        Raises
        ------
        UserError
            If the file is damaged.
        """
        with self._reading():
            if self.order is not None:
                block = self._rows_in_order(self.order[start:stop])
            elif isinstance(self.content, CSCDataset):
                block = self._rows_from_csc(start, stop)
            elif isinstance(self.content, CSRDataset):
                block = self._rows_from_csr(start, stop)
            else:
                block = csr_matrix(_without_half_precision(self.content[start:stop]))
            if block.dtype.kind not in "biuf":
                raise ValueError(f"values of type {block.dtype} are not numbers")
            block.check_format(full_check=True)
            # Truth values become numbers. The copy keeps the next two steps from changing the matrix of the caller.
            block = csr_matrix(block, dtype=np.float32) if block.dtype.kind == "b" else block.copy()
            block.sum_duplicates()
            block.eliminate_zeros()
        return block

    def take(self, order: np.ndarray) -> "Matrix":
        """Return some of the cells, in the given order; nothing is read."""
        part = Matrix(self.content, self.path, order if self.order is None else self.order[order])
        part._all = self._all  # what was opened or collected there is used by all parts
        return part

    def blocks(self) -> Iterator[tuple[int, csr_matrix]]:
        """Read all cells in order; yield the number of each block's first cell, and the block."""
        for start in range(0, self.shape[0], self.block_rows):
            yield start, self.rows(start, min(start + self.block_rows, self.shape[0]))

    def sample(self, n_rows: int, n_parts: int = 8) -> csr_matrix:
        """Read about `n_rows` cells from `n_parts` stretches spread evenly over the file; a small file is read whole.

        Returns
        -------
        [about n_rows, features]; the first `n_rows` cells of a CSC file, where every stretch would cost a scan
        """
        if self.shape[0] <= n_rows:
            return self.rows(0, self.shape[0])
        if isinstance(self.content, CSCDataset):
            return self.rows(0, n_rows)
        size = max(1, n_rows // n_parts)
        starts = np.linspace(0, self.shape[0] - size, n_parts).astype(int)
        return csr_matrix(vstack([self.rows(start, start + size) for start in starts], format="csr"))

    def _rows_in_order(self, rows: np.ndarray) -> csr_matrix:
        """Read rows in any order. Neighbouring rows are read in stretches of at most a block.

        Scattered rows are read one by one if the layout allows it; otherwise all of each stretch is read.
        """
        is_rising = len(rows) < 2 or bool((np.diff(rows) > 0).all())
        is_scattered = not is_rising or (len(rows) and rows[-1] - rows[0] >= SCATTERED * len(rows))
        if is_scattered and self._all._file_rows is not None:
            return self._all._file_rows[rows]
        order = np.argsort(rows, kind="stable")
        rising, parts, at = rows[order], [csr_matrix((0, self.shape[1]), dtype=np.uint8)], 0
        while at < len(rising):
            first = rising[at]
            stop = int(np.searchsorted(rising, first + self.block_rows))
            block = self._all.rows(first, rising[stop - 1] + 1)
            wanted = rising[at:stop] - first
            parts.append(block if np.array_equal(wanted, np.arange(block.shape[0])) else block[wanted])
            at = stop
        whole = csr_matrix(vstack(parts))
        return whole if is_rising else whole[np.argsort(order)]

    @cached_property
    def _file_rows(self) -> FileRows | None:
        """The same matrix for scattered rows; None if it is stored in another layout."""
        if isinstance(self.content, CSRDataset):
            with suppress(ValueError):
                group = self.content.group
                dtype = np.float32 if group["data"].dtype == np.float16 else None
                return FileRows(group, self.path, dtype, "copy or download it again")
        return None

    def _rows_from_csr(self, start: int, stop: int) -> csr_matrix:
        group = self.content.group
        indptr = group["indptr"][start : stop + 1].astype(np.int64)
        entries = slice(indptr[0], indptr[-1])
        parts = (_without_half_precision(group["data"][entries]), group["indices"][entries], indptr - indptr[0])
        return csr_matrix(parts, shape=(stop - start, self.shape[1]))

    def _rows_from_csc(self, start: int, stop: int) -> csr_matrix:
        """Read rows of a matrix that is stored by features.

        The values of a cell are scattered over the whole file. So one scan collects several blocks of cells at once (a
        slab), and the next blocks come from the slab.
        """
        if self._slab is None or not (self._slab[0] <= start and stop <= self._slab[1]):
            last = min(max(stop, start + BLOCKS_PER_SCAN * self.block_rows), self.shape[0])
            self._slab = None  # frees the old slab before the next one is read
            self._slab = start, last, self._scan(start, last)
        first, _, slab = self._slab
        return slab[start - first : stop - first]

    def _scan(self, start: int, stop: int) -> csr_matrix:
        """Read all of a CSC file in pieces, and return rows `start` to `stop`."""
        group = self.content.group
        indptr, n_values = group["indptr"][:], group["data"].shape[0]
        if indptr[0] != 0 or indptr[-1] != n_values or (np.diff(indptr) < 0).any():
            raise ValueError("the column starts are not in order")
        rows, columns, values = [], [], []
        for first in range(0, n_values, BLOCK):
            index = group["indices"][first : first + BLOCK]
            if len(index) and (index.min() < 0 or index.max() >= self.content.shape[0]):
                raise ValueError("an entry lies outside the matrix")
            wanted = np.flatnonzero((index >= start) & (index < stop))
            rows.append(index[wanted] - start)
            # A value belongs to the last column that begins at or before it.
            columns.append((np.searchsorted(indptr, wanted + first, side="right") - 1).astype(np.int32))
            values.append(_without_half_precision(group["data"][first : first + BLOCK][wanted]))
        parts = [np.concatenate(part) if part else np.empty(0) for part in (values, rows, columns)]
        return csr_matrix((parts[0], (parts[1], parts[2])), shape=(stop - start, self.shape[1]))


def _without_half_precision(values):
    """Return half-precision values in single precision, because scipy cannot handle them; others stay as is."""
    return values.astype(np.float32) if values.dtype == np.float16 else values
