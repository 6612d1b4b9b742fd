"""Checkpoints of torch.save and the lists beside them, read without unpickling."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy._core.multiarray import scalar

from utils.errors import UserError
from utils.files.checkpoint import check_numbers_of, read_array, read_checkpoint, read_class_names, write_checkpoint
from utils.files.file_hash import file_hash


def test_what_is_written_is_read(tmp_path):
    whole = torch.arange(12.0).reshape(4, 3)
    tensors = {"a.weight": whole[1:3], "a.bias": whole.T.contiguous(), "n": torch.tensor(3)}
    write_checkpoint(tensors, tmp_path / "x.pth")
    found = read_checkpoint(tmp_path / "x.pth")
    assert {name: tensor.tolist() for name, tensor in found.tensors.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    assert found.sha256 == file_hash(tmp_path / "x.pth")
    assert found.tensors["a.weight"].untyped_storage().nbytes() == 6 * 4  # a part is written without the rest


def test_a_prefix_is_removed_only_if_all_names_have_it(tmp_path):
    for names, prefix in ((["module.a", "module.b"], "module."), (["module.a", "b"], "")):
        torch.save({name: torch.zeros(2) for name in names}, tmp_path / "x.pth")
        found = read_checkpoint(tmp_path / "x.pth", "module.")
        assert (sorted(found.tensors), found.prefix) == (sorted(name.removeprefix(prefix) for name in names), prefix)


def test_entries_beside_the_weights_are_named(tmp_path):
    others = {"optimizer_state_dict": {}, "epoch": 3, "loss": np.float64(0.3), "args": argparse.Namespace(lr=1e-4)}
    torch.save({"model_state_dict": {"a": torch.zeros(2)}} | others, tmp_path / "x.pth")
    assert read_checkpoint(tmp_path / "x.pth").others == sorted(others)


def test_a_numpy_object_is_not_unpickled(tmp_path):
    """numpy's scalars may hold pickled objects; those of numbers alone are read."""

    class Planted:
        def __reduce__(self):
            return scalar, (np.dtype("O"), Path("x"))

    torch.save({"model_state_dict": {"a": torch.zeros(2)}, "loss": Planted()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="could run code"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", ["sparse", "quantised", "complex"])
def test_tensors_of_other_layouts(kind, tmp_path):
    tensor = {
        "sparse": torch.eye(3).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "complex": torch.zeros(3, dtype=torch.complex64),
    }[kind]
    torch.save({"a": tensor}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth: a is "):
        check_numbers_of(read_checkpoint(tmp_path / "x.pth"), set())


def test_names_of_classes(tmp_path):
    (tmp_path / "labels.txt").write_text("\ufeffB cell\r\nCD4, T\n")
    assert read_class_names(tmp_path / "labels.txt") == ["B cell", "CD4, T"]
    np.save(tmp_path / "labels.npy", np.array(["B cell", "T cell"]))
    assert read_class_names(tmp_path / "labels.npy") == ["B cell", "T cell"]
    for content in (b"", b"a\n\nb\n", b"a\na\n", b"\xff\xfe\x00"):
        (tmp_path / "labels.txt").write_bytes(content)
        with pytest.raises(UserError, match=r"--labels .*labels\.txt"):
            read_class_names(tmp_path / "labels.txt")


def test_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(2))
    assert read_array(tmp_path / "a.npy", "--gene2vec").tolist() == [[1, 0], [0, 1]]
    (tmp_path / "b.npy").write_text("text")
    for name in ("b.npy", "absent.npy"):
        with pytest.raises(UserError, match=f"--gene2vec .*{name}"):
            read_array(tmp_path / name, "--gene2vec")
