"""Hierarchies of cell types: each type has at most one parent, up to the types at the top."""

import csv
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import UserError, reading

TOP = "cell"
"""What types have in common that share no ancestor in the hierarchy; the root of the Cell Ontology has this name."""
HEADER = ("child", "parent")
FLAG = "--label_hierarchy"


def read_hierarchy(source: str, cells, label_column: str, types: list[str]) -> dict[str, str]:
    """Read a hierarchy of types from a file or from columns of obs.

    Parameters
    ----------
    source : a file with a child and its parent per line, separated by a comma or a tab (a line `child, parent` may come
        first, lines that start with # are left out, and a type without a parent names itself), or columns of obs from
        fine to coarse, separated by commas
    cells : utils.cells.preprocessed.Cells; in columns, the labels of training cells count
    label_column : column of obs with the types; it comes before the columns of `source`, if these do not name it
    types : the model's types, which the hierarchy must hold

    Returns
    -------
    child → parent, of the types and their ancestors alone

    Raises
    ------
    UserError
        If there is no such file or column, a child has two parents or is its own ancestor, or a type is missing.
    """
    if Path(source).is_file():
        pairs, where = _pairs_of_file(Path(source)), source
    else:
        pairs, where = _pairs_of_columns(source, cells, label_column), str(cells.path)
    parents: dict[str, str] = {}
    for child, parent in pairs:
        if child != parent and parents.setdefault(child, parent) != parent:
            raise UserError(
                f"{FLAG} {source}: {where} gives {child!r} two parents, {parents[child]!r} and {parent!r}; keep one"
            )
    known = {name for pair in pairs for name in pair}
    if missing := [name for name in types if name not in known]:
        named = ", ".join(map(repr, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise UserError(
            f"{FLAG} {source}: lacks {len(missing)} of the {len(types)} types in {label_column} ({named}); give each "
            "of them a parent, or itself if it has none"
        )
    kept: dict[str, str] = {}
    for name in types:
        path = [name]
        while (parent := parents.get(path[-1])) is not None:
            if parent in path:
                circle = " → ".join([*path[path.index(parent) :], parent])
                raise UserError(f"{FLAG} {source}: has a cycle, {circle}; remove one of these lines")
            kept[path[-1]] = parent
            path.append(parent)
    return kept


def _pairs_of_file(path: Path) -> list[tuple[str, str]]:
    """Children and parents of a file's lines."""
    with reading(path, "is not a text file", "give a .csv or .tsv with a child and its parent per line"):
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("#")]
    delimiter = "\t" if any("\t" in line for line in lines) else ","
    rows = [[word.strip() for word in row] for row in csv.reader(lines, delimiter=delimiter)]
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or not all(row):
            raise UserError(
                f"{FLAG} {path}: row {number}, {delimiter.join(row)!r}, does not hold a child and its parent; give two "
                "columns separated by a comma or a tab, with quotes around names that hold one"
            )
    if rows and tuple(word.lower() for word in rows[0]) == HEADER:
        rows = rows[1:]
    return [(child, parent) for child, parent in rows]


def _pairs_of_columns(source: str, cells, label_column: str) -> list[tuple[str, str]]:
    """Children and parents of the training cells' labels, in columns from fine to coarse."""
    columns = [name.strip() for name in source.split(",")]
    if label_column not in columns:
        columns = [label_column, *columns]
    if absent := [name for name in columns if name not in cells.obs]:
        raise UserError(
            f"{FLAG} {source}: is no file, and {cells.path} has no column {absent[0]!r} in obs, only "
            f"{', '.join(map(str, cells.obs.columns))}"
        )
    labels = pd.DataFrame({name: cells.labels(name).iloc[cells.rows("train")] for name in columns})
    pairs: list[tuple[str, str]] = []
    for finer, coarser in pairwise(columns):
        pairs += labels[[finer, coarser]].dropna().drop_duplicates().itertuples(index=False, name=None)
    return pairs


def check_hierarchy(parents: dict[str, str]) -> None:
    """Raise ValueError unless each type leads to the top."""
    if not all(isinstance(name, str) for pair in parents.items() for name in pair):
        raise ValueError("the hierarchy of types is not a table of names")
    for name in parents:
        ancestors_of(name, parents)


def ancestors_of(name: str, parents: dict[str, str]) -> list[str]:
    """Return a type and its ancestors, from fine to coarse."""
    path = [name]
    while (parent := parents.get(path[-1])) is not None:
        if parent in path:
            raise ValueError(f"the hierarchy of types has a cycle at {parent}")
        path.append(parent)
    return path


def common_ancestors(sets: np.ndarray, types: list[str], parents: dict[str, str]) -> np.ndarray:
    """Return the lowest common ancestor of each set of types, [cells] object.

    A set of one type has that type itself, and one of a type and its ancestor has the ancestor. Types without a common
    ancestor have `TOP`, and an empty set has none ("").

    Parameters
    ----------
    sets : [cells, types] bool
    types : names of the types
    parents : child → parent
    """
    paths = [ancestors_of(name, parents) for name in types]
    # Cells share few different sets: each set is one row of bits.
    different, cell = np.unique(np.packbits(sets, axis=1), axis=0, return_inverse=True)
    names = []
    for bits in np.unpackbits(different, axis=1, count=len(types)).astype(bool):
        members = [paths[number] for number in np.flatnonzero(bits)]
        shared = [name for name in members[0] if all(name in path for path in members[1:])] if members else [""]
        names.append(shared[0] if shared else TOP)
    return np.array(names, dtype=object)[np.ravel(cell)]
