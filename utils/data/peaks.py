"""Peaks as genome intervals: reading their names, and putting them in genome order.

The ATAC encoder cuts the peak vector into patches, so peaks must stand in genome order for a patch to be a stretch of
genome. Intervals are tables with the columns ``chrom`` (``chr1``), ``start`` and ``end`` (base pairs).
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import UserError

# The name of a scaffold may itself hold any separator, so the two last numbers are the interval, the rest the name.
_PEAK_NAME = re.compile(r"\s*(\S+)[:_-](\d{1,15})[_-](\d{1,15})\s*")
# R's make.names writes every separator as a dot, and an X before a digit. Gene names hold dots too (AC020916.1), so
# what stands before the two numbers must be a chromosome, or a scaffold of GenBank's or RefSeq's.
_DOTTED_NAME = re.compile(
    r"\s*(?:X(?=\d))?(chr[\w.]+|\d{1,2}|[XY]|MT?|(?:GL|KI|JH|N[CTW]_)\d+\.\d+)\.(\d{1,15})\.(\d{1,15})\s*",
    re.IGNORECASE,
)
_ACCEPTED = "chr1:10-20, chr1-10-20, chr1_10_20 or chr1.10.20 with end > start, or var columns chrom, start and end"
_ALIASES = {
    "chrom": ("chrom", "chr", "chromosome", "seqnames", "seqname"),
    "start": ("start", "chromstart"),
    "end": ("end", "chromend", "stop"),
}


def _read_chrom_sizes() -> dict[str, dict[str, int]]:
    sizes = {}
    for path in sorted((Path(__file__).parent / "resources").glob("*.chrom.sizes")):
        rows = (line.split() for line in path.read_text().splitlines())
        sizes[path.name.removesuffix(".chrom.sizes")] = {chrom: int(size) for chrom, size in rows}
    return sizes


CHROM_SIZES: dict[str, dict[str, int]] = _read_chrom_sizes()
"""Genome → primary chromosome → length in base pairs (UCSC's chrom.sizes)."""


def chrom_sizes(genome: str = "hg38") -> dict[str, int]:
    """Lengths of a genome's primary chromosomes.

    Parameters
    ----------
    genome
        UCSC's name of the assembly.

    Returns
    -------
    Chromosome → base pairs, in genome order.

    Raises
    ------
    UserError
        If the assembly is not known.
    """
    if genome not in CHROM_SIZES:
        raise UserError(f"no chromosome sizes for genome {genome!r}; known: {', '.join(CHROM_SIZES)}")
    return dict(CHROM_SIZES[genome])


def check_genome(intervals: pd.DataFrame, genome: str | None, path: str | Path) -> None:
    """Stop peaks that cannot be of the genome that is stated.

    Parameters
    ----------
    intervals
        [n_peaks] table with ``chrom``, ``start`` and ``end``.
    genome
        UCSC's name of the assembly, or None for no check.
    path
        The file, for the message.

    Raises
    ------
    UserError
        If the assembly is not known, or a peak ends beyond its chromosome or lies on one that the assembly lacks.
    """
    if genome is None:
        return
    outside = _outside(intervals, chrom_sizes(genome))
    if outside.any():
        first = format_peaks(intervals[outside].iloc[:3])
        fitting = guess_genomes(intervals)
        raise UserError(
            f"{path}: {outside.sum():,} of {len(intervals):,} peaks lie outside {genome} ({', '.join(first)}); "
            + (f"they fit {', '.join(fitting)}: state it by --genome, or " if fitting else "they fit no known build: ")
            + "lift the peaks over"
        )


def guess_genomes(intervals: pd.DataFrame) -> list[str]:
    """The assemblies in which all peaks lie within their chromosomes (several, where the peaks do not tell)."""
    if not intervals["chrom"].isin({chrom for sizes in CHROM_SIZES.values() for chrom in sizes}).any():
        return []
    return [genome for genome, sizes in CHROM_SIZES.items() if not _outside(intervals, sizes).any()]


def _outside(intervals: pd.DataFrame, sizes: dict[str, int]) -> np.ndarray:
    """[n_peaks] bool: beyond the end of a chromosome, or on a numbered one that is not there; scaffolds may pass."""
    length = intervals["chrom"].map(sizes)
    absent = length.isna() & intervals["chrom"].str.fullmatch(r"chr(\d+|X|Y)")
    return (intervals["end"] > length).to_numpy() | absent.to_numpy()


def parse_peaks(names: Iterable[str], var: pd.DataFrame | None = None) -> pd.DataFrame:
    """Read peaks from their names, or from the columns of ``var`` where it has them.

    Parameters
    ----------
    names
        [n_peaks] names such as ``chr1:10-20``, ``chr1-10-20``, ``chr1_10_20``, ``chr1.10.20``, ``1:10-20``.
    var
        [n_peaks] table that may hold the chromosome, start and end under a common name (``chrom``, ``chr``,
        ``seqnames``, …; ``start``, ``chromStart``; ``end``, ``chromEnd``; any case).

    Returns
    -------
    [n_peaks] table in the order given: ``chrom`` (with ``chr`` in front), ``start`` and ``end`` (int64, base pairs).

    Raises
    ------
    UserError
        If a peak cannot be read or is empty (end ≤ start); the first three are named.
    """
    names = [str(name) for name in names]
    columns = None if var is None else interval_columns(var)
    if columns is None:
        matches = map(_match, names)  # twice as fast as pandas' str.extract on a million names
        fields = pd.DataFrame([m.groups() if m else (None,) * 3 for m in matches], columns=range(3))
    else:
        fields = pd.DataFrame({i: var[column].to_numpy() for i, column in enumerate(columns)})
        if len(fields) != len(names):
            raise UserError(f"{len(names)} peak names but {len(fields)} rows in var; give one row per peak")
    # Starts and ends below 10^15 are exact in float64, which can also hold the NaN of a bad name.
    start, end = (pd.to_numeric(fields[i], errors="coerce").to_numpy(dtype=float, na_value=np.nan) for i in (1, 2))
    whole = (start == np.floor(start)) & (end == np.floor(end))
    bad = ~(whole & (start >= 0) & (end > start)) | fields[0].isna().to_numpy()
    if bad.any():
        first = ", ".join(repr(names[i]) for i in np.flatnonzero(bad)[:3])
        raise UserError(f"{bad.sum()} of {len(names)} peaks cannot be read ({first}); write them as {_ACCEPTED}")
    chrom = fields[0].astype(str).astype("category")  # few distinct names, so the prefix is added to each once
    with_prefix = ["chr" + (c[3:] if c[:3].lower() == "chr" else c) for c in map(str.strip, chrom.cat.categories)]
    return pd.DataFrame(
        {
            "chrom": np.array(with_prefix, dtype=object)[chrom.cat.codes],
            "start": start.astype(np.int64),
            "end": end.astype(np.int64),
        }
    )


def interval_columns(var: pd.DataFrame) -> list[str] | None:
    """The names of var's chromosome, start and end columns, or None unless all three are there."""
    by_lower = {str(column).lower(): column for column in var.columns}
    found = [next((by_lower[a] for a in aliases if a in by_lower), None) for aliases in _ALIASES.values()]
    return None if None in found else found


def looks_like_peaks(names: Sequence[str]) -> bool:
    """Whether feature names are peaks rather than genes, judged on up to a thousand of them.

    Parameters
    ----------
    names
        [n_features] names.

    Returns
    -------
    True if more than four fifths of the sample can be read as intervals; False if there are no names.
    """
    sample = [names[i] for i in np.linspace(0, len(names) - 1, min(len(names), 1000)).astype(int)]
    n_peaks = sum(_match(str(name)) is not None for name in sample)
    return 5 * n_peaks > 4 * len(sample)


def _match(name: str) -> re.Match | None:
    return _PEAK_NAME.fullmatch(name) or _DOTTED_NAME.fullmatch(name)


def _chrom_key(chrom: str) -> tuple[int, int, str]:
    """Numbered chromosomes, then X, Y and M, then scaffolds by name."""
    name = chrom.removeprefix("chr")
    if name.isdecimal():
        return 0, int(name), ""
    if name in ("X", "Y", "M", "MT"):
        return 1, "XYM".index(name[0]), ""
    return 2, 0, name


def genome_order(intervals: pd.DataFrame) -> np.ndarray:
    """Where each peak goes in genome order.

    Parameters
    ----------
    intervals
        [n_peaks] table with ``chrom``, ``start`` and ``end``.

    Returns
    -------
    [n_peaks] int64 row numbers that sort the table: by chromosome (chr1, chr2, … chr22, chrX, chrY, chrM, then
    scaffolds by name), then start, then end; equal intervals keep their order.
    """
    codes, chroms = pd.factorize(intervals["chrom"])
    ordered = {key: rank for rank, key in enumerate(sorted({_chrom_key(c) for c in chroms}))}
    rank = np.array([ordered[_chrom_key(c)] for c in chroms], dtype=np.int64)[codes]
    return np.lexsort((intervals["end"], intervals["start"], rank)).astype(np.int64)


def format_peaks(intervals: pd.DataFrame) -> np.ndarray:
    """Names of intervals, in the form ``chr1:10-20``.

    Parameters
    ----------
    intervals
        [n_peaks] table with ``chrom``, ``start`` and ``end``.

    Returns
    -------
    [n_peaks] array of str.
    """
    columns = (intervals[c].tolist() for c in ("chrom", "start", "end"))
    return np.array([f"{chrom}:{start}-{end}" for chrom, start, end in zip(*columns, strict=True)], dtype=str)
