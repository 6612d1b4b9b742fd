"""Hierarchies of types: read from files and columns, refused if impossible, and what the types of a set share."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from utils.cells.hierarchy import common_ancestors, read_hierarchy
from utils.errors import UserError

TYPES = ["B", "CD4", "CD8", "MK"]
PARENTS = {"B": "lymphocyte", "CD4": "T", "CD8": "T", "T": "lymphocyte"}


def cells(**columns):
    """Cells of all types; the last one is a test cell."""
    obs = pd.DataFrame(columns)
    label = lambda name: obs[name].where(obs[name] != "nan")
    return SimpleNamespace(obs=obs, path="cells.h5ad", labels=label, rows=lambda split: np.arange(len(obs) - 1))


def written(tmp_path, text: str) -> str:
    path = tmp_path / "tree.csv"
    path.write_text(text)
    return str(path)


def test_common_ancestors():
    sets = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]])
    found = common_ancestors(sets.astype(bool), TYPES, PARENTS)
    assert list(found) == ["B", "T", "lymphocyte", "lymphocyte", "cell", "", "T"]


def test_a_type_may_be_the_ancestor_of_another():
    found = common_ancestors(np.array([[True, True], [False, True]]), ["T", "CD4"], {"CD4": "T"})
    assert list(found) == ["T", "CD4"]


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("head", ["", "child{}parent\n", "# our own tree\n"])
def test_a_file(separator, head, tmp_path):
    lines = [("B", "lymphocyte"), ("CD4", "T"), ("CD8", "T"), ("T", "lymphocyte"), ("MK", "MK"), ("red", "blood")]
    text = head.format(separator) + "".join(f"{child}{separator}{parent}\n" for child, parent in lines)
    assert read_hierarchy(written(tmp_path, text), cells(), "cell_type", TYPES) == PARENTS


def test_quoted_names_may_hold_the_separator(tmp_path):
    source = written(tmp_path, '"B, naive",B\nB,B\n')
    assert read_hierarchy(source, cells(), "cell_type", ["B, naive"]) == {"B, naive": "B"}


def test_columns_from_fine_to_coarse():
    """Test cells do not count; a name that is the same in two columns is one type."""
    known = cells(
        cell_type=["B", "CD4", "CD8", "MK", "CD4", "CD4"],
        middle=["B", "T", "T", "MK", "T", "B"],
        coarse=["lymphocyte", "lymphocyte", "lymphocyte", "MK", "nan", "MK"],
    )
    for source in ("cell_type, middle, coarse", "middle,coarse"):
        assert read_hierarchy(source, known, "cell_type", TYPES) == PARENTS


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("B,L\nCD4,T\nCD8,T\nMK,L\nT,B\nB,T\n", ("'B'", "'L'", "'T'")),
        ("B,L\nL,M\nM,B\nCD4,L\nCD8,L\nMK,L\n", ("B → L → M → B",)),
        ("B,L\nCD4,T\n", ("2 of the 4", "'CD8'", "'MK'")),
        ("B\nCD4,T\n", ("row 1", "'B'")),
        ("B,\n", ("row 1",)),
        ("B,L,x\n", ("row 1", "B,L,x")),
        ("", ("4 of the 4",)),
    ],
)
def test_bad_files_are_refused(text, named, tmp_path):
    source = written(tmp_path, text)
    with pytest.raises(UserError) as error:
        read_hierarchy(source, cells(), "cell_type", TYPES)
    assert all(word in str(error.value) for word in ("--label_hierarchy", source, *named))


def test_bad_columns_are_refused():
    known = cells(cell_type=["B", "B", "CD4", "B"], lineage=["L", "M", "L", "L"])
    with pytest.raises(UserError, match="'B' two parents, 'L' and 'M'"):
        read_hierarchy("lineage", known, "cell_type", ["B", "CD4"])
    with pytest.raises(UserError, match="no column 'family'"):
        read_hierarchy("lineage,family", known, "cell_type", ["B", "CD4"])
