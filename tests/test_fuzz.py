"""The short form of the fuzzing run, and the files that once found something."""

import os
import signal
import time

import h5py
import pytest

from tests.fuzz import fuzz
from utils.data import probe

FOUND = (4536, 9844, 10109, 10779, 11101, 11337, 11657, 11732, 11748, 12124)
"""Numbers of files that were findings once: options no model has, names no terminal can show, entries outside a matrix,
damaged HDF5 (on two of them it never ends), a gene twice in a model."""


def test_broken_files_end_in_a_sentence(runs, tmp_path):
    (tmp_path / "new").mkdir()
    assert fuzz(tmp_path / "new", runs["celltype_atac"], first=0, number=120) == {}


@pytest.mark.parametrize("number", FOUND)
def test_what_was_found_once(number, runs, tmp_path):
    assert fuzz(tmp_path, runs["celltype_atac"], first=number, number=1) == {}


@pytest.fixture
def hdf5(tmp_path):
    with h5py.File(tmp_path / "cells.h5ad", "w") as file:
        file["names"] = ["a", "b"]
    return tmp_path / "cells.h5ad"


def test_a_file_that_crashes_or_stops_the_library_is_told(hdf5, monkeypatch):
    assert probe.ends(hdf5)
    monkeypatch.setattr(probe, "_look_through", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    assert not probe.ends(hdf5)
    monkeypatch.setattr(probe, "_look_through", lambda path: time.sleep(60))
    monkeypatch.setattr(probe, "SECONDS", 0.2)
    start = time.monotonic()
    assert not probe.ends(hdf5)
    assert time.monotonic() - start < 5


def test_a_file_with_an_error_is_left_to_the_reader(tmp_path):
    (tmp_path / "text.h5ad").write_text("no cells")
    assert probe.ends(tmp_path / "text.h5ad")
