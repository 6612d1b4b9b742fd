"""Peaks as genome intervals: read their names, check them against a genome, and put them in genome order.

The ATAC encoder cuts the vector of peaks into patches. A patch is only a stretch of the genome if the peaks are in
genome order. Intervals are tables with the columns ``chrom`` (``chr1``), ``start`` and ``end`` (base pairs).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import UserError

# The name of a scaffold may hold any separator, so the last two numbers are the interval, and the rest is the name.
_PEAK_NAME = re.compile(r"\s*(\S+)[:_-](\d{1,15})[_-](\d{1,15})\s*")
# R's make.names turns every separator into a dot, and puts an X before a digit. Gene names have dots too (AC020916.1),
# so the part before the two numbers must be a chromosome, or a scaffold as GenBank or RefSeq names it.
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
    """Read the tables in resources/, in genome order."""
    sizes = {}
    for path in sorted((Path(__file__).parent / "resources").glob("*.chrom.sizes")):
        rows = (line.split() for line in path.read_text().splitlines())
        sizes[path.name.removesuffix(".chrom.sizes")] = {chrom: int(size) for chrom, size in rows}
    return sizes


CHROM_SIZES: dict[str, dict[str, int]] = _read_chrom_sizes()
"""Genome assembly → primary chromosome → length in base pairs (from UCSC's chrom.sizes)."""
_PRIMARY = frozenset(chrom for sizes in CHROM_SIZES.values() for chrom in sizes)
_NUMBERED = r"chr(\d+|X|Y)"
MAX_SHARE_OUTSIDE = 1e-3
"""Largest share of peaks that may lie outside their assembly. Of 52,761 peaks of a cell line that were called on hg19,
one passes the end of a chromosome of hg19, but 679 (1.3 %) do so in hg38, the most similar assembly."""


def chrom_sizes(genome: str = "hg38") -> dict[str, int]:
    """Return the lengths of a genome's primary chromosomes.

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


@dataclass
class Placement:
    """Peaks on the chromosomes of a genome.

    Attributes
    ----------
    intervals : [n_peaks] table with ``chrom``, ``start`` and ``end``; peaks are cut at the end of their chromosome
    kept : [n_peaks] bool, False for peaks that lie completely outside the genome
    genomes : assemblies that the peaks fit best: several if they fit equally well, none if too many peaks lie outside
        each of them
    notes : lines that report what was found and changed
    """

    intervals: pd.DataFrame
    kept: np.ndarray
    genomes: list[str]
    notes: list[str]


def place_peaks(intervals: pd.DataFrame, genome: str | None, path: str | Path) -> Placement:
    """Find the assembly that peaks were called on, and cut peaks at the ends of its chromosomes.

    Peak callers extend peaks by some bases, so a few peaks of a large file may pass the end of a chromosome, up to a
    share of `MAX_SHARE_OUTSIDE`. More are a sign of another assembly.

    Parameters
    ----------
    intervals
        [n_peaks] table with ``chrom``, ``start`` and ``end``.
    genome
        UCSC's name of the assembly, or None to use the one that fits, if there is only one.
    path
        The file, for messages.

    Returns
    -------
    Placement

    Raises
    ------
    UserError
        If the given assembly is not known, or too many peaks lie outside the assembly.
    """
    sizes = CHROM_SIZES if genome is None else CHROM_SIZES | {genome: chrom_sizes(genome)}
    outside = {name: _outside(intervals, lengths) for name, lengths in sizes.items()}
    genomes = _fitting(intervals, outside)
    build = genome or (genomes[0] if len(genomes) == 1 else None)
    kept, notes = np.ones(len(intervals), dtype=bool), _unplaced(intervals)
    if build is None or not outside[build].any():
        return Placement(intervals, kept, genomes, notes)
    beyond = outside[build]
    length = intervals["chrom"].map(sizes[build])
    kept = ~(beyond & ~(intervals["start"] < length).to_numpy())
    better = [name for name in genomes if outside[name].sum() < beyond.sum()]
    first = ", ".join(format_peaks(intervals[beyond].iloc[:3]))
    count = f"{beyond.sum():,} of {len(intervals):,} peaks lie outside {build} ({first})"
    # The peak caller may have extended a peak past the end; but a peak without any base in this assembly shows that
    # the peaks were called on another one, if they all fit that one.
    if beyond.mean() > MAX_SHARE_OUTSIDE or (not kept.all() and any(not outside[name].any() for name in better)):
        raise UserError(
            f"{path}: {count}; "
            + (
                f"they fit {', '.join(better)}: set --genome to one of these, or "
                if better
                else "they fit no known build: "
            )
            + "lift the peaks over"
        )
    notes.append(
        f"{count}: {(beyond & kept).sum():,} are cut at the chromosome's end, {(~kept).sum():,} left out"
        + (f"; fewer lie outside {', '.join(better)}: check --genome" if better else "")
    )
    clipped = intervals.assign(end=np.where(beyond & kept, length, intervals["end"]).astype(np.int64))
    return Placement(clipped, kept, genomes, notes)


def _fitting(intervals: pd.DataFrame, outside: dict[str, np.ndarray]) -> list[str]:
    """Return the assemblies with fewest peaks outside, if these are few."""
    if not intervals["chrom"].isin(_PRIMARY).any():
        return []
    fewest = min(beyond.sum() for beyond in outside.values())
    return [name for name, beyond in outside.items() if beyond.sum() == fewest <= MAX_SHARE_OUTSIDE * len(intervals)]


def _unplaced(intervals: pd.DataFrame) -> list[str]:
    """Return a note on peaks on unplaced contigs; no note if no peak lies on a primary chromosome."""
    is_placed = intervals["chrom"].isin(_PRIMARY)
    chroms = intervals["chrom"][~is_placed & ~intervals["chrom"].str.fullmatch(_NUMBERED + "|chrMT")].value_counts()
    if chroms.empty or not is_placed.any():
        return []
    names = ", ".join(chroms.index[:3]) + (", …" if len(chroms) > 3 else "")
    return [f"{chroms.sum():,} peaks lie on {len(chroms):,} unplaced contigs ({names})"]


def _outside(intervals: pd.DataFrame, sizes: dict[str, int]) -> np.ndarray:
    """Return [n_peaks] bool, whether a peak lies outside a genome.

    It does if it passes the end of its chromosome, or if the genome has no chromosome of that number. Scaffolds, which
    have no known length here, are accepted.
    """
    length = intervals["chrom"].map(sizes)
    absent = length.isna() & intervals["chrom"].str.fullmatch(_NUMBERED)
    return (intervals["end"] > length).to_numpy() | absent.to_numpy()


def parse_peaks(names: Iterable[str], var: pd.DataFrame | None = None) -> pd.DataFrame:
    """Read peaks from the columns of ``var`` if it has intervals, or else from the names.

    Parameters
    ----------
    names
        [n_peaks] names such as ``chr1:10-20``, ``chr1-10-20``, ``chr1_10_20``, ``chr1.10.20``, ``1:10-20``.
    var
        [n_peaks] table that may have columns for chromosome, start and end, under any usual name (``chrom``, ``chr``,
        ``seqnames``, …; ``start``, ``chromStart``; ``end``, ``chromEnd``; in upper or lower case).

    Returns
    -------
    [n_peaks] table in the given order: ``chrom`` (with the prefix ``chr``), ``start`` and ``end`` (int64, base pairs).

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
    chrom = fields[0].astype(str).astype("category")  # few different names: the prefix is added once to each
    with_prefix = ["chr" + (c[3:] if c[:3].lower() == "chr" else c) for c in map(str.strip, chrom.cat.categories)]
    return pd.DataFrame(
        {
            "chrom": np.array(with_prefix, dtype=object)[chrom.cat.codes],
            "start": start.astype(np.int64),
            "end": end.astype(np.int64),
        }
    )


def interval_columns(var: pd.DataFrame) -> list[str] | None:
    """Return the names of var's columns for chromosome, start and end, or None if any of them is missing."""
    by_lower = {str(column).lower(): column for column in var.columns}
    found = [next((by_lower[a] for a in aliases if a in by_lower), None) for aliases in _ALIASES.values()]
    return None if None in found else found


def looks_like_peaks(names: Sequence[str]) -> bool:
    """Return whether feature names are those of peaks rather than genes.

    Parameters
    ----------
    names
        [n_features] names.

    Returns
    -------
    True if more than four fifths can be read as intervals, in a sample of up to a thousand names; False if there are no
    names.
    """
    sample = [names[i] for i in np.linspace(0, len(names) - 1, min(len(names), 1000)).astype(int)]
    n_peaks = sum(_match(str(name)) is not None for name in sample)
    return 5 * n_peaks > 4 * len(sample)


def _match(name: str) -> re.Match | None:
    """Match the chromosome, start and end in a peak's name."""
    return _PEAK_NAME.fullmatch(name) or _DOTTED_NAME.fullmatch(name)


def _chrom_key(chrom: str) -> tuple[int, int, str]:
    """Return a sort key: numbered chromosomes first, then X, Y and M, then scaffolds by name."""
    name = chrom.removeprefix("chr")
    if name.isdecimal():
        return 0, int(name), ""
    if name in ("X", "Y", "M", "MT"):
        return 1, "XYM".index(name[0]), ""
    return 2, 0, name


def genome_order(intervals: pd.DataFrame) -> np.ndarray:
    """Return the row numbers that sort peaks into genome order.

    Parameters
    ----------
    intervals
        [n_peaks] table with ``chrom``, ``start`` and ``end``.

    Returns
    -------
    [n_peaks] int64 row numbers, by chromosome (chr1, chr2, … chr22, chrX, chrY, chrM, then scaffolds by name), then
    start, then end; equal intervals keep their order.
    """
    codes, chroms = pd.factorize(intervals["chrom"])
    ordered = {key: rank for rank, key in enumerate(sorted({_chrom_key(c) for c in chroms}))}
    rank = np.array([ordered[_chrom_key(c)] for c in chroms], dtype=np.int64)[codes]
    return np.lexsort((intervals["end"], intervals["start"], rank)).astype(np.int64)


def format_peaks(intervals: pd.DataFrame) -> np.ndarray:
    """Return the names of intervals in the form ``chr1:10-20``.

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
