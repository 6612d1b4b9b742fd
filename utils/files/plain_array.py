"""Lists of numbers in an HDF5 file that are read without HDF5, by the operating system (`os.pread`).

An uncompressed dataset lies in the file as plain numbers, in chunks whose offsets HDF5 reports. One kind of compressed
dataset can be read in the same way: indices whose leading bytes are left out (`packing`).
"""

import os
import struct
from typing import TYPE_CHECKING

import numpy as np

from utils.errors import first_line

if TYPE_CHECKING:  # training on values in memory needs no HDF5
    import h5py

SCALE_OFFSET, SCALE_OFFSET_INT, FILL_VALUE_GIVEN = 6, 2, 2
"""HDF5's numbers for the filter, for its way to pack integers, and for a fill value that the writer has chosen."""
PACKED_BITS = (16, 24)
"""Bits per packed index."""
PACKED_HEADER = 21
"""Bytes before the numbers of a packed chunk: bits per number (4), size of what follows (1), smallest number (8), 0."""


def packing(n_features: int) -> dict:
    """Return how h5py should store the indices of that many features: in two or three bytes, instead of four.

    HDF5's own scale-offset filter does it, so every program reads 32-bit numbers as before (with 16-bit ones in
    memory, scipy fails in places). In a chunk, the filter stores how far each number lies above the smallest one, in a
    fixed number of bits, the highest first; whole bytes can therefore be read without HDF5. All bits set stand for the
    fill value, which is no index here.

    Parameters
    ----------
    n_features : columns of the matrix
    """
    bits = next((bits for bits in PACKED_BITS if n_features < 2**bits), None)
    return {"scaleoffset": bits, "fillvalue": -1} if bits else {}


def _packed_bits(filters: list[tuple], dtype: np.dtype) -> int:
    """Return the bits per number if a dataset of this dtype was stored by `packing`, else 0."""
    if [code for code, *_ in filters] != [SCALE_OFFSET] or dtype != np.int32:
        return 0
    kind, bits = filters[0][2][:2]
    return bits if kind == SCALE_OFFSET_INT and bits in PACKED_BITS else 0


class PlainArray:
    """A one-dimensional HDF5 dataset that is read without HDF5: plain numbers, or packed indices (see `packing`).

    Parameters
    ----------
    dataset : of integers or floats

    Attributes
    ----------
    dtype, size : those of the dataset
    stored_bytes : bytes of each number in the file, fewer than its dtype has if it is packed
    chunk_size : values per chunk; a contiguous dataset is a single chunk
    chunk_offsets : [chunks] where in the file the numbers of each chunk begin, in bytes; -1 for a chunk that is not
        stored, whose values are all the dataset's fill value

    Raises
    ------
    ValueError
        If the dataset is compressed, incomplete, or stored in another way.
    """

    def __init__(self, dataset: "h5py.Dataset"):
        self.dtype, self.size = dataset.dtype, int(dataset.shape[0])
        if dataset.ndim != 1 or self.dtype.kind not in "iuf" or not self.dtype.isnative:
            raise ValueError("not a list of plain numbers")
        layout = dataset.id.get_create_plist()
        has_fill = layout.fill_value_defined() == FILL_VALUE_GIVEN
        self._fill = dataset.fillvalue.tobytes() if has_fill else b""
        filters = [layout.get_filter(i) for i in range(layout.get_nfilters())]
        bits = _packed_bits(filters, self.dtype) if has_fill and dataset.fillvalue == -1 else 0
        if (filters and not bits) or dataset.is_virtual:  # filters compress or checksum; a virtual dataset is elsewhere
            raise ValueError("not stored as plain numbers")
        self.is_packed, self.stored_bytes = bits > 0, bits // 8 or self.dtype.itemsize
        if dataset.chunks is None:
            self.chunk_size, offset = max(self.size, 1), dataset.id.get_offset()
            if offset is None:
                raise ValueError("not stored in the file")
            self.chunk_offsets = np.array([offset])
        else:
            self.chunk_size = dataset.chunks[0]
            self.chunk_offsets = np.full(-(-self.size // self.chunk_size), -1, dtype=np.int64)
            found = []  # filled by chunk_iter, which calls a function for each chunk
            dataset.id.chunk_iter(
                lambda chunk: found.append((chunk.chunk_offset[0], chunk.byte_offset, chunk.filter_mask))
            )
            for first_value, offset, skipped_filters in found:
                if skipped_filters:
                    raise ValueError("some of its chunks are not packed")
                self.chunk_offsets[first_value // self.chunk_size] = offset + self.is_packed * PACKED_HEADER
            if (self.chunk_offsets < 0).any() and (self.is_packed or not has_fill):
                raise ValueError("some of its chunks are missing")
        self._smallest = np.full(len(self.chunk_offsets), -1, dtype=np.int32)  # of a packed chunk, once it is read
        if self.size and (self.is_packed or dataset.file.userblock_size):
            self._check_against_hdf5(dataset)

    def _check_against_hdf5(self, dataset: "h5py.Dataset") -> None:
        """Raise ValueError unless the first and the last chunk hold what HDF5 reads there.

        Before the HDF5 data, mudata writes a block of 512 bytes. Some versions of HDF5 left it out of the offsets.
        """
        last = (len(self.chunk_offsets) - 1) * self.chunk_size
        with open(dataset.file.filename, "rb") as file:
            for value in (0, last):
                stop = min(value + 64, self.size)
                try:
                    is_same = self.read(file.fileno(), [(value, stop)]).tobytes() == dataset[value:stop].tobytes()
                except OSError as error:
                    raise ValueError(first_line(error)) from error
                if not is_same:
                    raise ValueError("not stored where HDF5 says, or in another way")

    def byte_ranges(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return (chunk, offset, length) of each stretch of the file that holds values `start` to `stop`, in bytes.

        The offset is negative if the chunk is not stored.
        """
        found = []
        while start < stop:
            number, first = divmod(start, self.chunk_size)
            n, offset = min(stop - start, self.chunk_size - first), int(self.chunk_offsets[number])
            found.append((number, -1 if offset < 0 else offset + first * self.stored_bytes, n * self.stored_bytes))
            start += n
        return found

    def read(self, file: int, spans: list[tuple[int, int]]) -> np.ndarray:
        """Read stretches of values, and return them one after another.

        Parameters
        ----------
        file : descriptor of the open file
        spans : of each stretch the first value, and the one after the last

        Raises
        ------
        ValueError
            If the file is too short or damaged.
        """
        pieces = [piece for start, stop in spans for piece in self.byte_ranges(start, stop)]
        # Numbers of three bytes are read as ones of four, so the first needs another byte before it.
        lead, n = bytearray(self.stored_bytes == 3), sum(stop - start for start, stop in spans)
        whole = bytearray().join(
            [lead]
            + [
                os.pread(file, length, offset) if offset >= 0 else self._fill * (length // self.stored_bytes)
                for _, offset, length in pieces
            ]
        )
        if len(whole) - len(lead) != n * self.stored_bytes:
            raise ValueError("the file ends too early")
        if not self.is_packed:
            return np.frombuffer(whole, self.dtype)
        numbers = np.ndarray(n, ">i4" if lead else ">u2", whole, strides=(self.stored_bytes,)).astype(np.int32)
        if lead:
            numbers &= 0xFFFFFF  # the first of the four bytes belongs to the number before
        chunks = np.array([number for number, _, _ in pieces], dtype=np.int64)
        self._read_smallest(file, chunks)
        lengths = np.array([length for *_, length in pieces], dtype=np.int64)
        numbers += np.repeat(self._smallest[chunks], lengths // self.stored_bytes)
        return numbers

    def _read_smallest(self, file: int, chunks: np.ndarray) -> None:
        """Read the smallest number of packed chunks, from which their numbers are counted, unless it is known."""
        for number in np.unique(chunks[self._smallest[chunks] < 0]):
            header = os.pread(file, PACKED_HEADER, int(self.chunk_offsets[number]) - PACKED_HEADER)
            bits, size, smallest = struct.unpack_from("<IBQ", header)
            if bits != 8 * self.stored_bytes or size != 8 or smallest > np.iinfo(np.int32).max:
                raise ValueError("some of its chunks are packed in another way")
            self._smallest[number] = smallest
