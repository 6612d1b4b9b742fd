"""The short form of the fuzzing run, and the files that once found something."""

import os
import signal
import time

import h5py
import pytest

from tests.fuzz import fuzz
from utils.cells.preprocessed import read_raw
from utils.errors import UserError
from utils.files import open_any

FOUND = (4536, 9844, 10109, 10779, 11101, 11337, 11657, 11732, 11748, 12124)
"""Numbers of files that were findings once: options no model has, names no terminal can show, entries outside a matrix,
damaged HDF5 (on two of them it never ends), a gene twice in a model."""


@pytest.mark.slow
def test_broken_files_end_in_a_message(runs, tmp_path):
    (tmp_path / "new").mkdir()
    assert fuzz(tmp_path / "new", runs["celltype_atac"], first=0, number=120) == {}


@pytest.mark.parametrize("number", FOUND)
def test_files_that_were_findings_once(number, runs, tmp_path):
    assert fuzz(tmp_path, runs["celltype_atac"], first=number, number=1) == {}


@pytest.fixture
def hdf5(tmp_path):
    with h5py.File(tmp_path / "cells.h5ad", "w") as file:
        file["names"] = ["a", "b"]
    return tmp_path / "cells.h5ad"


def test_a_file_that_crashes_the_library_is_damaged(hdf5, monkeypatch):
    assert open_any.hdf5_problem(hdf5) is None
    monkeypatch.setattr(open_any, "_read_names_and_text", lambda path, allow: os.kill(os.getpid(), signal.SIGKILL))
    assert "damaged" in open_any.hdf5_problem(hdf5)


@pytest.mark.alone
def test_a_file_on_which_the_library_never_ends_is_not_called_damaged(hdf5, monkeypatch):
    def forever(path, allow):
        allow(0)
        while True:
            pass

    monkeypatch.setattr(open_any, "_read_names_and_text", forever)
    monkeypatch.setattr(open_any, "CHECK_SECONDS", 0.2)
    start = time.monotonic()
    assert "too long" in open_any.hdf5_problem(hdf5)
    assert time.monotonic() - start < 8
    with pytest.raises(UserError) as error:
        read_raw(hdf5)
    assert f"{hdf5}: " in str(error.value) and "too long" in str(error.value)
    assert "damaged" not in str(error.value)


@pytest.mark.alone
def test_a_slow_file_is_waited_for(hdf5, monkeypatch):
    """A busy disk, a busy neighbour: waiting is not computing. And a file with much in it gets on, item by item."""
    monkeypatch.setattr(open_any, "CHECK_SECONDS", 0.3)
    look = open_any._read_names_and_text
    monkeypatch.setattr(
        open_any, "_read_names_and_text", lambda path, allow: (allow(0), time.sleep(0.6), look(path, allow))
    )
    assert open_any.hdf5_problem(hdf5) is None

    def many(path, allow):
        for _ in range(5):
            allow(0)
            end = time.process_time() + 0.15
            while time.process_time() < end:
                pass

    monkeypatch.setattr(open_any, "_read_names_and_text", many)
    assert open_any.hdf5_problem(hdf5) is None


def test_a_file_with_an_error_is_left_to_the_reader(tmp_path):
    (tmp_path / "text.h5ad").write_text("no cells")
    assert open_any.hdf5_problem(tmp_path / "text.h5ad") is None
