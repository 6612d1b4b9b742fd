"""Read tables of drug responses: ln IC50, the list of drugs, the annotation of cell lines."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import UserError, reading
from utils.evaluate.drug_response import Responses

PREFIX = "GDSC:"
"""Stands before a drug's number in the rows of DeepCDR's table."""
_TYPES = """
ALL BLCA BRCA CESC COAD/READ DLBC ESCA GBM HNSC KIRC LAML LCML LGG LIHC LUAD LUSC MESO MM NB OV PAAD SCLC SKCM STAD THCA
"""
TYPES = frozenset(_TYPES.split())
"""Cancer types (TCGA codes) of DeepCDR's published split."""


@dataclass
class DrugTable:
    """Responses of lines to drugs, and what was left out.

    Attributes
    ----------
    lines, drugs : names, as the numbers in `rows` count them
    rows : line, drug and ln IC50
    report : what was found and left out, one line each
    """

    lines: list[str]
    drugs: list[str]
    rows: Responses
    report: list[str] = field(default_factory=list)


def read_table(path: str | Path, **how) -> pd.DataFrame:
    """Read delimited text with pandas.

    Raises
    ------
    UserError
        If it cannot be read.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    with reading(path, "cannot be read as a table", "give delimited text with a line of names"):
        return pd.read_csv(path, **how)


def read_responses(
    path: str | Path,
    lines: list[str],
    drugs: list[str],
    drug_list_path: str | Path | None = None,
    annotation_path: str | Path | None = None,
) -> DrugTable:
    """Read a matrix of ln IC50 for the lines that have an embedding and the drugs that have a structure.

    Parameters
    ----------
    path : .csv of drugs × lines, or lines × drugs; empty where nothing was measured. Several rows may be of one drug
    lines : names of lines with an embedding
    drugs : ids of drugs with a structure
    drug_list_path : .csv with columns drug_id (the matrix' names, with or without GDSC: before them) and PubCHEM (the
        ids of the structures); None if the matrix' names are these ids
    annotation_path : tab-separated table with columns depMapID and tcga_code; lines of other types than DeepCDR's are
        left out

    Raises
    ------
    UserError
        If the matrix has none of the lines or none of the drugs, or holds text.
    """
    matrix = read_table(path, index_col=0)
    matrix.index, matrix.columns = matrix.index.astype(str), matrix.columns.astype(str)
    wordy = [column for column in matrix if not pd.api.types.is_numeric_dtype(matrix[column])]
    if wordy:
        raise UserError(f"{path}: column {wordy[0]!r} holds text; give ln IC50 alone, empty where it was not measured")
    structure, report = _structures(drugs, drug_list_path), []
    known_line, known_drug = set(lines), lambda names: np.array([_plain(name) in structure for name in names])
    in_columns, in_rows = (int(axis.isin(known_line).sum()) for axis in (matrix.columns, matrix.index))
    if in_rows > in_columns:
        matrix = matrix.T
        report.append("ln IC50: lines are the rows of the file; it was transposed")
    if not max(in_rows, in_columns):
        raise UserError(
            f"{path}: none of its rows ({', '.join(matrix.index[:2])}, …) and columns "
            f"({', '.join(matrix.columns[:2])}, …) is one of the {len(lines):,} lines with an embedding "
            f"({', '.join(lines[:2])}, …); give drugs × lines "
            "with the same names"
        )
    has_structure, has_line = known_drug(matrix.index), matrix.columns.isin(known_line)
    if not has_structure.any():
        raise UserError(
            f"{path}: none of its {len(matrix):,} drugs ({', '.join(matrix.index[:3])}) has a readable structure; give "
            "the same ids in --smiles_path, or --drug_list_path to translate them"
        )
    report.append(
        f"ln IC50: {len(matrix):,} drugs × {matrix.shape[1]:,} lines; {(~has_structure).sum():,} drugs without a "
        f"structure and {(~has_line).sum():,} lines without an embedding are left out"
    )
    matrix = matrix.loc[has_structure, has_line]
    if annotation_path:
        of_type = matrix.columns.isin(_typed_lines(annotation_path))
        report.append(f"{(~of_type).sum():,} lines of other cancer types than DeepCDR's are left out")
        matrix = matrix.loc[:, of_type]
    values = matrix.to_numpy(dtype=np.float64).T  # [lines, rows of drugs]
    line, row = np.nonzero(np.isfinite(values))
    if not len(line):
        raise UserError(
            f"{path}: has no value for these lines and drugs; give ln IC50, empty where it was not measured"
        )
    line_names, line_number = np.unique(matrix.columns.to_numpy(dtype=str)[line], return_inverse=True)
    ids = np.array([structure[_plain(name)] for name in matrix.index])
    drug_names, drug_number = np.unique(ids[row], return_inverse=True)
    rows = Responses(line_number, drug_number, values[line, row], len(line_names), len(drug_names))
    repeated = len(rows) - int((rows.table() > 0).sum())
    report.append(
        f"{len(rows):,} responses of {len(line_names):,} lines to {len(drug_names):,} drugs; {repeated:,} repeat a "
        "line and a drug, and stay on the side of the first"
    )
    return DrugTable(line_names.tolist(), drug_names.tolist(), rows, report)


def _plain(name: str) -> str:
    return name.removeprefix(PREFIX)


def _structures(drugs: list[str], path: str | Path | None) -> dict[str, str]:
    """Name in the matrix → id of its structure."""
    if not path:
        return {_plain(name): name for name in drugs}
    listed = read_table(path, dtype=str)
    _need(listed, path, "drug_id", "PubCHEM")
    known = set(drugs)
    return {_plain(name): pub for name, pub in zip(listed.drug_id, listed.PubCHEM, strict=True) if pub in known}


def _typed_lines(path: str | Path) -> set[str]:
    """Names of the lines whose cancer type is one of `TYPES`."""
    table = read_table(path, sep="\t", dtype=str)
    _need(table, path, "depMapID", "tcga_code")
    return set(table.depMapID[table.tcga_code.isin(TYPES)])


def _need(table: pd.DataFrame, path: str | Path, *columns: str) -> None:
    absent = [column for column in columns if column not in table]
    if absent:
        raise UserError(f"{path}: has no column {' and '.join(absent)}, only {', '.join(map(str, table.columns[:5]))}")
