"""Reads lists of genes and peaks: of a model folder, a list or another file, to align cells to; or classes of genes."""

import re
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from models.shapes import FEATURES
from utils.errors import UserError, reading
from utils.features.gene_ids import name_genes, share_known, translate
from utils.features.peaks import format_peaks, parse_peaks
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
            listed = translate(_listed_genes(path.read_text(encoding="utf-8-sig"))).symbols
            names = {"rna": [symbol for symbol in listed if symbol]}
    if not all(len(listed) for listed in names.values()):
        raise UserError(f"{flag}: holds no gene; {remedy}")
    return {modality: np.array(list(dict.fromkeys(map(str, listed)))) for modality, listed in names.items()}


def _listed_genes(text: str) -> list[str]:
    """Return the ids in a list (one per line) or in a table's column with the most known ids, without a header."""
    rows = [[field.strip(' "') for field in re.split(r"[\t,;]", line)] for line in text.splitlines() if line.strip()]
    if not rows:
        return []
    columns = [[row[i] for row in rows if len(row) > i] for i in range(len(rows[0]))]
    ids = max(columns, key=share_known)
    if ids[0].lower() in HEADERS and not share_known(ids[:1]):
        ids = ids[1:]
    return ids


def read_order(path: str | Path, modality: str, flag: str) -> np.ndarray:
    """Read the names of a published model's genes or peaks, which belong to its weights by their order.

    Parameters
    ----------
    path : a text file with a gene or a peak per line (also .bed), a file of cells, or a model folder
    modality : rna or atac
    flag : the flag that named it, for messages

    Returns
    -------
    [n] names, each of them once: genes by their current human symbols, except where another gene of the list already
    has that symbol; peaks as chr1:10-20

    Raises
    ------
    UserError
        If the file cannot be read, holds no such names, or one of them twice.
    """
    path, what = Path(path), FEATURES[modality]
    listing, flag = path / f"{what}.txt", f"{flag} {path}"
    if listing.is_file():
        return np.array(listing.read_text(encoding="utf-8").splitlines())
    remedy = f"give the list that the model was trained on, one of its {what} on each line, or a file of such cells"
    if not path.is_file():
        raise UserError(f"{flag}: no such file; {remedy}")
    var = None
    with reading(flag, "cannot be read", remedy):
        if h5py.is_hdf5(path):
            sources = open_file(path)[1]
            if modality not in sources:
                raise UserError(f"{flag}: has no {what}; {remedy}")
            _, var = next(iter(sources[modality].matrices.values()))
            ids = list(map(str, var.index))
        else:
            text = path.read_text(encoding="utf-8-sig")
            ids = _listed_genes(text) if modality == "rna" else _listed_peaks(text)
    if not ids:
        raise UserError(f"{flag}: names none of the {what}; {remedy}")
    try:
        names = np.array(ids) if modality == "rna" else format_peaks(parse_peaks(ids, var))
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    if len(twice := names[pd.Series(names).duplicated()]):
        raise UserError(f"{flag}: names {twice[0]} twice; {remedy}")
    return _current_symbols(ids) if modality == "rna" else names


def _listed_peaks(text: str) -> list[str]:
    """Return the intervals of a .bed file, or names of peaks from a list, a line each, as names."""
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith(("#", "track", "browser")))
    fields = (line.split() for line in lines)
    return ["{}:{}-{}".format(*words) if len(words) > 2 else words[0].strip('"') for words in fields]


def _current_symbols(ids: list[str]) -> np.ndarray:
    """Update symbols, but none to a symbol that another gene has, so that all stay different."""
    symbols = translate(ids).symbols
    taken = {gene for gene, symbol in zip(ids, symbols, strict=True) if gene == symbol}
    names = []
    for gene, symbol in zip(ids, map(str, symbols), strict=True):
        name = gene if symbol in taken else symbol or gene
        taken.add(name)
        names.append(name)
    return np.array(names)


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
