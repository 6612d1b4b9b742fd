"""Matrices that are read in blocks of cells, whatever their layout: dense, CSR or CSC, in memory or in HDF5.

Blocks are CSR. However large the file, memory holds about `BLOCK` values of it at a time (while CSC is sorted, eight
times as many).
"""

from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
from anndata.abc import CSCDataset, CSRDataset
from anndata.io import sparse_dataset
from scipy.sparse import csc_matrix, csr_matrix, issparse, vstack

from utils.errors import reading
from utils.files.disk_rows import FileRows, Rows
from utils.files.row_copy import copy_of_blocks, copy_of_columns

BLOCK = 2**21
"""Values per block: some tens of megabytes with their indices and a copy."""
COPY_FROM = 2
"""Blocks of scattered rows after which a matrix that is stored in another layout is copied by rows."""
SCATTERED = 2
"""Rows that span more than this many times their number are read one by one."""
IN_MEMORY = 4
"""Blocks of a CSC file that are held in memory while it is sorted. A smaller file is read whole."""


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
        # The matrix in a layout whose rows can be read in any order, and how many such rows were asked for.
        self._by_rows: Rows | None = None
        self._scattered = 0
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
                block = self._all._in_any_order(0)[np.arange(start, stop)]
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
        [about n_rows, features]
        """
        if self.shape[0] <= n_rows:
            return self.rows(0, self.shape[0])
        size = max(1, n_rows // n_parts)
        starts = np.linspace(0, self.shape[0] - size, n_parts).astype(int)
        return csr_matrix(vstack([self.rows(start, start + size) for start in starts], format="csr"))

    def _rows_in_order(self, rows: np.ndarray) -> csr_matrix:
        """Read rows in any order. Neighbouring rows are read in stretches of at most a block.

        Scattered rows are read one by one if the layout allows it; otherwise all of each stretch is read.
        """
        is_rising = len(rows) < 2 or bool((np.diff(rows) > 0).all())
        is_scattered = not is_rising or (len(rows) and rows[-1] - rows[0] >= SCATTERED * len(rows))
        if is_scattered and (any_order := self._all._in_any_order(len(rows))) is not None:
            return any_order[rows]
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

    def _in_any_order(self, n_rows: int) -> Rows | None:
        """The same matrix for scattered rows, or None: then its blocks are read instead.

        What is stored by features is sorted by rows when rows are first asked for; other layouts are copied once
        `COPY_FROM` blocks of scattered rows were asked for.
        """
        if self._by_rows is None and self._file_rows is None:
            self._scattered += n_rows
            is_on_disk = not (issparse(self.content) or isinstance(self.content, np.ndarray))
            if isinstance(self.content, CSCDataset):
                self._by_rows = self._sorted()
            elif is_on_disk and self._scattered >= COPY_FROM * self.block_rows:
                self._by_rows = copy_of_blocks((block for _, block in self.blocks()), self.shape[1], self.path)
        return self._file_rows or self._by_rows

    def _sorted(self) -> Rows:
        """A matrix that is stored by features, sorted by rows: in memory if it is small, else on disk."""
        group = self.content.group
        if group["data"].shape[0] > IN_MEMORY * BLOCK:
            return copy_of_columns(self.content, self.path, IN_MEMORY * BLOCK)
        parts = _without_half_precision(group["data"][:]), group["indices"][:], group["indptr"][:]
        whole = csc_matrix(parts, shape=self.content.shape)
        whole.check_format(full_check=True)
        return csr_matrix(whole)

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


def _without_half_precision(values):
    """Return half-precision values in single precision, because scipy cannot handle them; others stay as is."""
    return values.astype(np.float32) if values.dtype == np.float16 else values
