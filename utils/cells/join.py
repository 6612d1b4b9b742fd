"""Join several files of cells with RNA: one list of cells, one list of genes, and a column that names each cell's file.

Each file is ingested alone, by its own ids and values. Then the columns of all files are placed in the union of their
genes, so that the files can be written one after the other, a block of cells at a time.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from utils.cells.annotation import as_category
from utils.cells.ingest import Ingested, count, listed
from utils.cells.preprocessed import RawFile, open_cells, read_raw
from utils.errors import UserError
from utils.files.file_hash import file_hash

MANY_CLASHES = 0.5
"""If a larger share of a file's barcodes is in another file as well, the two may hold the same cells."""


def open_files(
    data_path: str | None, rna_path: str | None, atac_path: str | None, batch_column: str = "batch"
) -> RawFile:
    """Open what the flags name: one file, the two files of paired cells, or several files to join.

    Parameters
    ----------
    data_path, rna_path, atac_path : the flags; several files in --data_path are separated by commas
    batch_column : name of the column of obs that gets the name of each cell's file, if there are several

    Raises
    ------
    UserError
        If the flags contradict each other, or a file cannot be read or joined.
    """
    for flag, path in (("--rna_path", rna_path), ("--atac_path", atac_path)):
        if path and "," in path and not Path(path).exists():
            raise UserError(f"{flag} {path}: name one file here; only --data_path joins several, for RNA")
    paths = [part.strip() for part in (data_path or "").split(",")]
    if len(paths) == 1 or rna_path or atac_path or Path(data_path).exists():
        return open_cells(data_path, rna_path, atac_path)
    if not all(paths):
        raise UserError(f"--data_path {data_path}: names an empty path; separate the files by single commas")
    return read_several([Path(path) for path in paths], batch_column)


def read_several(paths: Sequence[Path], batch_column: str) -> RawFile:
    """Open several raw files with RNA, as one list of cells in the order of the files.

    A barcode that is in more than one file gets the name of its file as an ending.

    Parameters
    ----------
    paths : at least two files or folders
    batch_column : name of the column of obs that gets the name of each cell's file

    Raises
    ------
    UserError
        If a file is named twice, cannot be read, is preprocessed, holds peaks, or has the batch column already.
    """
    _check_different(paths)
    files = [read_raw(path) for path in paths]
    for file in files:
        if file.stamp is not None:
            raise UserError(f"{file.path}: is preprocessed already; give the raw file to join it with others")
        if list(file.modalities) != ["rna"]:
            raise UserError(
                f"{file.path}: holds {' and '.join(file.modalities)}, but several files of --data_path are joined for "
                "RNA only; preprocess files with ATAC one by one"
            )
        if batch_column in file.obs:
            raise UserError(
                f"--batch_column {batch_column}: {file.path} has such a column in obs already; name another one for "
                "the files, like --batch_column file"
            )
    names = file_names(paths)
    old = [file.modalities["rna"].obs.index for file in files]
    new, notes = _unique_barcodes(old, names)
    sources = [
        replace(file.modalities["rna"], obs=file.modalities["rna"].obs.set_axis(barcodes, axis=0))
        for file, barcodes in zip(files, new, strict=True)
    ]
    obs = join_annotation(
        [file.obs.loc[before].set_axis(after, axis=0) for file, before, after in zip(files, old, new, strict=True)]
    )
    obs[batch_column] = pd.Categorical(np.repeat(names, [len(barcodes) for barcodes in new]), names)
    return RawFile(
        files[0].path,
        "several files",
        {"rna": sources[0]},
        obs,
        simulated=any(file.simulated for file in files),
        notes=[*notes, *(f"{file.path}: {line}" for file in files for line in file.notes)],
        handles=[handle for file in files for handle in file.handles],
        more={"rna": sources[1:]},
    )


def _check_different(paths: Sequence[Path]) -> None:
    """Raise an error if a file is named twice, or a copy of it is."""
    seen: dict[tuple, Path] = {}
    for path in paths:
        # Hashing takes time, so only files of one size are compared by content.
        same_size = path.is_file() and any(
            other.is_file() and other.stat().st_size == path.stat().st_size for other in paths if other is not path
        )
        for key in (("path", path.resolve()), *((("content", file_hash(path)),) if same_size else ())):
            if key in seen:
                how = "is named twice" if key[0] == "path" else f"has the same content as {seen[key]}"
                raise UserError(f"--data_path {path}: {how}; name each file once")
            seen[key] = path


def file_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest names that tell files apart: without folders and suffix, or else with some folders.

    Examples
    --------
    >>> file_names([Path("data/a.h5ad"), Path("data/b.h5ad")])
    ['a', 'b']
    >>> file_names([Path("s1/cells.h5"), Path("s2/cells.h5")])
    ['s1/cells', 's2/cells']
    """
    paths = [Path(path).resolve() for path in paths]
    bare = [_without_suffix(path) for path in paths]
    named = bare if len(set(bare)) == len(bare) else paths  # a.h5ad and a.csv keep their suffixes
    ends = lambda depth: ["/".join(path.parts[-depth:]) for path in named]
    depths = range(1, max(len(path.parts) for path in named) + 1)
    return ends(next((depth for depth in depths if len(set(ends(depth))) == len(named)), depths[-1]))


def _without_suffix(path: Path) -> Path:
    """Remove a file's suffix, such as .h5ad or .csv.gz; a folder keeps its name."""
    if path.is_dir():
        return path
    return path.with_name(path.name.removesuffix(".gz")).with_suffix("")


def _unique_barcodes(barcodes: list[pd.Index], names: list[str]) -> tuple[list[pd.Index], list[str]]:
    """Append the file's name to each barcode that is in more than one file; return the barcodes, and notes."""
    everything = pd.Index(np.concatenate(barcodes))
    clashing = everything[everything.duplicated(keep=False)]
    if not len(clashing):
        return barcodes, []
    is_clash = [index.isin(clashing) for index in barcodes]
    new = [
        pd.Index(np.where(clash, index + f"-{name}", index)).astype(str)
        for index, name, clash in zip(barcodes, names, is_clash, strict=True)
    ]
    joined = pd.Index(np.concatenate(new))
    if not joined.is_unique:
        twice = joined[joined.duplicated()][0]
        raise UserError(f"--data_path: barcode {twice} occurs in several files; make the barcodes unique first")
    shared, example = clashing.unique(), joined[everything.isin(clashing)][0]
    are, get = ("is", "gets") if len(shared) == 1 else ("are", "get")
    notes = [
        f"{count(len(shared), 'barcode')} {are} in more than one file and {get} the file's name as ending, as {example}"
    ]
    for name, clash in zip(names, is_clash, strict=True):
        if clash.mean() > MANY_CLASHES:
            notes.append(f"warning: {clash.mean():.0%} of the barcodes of {name} are in another file: the same cells?")
    return new, notes


def join_annotation(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Join the annotation of cells of several files: all cells, and all columns of any file.

    A cell has no value in a column that its file lacks. Text becomes categories, in the order of the files. Whole
    numbers and truth values get pandas' nullable types where a file lacks the column. A column that holds numbers in
    one file and text in another becomes text.

    Parameters
    ----------
    frames : annotation of each file's cells, with barcodes that are unique over all files
    """
    barcodes = pd.Index(np.concatenate([frame.index for frame in frames]))
    columns = list(dict.fromkeys(column for frame in frames for column in frame))
    joined = {}
    for column in columns:
        parts = [frame[column] for frame in frames if column in frame]
        parts = [part for part in parts if part.notna().any()] or parts[:1]  # an empty column has no type to keep
        is_text = [not pd.api.types.is_numeric_dtype(part) for part in parts]
        if any(is_text):
            text = pd.concat([part.astype(object).where(part.notna(), None) for part in parts])
            text = text.where(text.isna(), text.astype(str)).reindex(barcodes)
            joined[column] = as_category(text, *parts)
            continue
        if len({part.dtype.kind == "b" for part in parts}) > 1:  # truth values beside numbers count as 0 and 1
            parts = [part.astype("Int64") if part.dtype.kind == "b" else part for part in parts]
        if len(parts) < len(frames):
            parts = [part.convert_dtypes() if part.dtype.kind in "biu" else part for part in parts]
        numbers = pd.concat(parts).reindex(barcodes)
        # anndata cannot write pandas' nullable fractions.
        joined[column] = numbers.astype("float64") if numbers.dtype.kind == "f" else numbers
    return pd.DataFrame(joined, index=barcodes)


def join_genes(parts: list[Ingested]) -> tuple[list[Ingested], list[str]]:
    """Place the genes of several ingested files in one list: their union, or the reference they were aligned to.

    Parameters
    ----------
    parts : RNA of each file, ingested alone; a single file is returned as it is

    Returns
    -------
    parts : the same files, whose counts come out in the columns of the joined list
    report : how many of the joined genes each file measured, a line each

    Raises
    ------
    UserError
        If the files are of different species, or one shares no gene with the others.
    """
    if len(parts) == 1:
        return parts, []
    _check_one_species(parts)
    union = np.unique(np.concatenate([part.alignment.features for part in parts]))
    if not parts[0].alignment.by_reference:  # files that were aligned to a reference have its genes already
        parts = [replace(part, alignment=part.alignment.onto(union)) for part in parts]
    found = np.array([part.alignment.found for part in parts])  # [files, genes]
    names = file_names([part.source.path for part in parts])
    for part, ours in zip(parts, found, strict=True):
        if not (ours & (found.sum(0) > 1)).any():
            theirs = next(other for other in parts if other is not part)
            examples = [", ".join(ingested.alignment.ids[:3]) for ingested in (part, theirs)]
            raise UserError(
                f"{part.source.path}: shares no gene with the other files of --data_path (it has ids like "
                f"{examples[0]}, another like {examples[1]}); put symbols or Ensembl ids of one species into var_names"
            )
    n_genes, n_common = found.shape[1], int(found.all(0).sum())
    lines = [f"joined: {len(parts)} files, {n_genes:,} genes, {n_common:,} of them in every file"]
    lines += [
        f"  {name}: {ours.sum():,} of the {n_genes:,} genes measured ({ours.mean():.1%})"
        + ("" if ours.all() else "; the others are 0 in its cells")
        for name, ours in zip(names, found, strict=True)
    ]
    inexact = [name for name, part in zip(names, parts, strict=True) if not part.values.exact]
    if inexact and len(inexact) < len(parts):
        lines.append(f"  no counts are written, because some files have no whole counts{listed(inexact, 3)}")
    return parts, lines


def _check_one_species(parts: list[Ingested]) -> None:
    """Raise an error if files of human and of mouse cells are to be joined."""
    path_of = {part.alignment.genes.species: part.source.path for part in reversed(parts)}
    if {"human", "mouse"} <= path_of.keys():
        raise UserError(
            f"{path_of['mouse']}: has mouse genes, but {path_of['human']} has human genes; join files of one species"
        )
