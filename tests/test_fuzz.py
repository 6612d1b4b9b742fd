"""The short form of the fuzzing run, and the files that once found something."""

import pytest

from tests.fuzz import fuzz

FOUND = (10109, 10779, 11101, 11337, 11657, 11732, 11748, 12124)
"""Numbers of files that were findings once: entries outside a matrix, damaged HDF5 (two on which it never ends), a gene
twice in a model."""


def test_broken_files_end_in_a_sentence(runs, tmp_path):
    (tmp_path / "new").mkdir()
    assert fuzz(tmp_path / "new", runs["celltype_atac"], first=0, number=120) == {}


@pytest.mark.parametrize("number", FOUND)
def test_what_was_found_once(number, runs, tmp_path):
    assert fuzz(tmp_path, runs["celltype_atac"], first=number, number=1) == {}
