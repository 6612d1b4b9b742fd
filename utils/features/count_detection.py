"""What the numbers of a matrix are (counts, logarithms, shares), and the way back to counts.

A model reads log-normalised counts, so it matters whether a file holds counts already, or log(1 + scaled counts) to
some base, or counts per million. In the two last, all values of a cell are its counts times one factor (after the
logarithm is undone). If that factor can be read off the cell's smallest value, all its values turn into whole
numbers, which hardly ever happens by chance: the counts are back, and the base of the logarithm is known.
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

BASES = {"e": np.e, "2": 2.0, "10": 10.0}
MAX_LOG = 50.0
"""No logarithm of an expression value is larger, to any base above 2."""
TOLERANCE = 0.05
"""Furthest that a recovered count may lie from a whole number, and up to six times as far for large ones …"""
ROUNDING = 0.02
"""… by this share per count: values rounded to three decimals are off by 1e-3 of the count (float32 by 3e-7)."""
SMALL = 30
"""Counts below this are used to estimate the scale factor."""
MAX_SMALLEST = 10
"""Largest count that a cell's smallest value is tried as …"""
ENOUGH = 3
"""… if so many values of the cell are larger: of few, some multiple is nearly whole by chance."""
BELOW, MOSTLY, SOME = 0.2, 0.5, 0.01
"""Estimated counts are off whole numbers by a molecule that genes share (RSEM, alevin) or by the background that was
taken away (SoupX). So of the values above a half, most are whole or this little below a whole number (a fifth of other
values are, and less than a third of counts divided by size factors); and more than one in a hundred is not whole, where
a single one is a mistake in the file."""
LARGEST_LOG = 20.0
"""Logarithms of 1 + counts per million, to base 2, are no larger; of counts at least some are."""
EVEN_SUMS = 1e-3
"""Coefficient of variation of the cells' sums below which they were scaled to one sum (text files round values)."""


@dataclass(frozen=True)
class Values:
    """What a matrix holds.

    Attributes
    ----------
    kind : counts (whole, or estimated ones with fractions), log1p, cpm (scaled, not logarithms), open (of peaks), or a
        reason to refuse it: missing, infinite, negative, fractional, empty
    base : of the logarithm, a key of BASES, or "" where there is none
    exact : whole counts, or values from which they are recovered
    guessed : the base does not follow from the values and is taken to be e
    """

    kind: str
    base: str = ""
    exact: bool = True
    guessed: bool = False

    @property
    def usable(self) -> bool:
        """Whether counts or shares of counts can be had."""
        return self.kind in ("counts", "log1p", "cpm", "open")

    @property
    def rank(self) -> int:
        """Order of preference between the matrices of a file; the least is best."""
        return {"counts": 0, "log1p": 1, "cpm": 1, "open": 1}.get(self.kind, 9) + (0 if self.exact else 2)

    def __str__(self) -> str:
        if self.kind == "log1p":
            text = f"log1p values to base {self.base}" + (" (assumed)" if self.guessed else "")
            return text + (", counts recovered" if self.exact else ", counts not recoverable: used as shares of a cell")
        if self.kind == "cpm":
            text = "scaled counts without logarithm (CPM, TPM …)"
            return text + (", counts recovered" if self.exact else ": used as shares of a cell")
        return {
            "counts": "counts"
            if self.exact
            else "estimated counts with fractions (RSEM, alevin, SoupX): used as they are",
            "open": "values above zero, taken as open",
            "missing": "missing values (NaN)",
            "infinite": "infinite values",
            "negative": "negative values: scaled, centred or batch-corrected data",
            "fractional": "fractional values that are neither scaled counts nor their logarithms",
            "empty": "no value above zero",
        }[self.kind]


def detect_values(sample: csr_matrix, values: str = "auto", is_open: bool = False) -> Values:
    """What some cells of a matrix hold.

    Parameters
    ----------
    sample : [cells, features], zeros not stored
    values : counts, log1p or cpm to overrule the judgement of the kind (not of base and exactness); or auto
    is_open : of peaks, any value above zero says as much as a count: open
    """
    x = np.asarray(sample.data, dtype=np.float64)
    if not x.size:
        return Values("empty")
    if np.isnan(x).any():
        return Values("missing")
    if np.isinf(x).any():
        return Values("infinite")
    if x.min() < 0:
        return Values("negative")
    whole = x == np.floor(x)
    if values == "counts" or (values == "auto" and whole.all()):
        return Values("counts", exact=bool(whole.all()))
    indptr = sample.indptr
    if is_open:
        return Values("open", exact=False)
    if values != "cpm" and x.max() <= MAX_LOG:
        # Of few different values more than one base may make whole numbers; all cells were scaled to one total.
        for base in sorted(BASES, key=lambda base: not _even_sums(_unlog(x, base), indptr)):
            if recovered(_unlog(x, base), indptr)[1].all():
                return Values("log1p", base)
    if values == "cpm" or (values == "auto" and _even_sums(x, indptr)):
        return Values("cpm", exact=bool(recovered(x, indptr)[1].all()))
    if values == "auto" and _estimated_counts(x, indptr):
        return Values("counts", exact=False)
    if x.max() > MAX_LOG or (values == "auto" and whole.mean() > 0.01):  # a logarithm is hardly ever whole
        return Values("fractional")
    even = [base for base in BASES if _even_sums(_unlog(x, base), indptr)]
    return Values("log1p", even[0] if even else "e", exact=False, guessed=not even)


def to_counts(block: csr_matrix, values: Values) -> tuple[csr_matrix, np.ndarray | None]:
    """Counts of some cells, or values in proportion to them where `values.exact` is False.

    Parameters
    ----------
    block : [cells, features] of the file, finite and not negative
    values : what the file holds

    Returns
    -------
    [cells, features] float32; and [cells] bool, whether the cell's values are whole counts now (None for open peaks)
    """
    x = np.asarray(block.data, dtype=np.float64)
    if values.kind == "open":
        return csr_matrix((np.ones(x.size, np.float32), block.indices, block.indptr), shape=block.shape), None
    if values.kind == "log1p":
        with np.errstate(over="ignore"):
            x = _unlog(x, values.base)
    counts, exact = recovered(x, block.indptr) if values.kind != "counts" else (x, _all_in_row(x == np.floor(x), block))
    out = csr_matrix((counts if values.exact else x, block.indices, block.indptr), shape=block.shape, copy=False)
    return out.astype(np.float32), exact


def recovered(x: np.ndarray, indptr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide each cell's values by the factor that makes them whole numbers, if there is one.

    Parameters
    ----------
    x : [values] > 0, cell after cell
    indptr : [cells + 1] where each cell's values begin

    Returns
    -------
    [values] the whole numbers (a cell that has no such factor: x as it was); and [cells] bool, whether it has one.
    A common divisor of all counts of a cell cannot be seen, so the smallest fitting numbers are taken.
    """
    lengths = np.diff(indptr)
    filled = np.flatnonzero(lengths)
    exact = lengths == 0
    out = x.copy()
    if not filled.size:
        return out, exact
    starts, lengths = indptr[:-1][filled], lengths[filled]
    per_value = lambda per_cell: np.repeat(per_cell, lengths)
    ratio = x / per_value(np.minimum.reduceat(x, starts))
    n_above = np.add.reduceat((ratio > 1 + TOLERANCE).astype(np.int64), starts)
    for count in range(1, MAX_SMALLEST + 1):
        scaled = ratio * count
        # All small counts together give the factor more exactly than the smallest alone, if values were rounded.
        nearest = np.where(scaled < SMALL, np.round(scaled), 0)
        weight = np.add.reduceat(np.where(nearest > 0, nearest * scaled, 0), starts)
        scaled /= per_value(weight / np.add.reduceat(nearest**2, starts))
        nearest = np.round(scaled)
        off = np.maximum.reduceat(np.abs(scaled - nearest) / (1 + np.minimum(nearest * ROUNDING, 5)), starts)
        found = np.isfinite(off) & (off < TOLERANCE) & ~exact[filled]
        if count > 1:
            found &= n_above >= ENOUGH
        mine = per_value(found)
        out[mine] = nearest[mine]
        exact[filled[found]] = True
        if exact.all():
            break
    return out, exact


def _estimated_counts(x: np.ndarray, indptr: np.ndarray) -> bool:
    """Whether values that are not all whole are counts nevertheless: from about 1 upwards, most (nearly) whole."""
    half = x >= 0.5
    below = np.ceil(x[half]) - x[half]
    smallest = np.minimum.reduceat(np.where(half, x, np.inf), indptr[:-1][np.diff(indptr) > 0])
    return bool(
        x.max() > LARGEST_LOG
        and (below <= BELOW).mean() >= MOSTLY
        and (x != np.floor(x)).mean() >= SOME
        and np.median(smallest) <= 1 + BELOW  # counts that were scaled begin elsewhere
    )


def _unlog(x: np.ndarray, base: str) -> np.ndarray:
    return np.expm1(x * np.log(BASES[base]))


def _even_sums(x: np.ndarray, indptr: np.ndarray) -> bool:
    """Whether all cells (at least two) have the same sum."""
    filled = np.flatnonzero(np.diff(indptr))
    sums = np.add.reduceat(x, indptr[:-1][filled])
    return len(sums) > 1 and bool(np.isfinite(sums).all()) and sums.std() < EVEN_SUMS * sums.mean()


def _all_in_row(flags: np.ndarray, block: csr_matrix) -> np.ndarray:
    """[cells] whether all of a cell's values have the flag."""
    row = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
    return np.bincount(row[~flags], minlength=block.shape[0]) == 0
