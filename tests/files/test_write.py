"""Files are written completely or not at all, and a failure is reported once."""

import gc
import sys

import pytest

from utils.errors import DiskFullError
from utils.files.write import whole_file


class FailsWhenFreed:
    """An object whose destructor raises, like an HDF5 handle of a file that could not be finished."""

    def __init__(self, message: str):
        self.message = message

    def __del__(self):
        raise RuntimeError(self.message)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "cells.h5ad"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["cells.h5ad"]
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["cells.h5ad"]


def test_only_messages_about_the_unfinished_file_are_silent(tmp_path, monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(str(unraisable.exc_value)))
    with pytest.raises(DiskFullError, match=r"cells\.h5ad"), whole_file(tmp_path / "cells.h5ad") as partial:
        FailsWhenFreed(f"file write failed, filename = '{partial}'")
        FailsWhenFreed("another file")
        gc.collect()
        raise OSError(28, "No space left on device")
    FailsWhenFreed("after the block")
    gc.collect()
    assert printed == ["another file", "after the block"]
