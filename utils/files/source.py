"""One modality of a file: its cells, its features, and the matrices that may hold its counts."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from utils.errors import UserError
from utils.features.count_detection import Values, detect_values
from utils.features.gene_ids import share_known
from utils.features.peaks import interval_columns, looks_like_peaks
from utils.files.disk_matrix import Matrix

COUNT_LAYERS = ("counts", "raw_counts", "count", "raw", "umi", "umis", "spliced")
"""Names of layers that usually hold counts, best first. Spliced counts are only a part of all counts, so they are read
only where nothing else holds counts or values from which they can be recovered."""
SAMPLE = 2000
"""Cells of a matrix that are read to detect what its values are."""
FEATURE_TYPES = {
    **dict.fromkeys(("gene expression", "gex", "gene", "genes", "rna"), "rna"),
    **dict.fromkeys(("peaks", "peak", "atac", "chromatin accessibility"), "atac"),
}
"""Feature type in lower case, as 10x or another tool writes it to `var["feature_types"]` → modality."""
OTHER_FEATURE_TYPES = {
    *("antibody capture", "crispr guide capture", "multiplexing capture", "antigen capture", "custom"),
    *("vdj-t", "vdj-b", "adt", "protein", "hto"),
}
"""Feature types in lower case that are known to be neither genes nor peaks."""


def feature_modalities(kinds: Iterable) -> list[str | None]:
    """Return rna, atac or `other` for each feature type, and None for a type that is not known."""
    words = [str(kind).strip().lower() for kind in kinds]
    return [FEATURE_TYPES.get(word, "other" if word in OTHER_FEATURE_TYPES else None) for word in words]


@dataclass
class Source:
    """One modality of a file.

    Attributes
    ----------
    path : the file
    modality : rna or atac
    obs : annotation of the cells, with barcodes as index
    matrices : place in the file (X, layers['counts'], raw) → the matrix, and the annotation of its features
    load : reads everything that the file holds of the modality
    others : names of the other entries that the file has for these cells
    rows : [cells] number of each cell in the file, or None for all cells of the file
    """

    path: Path
    modality: str
    obs: pd.DataFrame
    matrices: dict[str, tuple[Matrix, pd.DataFrame]]
    load: Callable[[], ad.AnnData] = field(repr=False)
    others: list[str] = field(default_factory=list)
    rows: np.ndarray | None = field(default=None, repr=False)

    @classmethod
    def checked(
        cls,
        path: Path,
        obs: pd.DataFrame,
        var: pd.DataFrame,
        matrices: dict,
        modality: str | None,
        load: Callable[[], ad.AnnData],
        others: list[str],
    ) -> "Source":
        """Return a source whose parts are checked, with its matrices in order of preference.

        The parameters are the attributes of the class. If `modality` is None, the modality is inferred from the
        feature types, or else from the feature names.

        Raises
        ------
        UserError
            If there is no cell, no feature or no matrix, a matrix has another shape, or a barcode occurs twice.
        """
        obs.index, var.index = obs.index.astype(str).rename(None), var.index.astype(str).rename(None)
        modality = modality or _stated_modality(var) or ("atac" if _is_peaks(var) else "rna")
        for count, what in ((len(obs), "cells"), (len(var), "features")):
            if not count:
                raise UserError(f"{path}: has no {what} in {modality}; give the file from before filtering")
        if not matrices:
            raise UserError(f"{path}: has no values in {modality}; put the counts into X")
        for place, (matrix, features) in matrices.items():
            features.index = features.index.astype(str).rename(None)
            if matrix.shape != (len(obs), len(features)):
                raise UserError(
                    f"{path}: {place} of {modality} is {matrix.shape[0]} × {matrix.shape[1]}, but the file names "
                    f"{len(obs)} cells and {len(features)} features; write the file again"
                )
        if not obs.index.is_unique:
            twice = obs.index[obs.index.duplicated()].unique()
            raise UserError(
                f"{path}: barcodes of {modality} are not unique ({len(twice):,} occur more than once, like "
                f"{twice[0]}); make them unique first, for example with anndata.concat(..., index_unique='-')"
            )
        ordered = dict(sorted(matrices.items(), key=lambda item: _preference(item[0])))
        return cls(path, modality, obs, ordered, load, others)

    def take(self, rows: np.ndarray, barcodes: pd.Index) -> "Source":
        """Return some of the cells, under other barcodes."""
        obs = self.obs.iloc[rows].set_axis(barcodes, axis=0)
        matrices = {place: (matrix.take(rows), var) for place, (matrix, var) in self.matrices.items()}
        return Source(self.path, self.modality, obs, matrices, self.load, self.others, rows)

    def whole(self) -> ad.AnnData:
        """Read these cells into memory, with everything that the file holds of them."""
        whole = self.load()
        part = whole.copy() if self.rows is None else whole[self.rows].copy()
        part.obs_names = self.obs.index
        part.var_names_make_unique()
        return part

    def choose(self, values: str = "auto") -> tuple[str, Values]:
        """Choose the matrix to read: counts, or values from which they can be recovered, before proportions.

        Among these, the matrix with most features wins: cell totals need all genes, and often X and the layers hold
        only the variable ones, and raw all. Whole counts win among matrices of the same features, then the usual names.

        Parameters
        ----------
        values : counts, log1p or cpm if the user states what X holds, or auto

        Returns
        -------
        place : key of `matrices`
        values : what the matrix there holds

        Raises
        ------
        UserError
            If no matrix can be used; the message gives what each holds and what to do.
        """
        places = {"X": self.matrices["X"]} if values != "auto" and "X" in self.matrices else self.matrices
        found = {
            place: detect_values(matrix.sample(SAMPLE), values, is_open=self.modality == "atac")
            for place, (matrix, _) in places.items()
        }
        has_others = any(values.usable and values.exact for place, values in found.items() if not _is_spliced(place))

        def order(place: str) -> tuple:
            held = found[place]
            is_last = not held.usable or (has_others and _is_spliced(place))
            return is_last, not held.exact, -places[place][0].shape[1], held.rank

        place = min(found, key=order)
        if found[place].usable:
            return place, found[place]
        for place, (matrix, _) in places.items():
            if found[place].kind in ("missing", "infinite"):
                for start, block in matrix.blocks():
                    self.check_values(place, block, start)  # raises an error that names the cell
        raise UserError(f"{self.path}: {self.modality} has " + _refusal(found, values))

    def check_values(self, place: str, block: csr_matrix, start: int) -> None:
        """Check that all values of a block are finite and not negative.

        Parameters
        ----------
        place : key of the matrix in `matrices`
        block : [some cells, features] of it
        start : number of the block's first cell

        Raises
        ------
        UserError
            If a value is missing, infinite or negative; the message names the cell.
        """
        counts = "save the raw counts in layers['counts']"
        missing = "write 0 where nothing was counted, or drop the cells or features that were not measured"
        for bad, what, remedy in (
            (np.isnan(block.data), "a missing value (NaN)", missing),
            (np.isinf(block.data), "an infinite value", counts),
            (block.data < 0, "a negative value", counts),
        ):
            if bad.any():
                row = int(np.searchsorted(block.indptr, np.flatnonzero(bad)[0], side="right") - 1)
                cell = self.obs.index[start + row]
                raise UserError(f"{self.path}: {place} of {self.modality} has {what} in cell {cell}; {remedy}")


def _preference(place: str) -> int:
    """Return the position of a place in the order in which counts are looked for."""
    order = [*(f"layers['{name}']" for name in COUNT_LAYERS[:-1]), "x", "raw", f"layers['{COUNT_LAYERS[-1]}']"]
    return order.index(place.lower())


def _is_spliced(place: str) -> bool:
    return place.lower() == f"layers['{COUNT_LAYERS[-1]}']"


def _stated_modality(var: pd.DataFrame) -> str | None:
    """Return the modality that all of `var["feature_types"]` agree on, or None."""
    kinds = set(feature_modalities(var["feature_types"].unique())) if "feature_types" in var else set()
    return kinds.pop() if kinds in ({"rna"}, {"atac"}) else None


def _is_peaks(var: pd.DataFrame) -> bool:
    """Return whether features are peaks, by their names or by columns with intervals.

    Genes may have such columns too, so columns only count where the names are numbered and not those of genes.
    """
    if looks_like_peaks(var.index):
        return True
    are_numbered = len({re.sub(r"\d+", "", name) for name in var.index}) < max(2, 0.05 * len(var))  # peak_1, peak_2 …
    return interval_columns(var) is not None and are_numbered and share_known(var.index) < 0.2


def _refusal(found: dict[str, Values], asked: str) -> str:
    """Return the end of an error message: what each matrix holds, and what the user can do."""
    held = "; ".join(f"{values} in {place}" for place, values in found.items())
    kinds = {values.kind for values in found.values()}
    if kinds == {"empty"}:
        return f"{held}; there is nothing to learn from or to label"
    if asked == "log1p":
        return f"values in X that are too large for logarithms; leave out --values {asked}"
    ways = []
    if "negative" in kinds:
        ways.append("save the raw counts in layers['counts'] before scaling")
    if "fractional" in kinds:
        ways.append(
            "save the raw counts in layers['counts'], use the values as proportions of a cell's total with "
            "--values cpm, or take them as estimated counts with --values counts"
        )
    return f"{held}; {', or '.join(dict.fromkeys(ways))}"
