"""Numbers read past HDF5 equal those that HDF5 reads, also packed ones and ones that take no space."""

import h5py
import numpy as np
import pytest

from utils.files.plain_array import PACKED_HEADER, PlainArray, packing


def read(path, spans):
    with h5py.File(path) as file:
        plain = PlainArray(file["x"])
    with open(path, "rb") as file:
        return plain.read(file.fileno(), spans)


def test_values_that_cross_chunks_are_read(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        plain = PlainArray(file.create_dataset("x", data=np.arange(25, dtype=np.int32), chunks=(10,)))
        file.flush()
    assert [length for *_, length in plain.byte_ranges(5, 22)] == [20, 40, 8]
    with open(tmp_path / "x.h5", "rb") as file:
        np.testing.assert_array_equal(plain.read(file.fileno(), [(5, 22), (3, 4)]), [*range(5, 22), 3])


def packed(path, values, n_features, chunk=50):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=values.astype(np.int32), chunks=(chunk,), **packing(n_features))
    return path


@pytest.mark.parametrize(
    "n_features, n_bytes",
    [(5, 2), (2**15 + 1, 2), (2**16 - 1, 2), (2**16, 3), (400_000, 3), (2**24 - 1, 3), (2**24, 4), (2**30, 4)],
)
def test_packed_indices_equal_those_of_hdf5(tmp_path, n_features, n_bytes):
    """At the ends of what two and three bytes hold, and in chunks whose smallest index is not 0."""
    values = np.sort(np.random.default_rng(0).integers(0, n_features, (25, 31)), axis=1).ravel()
    values[:2], values[-3:] = (0, n_features - 1), (n_features - 1, 0, n_features - 1)
    values[100:150] = n_features - 1  # the whole of a chunk
    path = packed(tmp_path / "x.h5", values, n_features)
    with h5py.File(path) as file:
        assert file["x"].dtype == np.int32
        np.testing.assert_array_equal(file["x"][:], values)
        plain = PlainArray(file["x"])
        assert plain.stored_bytes == n_bytes
        assert file["x"].id.get_storage_size() <= 16 * (50 * n_bytes + PACKED_HEADER + 1)
    spans = [(0, 775), (3, 3), (700, 775), (99, 151), (774, 775)]
    found = read(path, spans)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.concatenate([values[slice(*span)] for span in spans]))
    assert read(path, []).shape == read(path, [(7, 7)]).shape == (0,)


@pytest.mark.parametrize("n_features", [1000, 400_000])
def test_a_damaged_packed_chunk_is_refused(tmp_path, n_features):
    path = packed(tmp_path / "x.h5", np.arange(500), n_features)
    with h5py.File(path) as file:
        plain, chunk = PlainArray(file["x"]), file["x"].id.get_chunk_info(4)
    with open(path, "r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\x07")  # another number of bits
        file.flush()
        np.testing.assert_array_equal(plain.read(file.fileno(), [(150, 199)]), np.arange(150, 199))
        with pytest.raises(ValueError, match="packed in another way"):
            plain.read(file.fileno(), [(190, 210)])
        file.truncate(chunk.byte_offset + 30)
        with pytest.raises(ValueError, match="too early"):
            plain.read(file.fileno(), [(190, 240)])


@pytest.mark.parametrize(
    "options",
    [
        {"scaleoffset": 16},  # its fill value is 0, which is packed as 65,535
        {"scaleoffset": 0, "fillvalue": -1},
        {"scaleoffset": 12, "fillvalue": -1},
        {"scaleoffset": 16, "fillvalue": -1, "compression": "gzip"},
        {"compression": "gzip", "fillvalue": -1},
    ],
    ids=str,
)
def test_other_filters_are_refused(tmp_path, options):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", data=np.arange(100, dtype=np.int32), chunks=(10,), **options)
        with pytest.raises(ValueError, match="plain"):
            PlainArray(dataset)


def test_chunks_that_are_not_stored_hold_the_fill_value(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", (95,), np.float32, chunks=(10,), fillvalue=1.5)
        dataset[33:41] = np.arange(8)
        expected = dataset[:]
    np.testing.assert_array_equal(read(tmp_path / "x.h5", [(0, 95)]), expected)
    np.testing.assert_array_equal(read(tmp_path / "x.h5", [(94, 95), (28, 35)]), expected[[94, *range(28, 35)]])
    with h5py.File(tmp_path / "y.h5", "w") as file:  # nobody has chosen a value for these
        dataset = file.create_dataset("x", (95,), np.float32, chunks=(10,))
        dataset[33:41] = 1
        with pytest.raises(ValueError, match="missing"):
            PlainArray(dataset)
