"""Join cells of two files by barcode."""

import re

import numpy as np
import pandas as pd

SUFFIX = re.compile(r"-\d+$")
"""What Cell Ranger appends to barcodes: -1, and -2 and so on for further samples of an aggregated run."""


def join_barcodes(ours: pd.Index, theirs: pd.Index) -> tuple[np.ndarray, np.ndarray, str]:
    """Find the barcodes that are in both of two files.

    If more of them agree without suffixes, these are ignored. But not where a file has several suffixes, that is
    several samples, and some barcodes agree with theirs: the same barcode in two samples is two cells.

    Parameters
    ----------
    ours, theirs : barcodes, unique in each

    Returns
    -------
    rows in `ours` and in `theirs`, and a note if suffixes were ignored, else an empty text
    """
    n_exact, note = len(ours.intersection(theirs)), ""
    if n_exact < min(len(ours), len(theirs)) and not (n_exact and max(map(_n_suffixes, (ours, theirs))) > 1):
        bare = [pd.Index([SUFFIX.sub("", barcode) for barcode in barcodes]) for barcodes in (ours, theirs)]
        if len(bare[0].intersection(bare[1])) > n_exact and bare[0].is_unique and bare[1].is_unique:
            (ours, theirs), note = bare, ", ignoring suffixes such as -1"
    position = theirs.get_indexer(ours)
    return np.flatnonzero(position >= 0), position[position >= 0], note


def _n_suffixes(barcodes: pd.Index) -> int:
    return len({found.group() for found in map(SUFFIX.search, barcodes) if found})
