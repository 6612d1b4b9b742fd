"""The short form of the fuzzing run, and the files that once found something."""

from tests.fuzz import fuzz

FOUND = ()
"""Numbers of files that were findings once."""


def test_broken_files_end_in_a_sentence(runs, tmp_path):
    (tmp_path / "new").mkdir()
    assert fuzz(tmp_path / "new", runs["celltype_atac"], first=0, number=120) == {}
