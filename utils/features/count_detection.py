"""Detect what the values of a matrix are (counts, logarithms or proportions), and turn them back into counts.

A model reads log-normalised counts, so it matters whether a file holds counts already, log(1 + scaled counts) to some
base, or scaled counts such as counts per million. In the last two, all values of a cell are its counts times one
factor, once the logarithm is undone. The factor can be read off the cell's smallest value, which is usually a count of
1. If it turns all values of the cell into whole numbers, which hardly ever happens by chance, these are the counts, and
the base of the logarithm is known.
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

BASES = {"e": np.e, "2": 2.0, "10": 10.0}
MAX_LOG = 50.0
"""Largest logarithm that an expression value can have, to base 2 or any larger base."""
TOLERANCE = 0.05
"""Largest distance of a recovered count from a whole number; `ROUNDING` allows up to six times as much for large
counts."""
ROUNDING = 0.02
"""Additional relative distance per count: values rounded to three decimals are off by 1e-3 of the count (float32 by
3e-7)."""
SMALL_COUNT = 30
"""Counts below this are used to estimate the scale factor."""
MAX_SMALLEST_COUNT = 10
"""A cell's smallest value is tried as each count from 1 to this."""
MIN_LARGER_VALUES = 3
"""A smallest count above 1 is only accepted in cells with at least this many larger values: for few values, some
multiple is nearly whole by chance."""
FRACTION_BELOW, SHARE_NEARLY_WHOLE, SHARE_FRACTIONAL = 0.2, 0.5, 0.01
"""How estimated counts are recognised. They differ from whole numbers because a read is divided among genes (RSEM,
alevin) or because background was subtracted (SoupX). So of the values from 0.5 on, at least `SHARE_NEARLY_WHOLE` are
whole or at most `FRACTION_BELOW` below a whole number (of arbitrary values a fifth are, and of counts divided by size
factors less than a third). And at least `SHARE_FRACTIONAL` of all values are not whole: a single one is a mistake in
the file."""
LARGEST_LOG_CPM = 20.0
"""Logarithms to base 2 of 1 + counts per million do not exceed this; among counts, some do."""
EQUAL_SUMS = 1e-3
"""Coefficient of variation of the sums of cells, below which the cells count as scaled to one sum. It is not 0 because
text files round values."""


@dataclass(frozen=True)
class Values:
    """What a matrix holds.

    Attributes
    ----------
    kind : counts (whole, or estimated with fractions), log1p, cpm (scaled without logarithm), open (peaks), or a reason
        to refuse the matrix: missing, infinite, negative, fractional, empty
    base : base of the logarithm as a key of BASES, or "" if there is no logarithm
    exact : whether the values are whole counts, or whole counts can be recovered from them
    guessed : whether the base does not follow from the values, and is assumed to be e
    """

    kind: str
    base: str = ""
    exact: bool = True
    guessed: bool = False

    @property
    def usable(self) -> bool:
        """Whether the matrix holds counts or proportions, or values from which they can be computed."""
        return self.kind in ("counts", "log1p", "cpm", "open")

    @property
    def rank(self) -> int:
        """Position in the order of preference among the matrices of a file; the smallest is best."""
        return {"counts": 0, "log1p": 1, "cpm": 1, "open": 1}.get(self.kind, 9) + (0 if self.exact else 2)

    def __str__(self) -> str:
        if self.kind == "log1p":
            text = f"log1p values to base {self.base}" + (" (assumed)" if self.guessed else "")
            return text + (
                ", counts recovered"
                if self.exact
                else ", counts not recoverable: used as proportions of the cell's total"
            )
        if self.kind == "cpm":
            text = "scaled counts without logarithm (CPM, TPM …)"
            return text + (", counts recovered" if self.exact else ": used as proportions of the cell's total")
        return {
            "counts": "counts" if self.exact else "estimated counts with fractions (RSEM, alevin, SoupX): used as is",
            "open": "values above zero, taken as open",
            "missing": "missing values (NaN)",
            "infinite": "infinite values",
            "negative": "negative values: scaled, centred or batch-corrected data",
            "fractional": "fractional values that are neither scaled counts nor their logarithms",
            "empty": "no value above zero",
        }[self.kind]


def detect_values(sample: csr_matrix, values: str = "auto", is_open: bool = False) -> Values:
    """Detect what a matrix holds from some of its cells.

    Parameters
    ----------
    sample : [cells, features], without stored zeros
    values : counts, log1p, log2 or cpm if the user states the kind (exactness is still detected, and the base unless it
        is log2); or auto
    is_open : whether the features are peaks, which are open if their value is above zero, whatever the value is

    Returns
    -------
    Values
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
        # If a sample has few different values, several bases may give whole numbers. Then the base that gives all cells
        # the same sum is the right one, because cells were scaled to one sum; so bases that do are tried first.
        bases = ("2",) if values == "log2" else BASES
        for base in sorted(bases, key=lambda base: not _equal_sums(_unlog(x, base), indptr)):
            if recover_counts(_unlog(x, base), indptr)[1].all():
                return Values("log1p", base)
    if values == "cpm" or (values == "auto" and _equal_sums(x, indptr)):
        return Values("cpm", exact=bool(recover_counts(x, indptr)[1].all()))
    if values == "auto" and _estimated_counts(x, indptr):
        return Values("counts", exact=False)
    if x.max() > MAX_LOG or (values == "auto" and whole.mean() > 0.01):  # logarithms are hardly ever whole
        return Values("fractional")
    if values == "log2":
        return Values("log1p", "2", exact=False)
    equal = [base for base in BASES if _equal_sums(_unlog(x, base), indptr)]
    return Values("log1p", equal[0] if equal else "e", exact=False, guessed=not equal)


def to_counts(block: csr_matrix, values: Values) -> tuple[csr_matrix, np.ndarray | None]:
    """Return the counts of some cells, or values proportional to counts where `values.exact` is False.

    Parameters
    ----------
    block : [cells, features] of the file, finite and not negative
    values : what the file holds

    Returns
    -------
    counts : [cells, features] float32
    exact : [cells] bool, whether the cell's counts are whole; None for open peaks
    """
    x = np.asarray(block.data, dtype=np.float64)
    if values.kind == "open":
        return csr_matrix((np.ones(x.size, np.float32), block.indices, block.indptr), shape=block.shape), None
    if values.kind == "log1p":
        with np.errstate(over="ignore"):
            x = _unlog(x, values.base)
    if values.kind == "counts":
        counts, exact = x, _all_in_row(x == np.floor(x), block)
    else:
        counts, exact = recover_counts(x, block.indptr)
    out = csr_matrix((counts if values.exact else x, block.indices, block.indptr), shape=block.shape, copy=False)
    return out.astype(np.float32), exact


def recover_counts(x: np.ndarray, indptr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide each cell's values by the factor that makes them whole numbers, if there is one.

    A common divisor of all counts of a cell cannot be detected, so the smallest numbers that fit are returned.

    Parameters
    ----------
    x : [values] above 0, cell after cell
    indptr : [cells + 1] position of each cell's first value

    Returns
    -------
    counts : [values] whole numbers; the values as is in a cell without such a factor
    exact : [cells] bool, whether the cell has such a factor
    """
    lengths = np.diff(indptr)
    filled = np.flatnonzero(lengths)  # reduceat needs cells with at least one value
    exact = lengths == 0
    out = x.copy()
    if not filled.size:
        return out, exact
    starts, lengths = indptr[:-1][filled], lengths[filled]
    per_value = lambda per_cell: np.repeat(per_cell, lengths)  # [filled cells] → [values]
    ratio = x / per_value(np.minimum.reduceat(x, starts))
    n_larger = np.add.reduceat((ratio > 1 + TOLERANCE).astype(np.int64), starts)
    for smallest_count in range(1, MAX_SMALLEST_COUNT + 1):
        scaled = ratio * smallest_count
        # If values were rounded, all small counts together give the factor more exactly than the smallest alone: it is
        # their least-squares fit to the nearest whole numbers.
        nearest = np.where(scaled < SMALL_COUNT, np.round(scaled), 0)
        product = np.add.reduceat(np.where(nearest > 0, nearest * scaled, 0), starts)
        scaled /= per_value(product / np.add.reduceat(nearest**2, starts))
        nearest = np.round(scaled)
        distance = np.maximum.reduceat(np.abs(scaled - nearest) / (1 + np.minimum(nearest * ROUNDING, 5)), starts)
        found = np.isfinite(distance) & (distance < TOLERANCE) & ~exact[filled]
        if smallest_count > 1:
            found &= n_larger >= MIN_LARGER_VALUES
        is_found = per_value(found)
        out[is_found] = nearest[is_found]
        exact[filled[found]] = True
        if exact.all():
            break
    return out, exact


def _estimated_counts(x: np.ndarray, indptr: np.ndarray) -> bool:
    """Return whether fractional values are estimated counts: from about 1 upwards, and most of them nearly whole."""
    from_half = x >= 0.5
    below = np.ceil(x[from_half]) - x[from_half]
    smallest = np.minimum.reduceat(np.where(from_half, x, np.inf), indptr[:-1][np.diff(indptr) > 0])
    return bool(
        x.max() > LARGEST_LOG_CPM
        and (below <= FRACTION_BELOW).mean() >= SHARE_NEARLY_WHOLE
        and (x != np.floor(x)).mean() >= SHARE_FRACTIONAL
        and np.median(smallest) <= 1 + FRACTION_BELOW  # the smallest values of scaled counts lie elsewhere
    )


def _unlog(x: np.ndarray, base: str) -> np.ndarray:
    """Undo log(1 + x) to a base."""
    return np.expm1(x * np.log(BASES[base]))


def _equal_sums(x: np.ndarray, indptr: np.ndarray) -> bool:
    """Return whether all cells that have values (at least two) have the same sum."""
    filled = np.flatnonzero(np.diff(indptr))
    sums = np.add.reduceat(x, indptr[:-1][filled])
    return len(sums) > 1 and bool(np.isfinite(sums).all()) and sums.std() < EQUAL_SUMS * sums.mean()


def _all_in_row(flags: np.ndarray, block: csr_matrix) -> np.ndarray:
    """Return [cells] whether the flag is True for all values of a cell."""
    row = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
    return np.bincount(row[~flags], minlength=block.shape[0]) == 0
