"""Reads lists of genes: those of a model folder, a list or another file to which cells are aligned, or classes."""

import re
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from models.shapes import FEATURES
from utils.errors import UserError, reading
from utils.features.gene_ids import name_genes, share_known, translate
from utils.files.open_any import open_file

HEADERS = {"", "x", "gene", "genes", "symbol", "symbols", "name", "names", "id", "gene_name", "gene_symbol", "gene_id"}
"""Header words accepted in a list of genes."""


def read_reference(path: str | Path, flag: str = "--gene_reference") -> dict[str, np.ndarray]:
    """Read the vocabularies of a model folder, or the genes of a text file (one per line) or an .h5ad.

    Parameters
    ----------
    path : value of the flag
    flag : the flag, for messages

    Returns
    -------
    modality → names; a model folder's are unchanged, others are updated to current human symbols

    Raises
    ------
    UserError
        If there is no such file, or it names no gene.
    """
    path = Path(path)
    flag = f"{flag} {path}"
    vocabularies = {modality: path / f"{features}.txt" for modality, features in FEATURES.items()}
    found = {modality: file for modality, file in vocabularies.items() if file.is_file()}
    remedy = "give a model folder, a text file (a gene per line) or an .h5ad"
    if path.is_dir() and not found:
        raise UserError(f"{flag}: this folder has no genes.txt; {remedy}")
    if not path.is_file() and not found:
        raise UserError(f"{flag}: no such file; {remedy}")
    with reading(flag, "cannot be read", remedy):
        if found:
            names = {modality: file.read_text(encoding="utf-8").splitlines() for modality, file in found.items()}
        elif h5py.is_hdf5(path):
            sources = open_file(path)[1]
            matrix_vars = [var for _, var in sources["rna"].matrices.values()] if "rna" in sources else []
            names = {"rna": name_genes(matrix_vars[0]).symbols if matrix_vars else []}
        else:
            names = {"rna": _listed_genes(path.read_text(encoding="utf-8"))}
    if not all(len(listed) for listed in names.values()):
        raise UserError(f"{flag}: holds no gene; {remedy}")
    return {modality: np.array(list(dict.fromkeys(map(str, listed)))) for modality, listed in names.items()}


def _listed_genes(text: str) -> list[str]:
    """Return the symbols in a list (one per line) or in a table's column with the most known ids, without a header."""
    rows = [[field.strip(' "') for field in re.split(r"[\t,;]", line)] for line in text.splitlines() if line.strip()]
    if not rows:
        return []
    columns = [[row[i] for row in rows if len(row) > i] for i in range(len(rows[0]))]
    ids = max(columns, key=share_known)
    if ids[0].lower() in HEADERS and not share_known(ids[:1]):
        ids = ids[1:]
    return [symbol for symbol in translate(ids).symbols if symbol]


def read_gene_lists(paths: str, flag: str) -> dict[str, np.ndarray]:
    """Read classes of genes.

    Parameters
    ----------
    paths : a .csv or .tsv with a class per column, or paths of text files with a class each, separated by commas
    flag : the flag, for messages

    Returns
    -------
    class (header of the column, or name of the file) → symbols, human ones updated

    Raises
    ------
    UserError
        If a file cannot be read, or holds no gene.
    """
    files = [Path(path) for path in paths.split(",")]
    if len(files) > 1 or files[0].suffix not in (".csv", ".tsv"):
        return {file.stem: read_reference(file, flag)["rna"] for file in files}
    with reading(f"{flag} {paths}", "is not a table of genes", "give a .csv with a column of genes for each class"):
        separator = "\t" if files[0].suffix == ".tsv" else ","
        table = pd.read_csv(files[0], sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    listed = {str(name): [gene.strip() for gene in table[name] if gene.strip()] for name in table}
    listed = {name: translate(genes).symbols for name, genes in listed.items() if genes}
    if not listed:
        raise UserError(f"{flag} {paths}: holds no gene; give a .csv with a column of genes for each class")
    return listed
