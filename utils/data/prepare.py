"""From raw counts to what the models read: the one normalisation, the one binarisation, the one alignment."""

from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy.sparse import csr_matrix

from utils.data.genes import detect_species, sum_duplicates, update_symbols
from utils.data.peaks import format_peaks, genome_order, parse_peaks
from utils.errors import UserError

LOG_BASE = 2


def find_counts(adata: ad.AnnData, path: str | Path) -> tuple[csr_matrix, pd.Index, str]:
    """The raw counts of a modality, from where they usually stand.

    Parameters
    ----------
    adata : one modality
    path : its file, for the error message

    Returns
    -------
    counts [cells, features] float32, the features' names, and where they were found (`X`, `layers[...]`, `raw`)

    Raises
    ------
    UserError
        If none of these places holds non-negative integers.
    """
    places = {"layers['counts']": (adata.layers["counts"], adata.var_names)} if "counts" in adata.layers else {}
    places["X"] = adata.X, adata.var_names
    if adata.raw is not None:
        places["raw"] = (adata.raw.X, adata.raw.var_names)
    for place, (matrix, names) in places.items():
        if matrix is None:
            continue
        counts = csr_matrix(matrix).astype(np.float32)
        if np.all(np.isfinite(counts.data) & (counts.data >= 0) & (counts.data == np.floor(counts.data))):
            counts.eliminate_zeros()
            counts.sum_duplicates()
            return counts, pd.Index(names.astype(str)), place
    raise UserError(
        f"{path}: no raw counts in {', '.join(places)} (values are negative, fractional or missing); "
        "save the integer counts in X or in layers['counts']"
    )


def log_normalise(counts: csr_matrix, target_sum: float) -> csr_matrix:
    """Counts → log2(1 + counts · target_sum / cell total), by scanpy.

    Parameters
    ----------
    counts : [cells, genes]
    target_sum : counts per cell after scaling

    Returns
    -------
    [cells, genes] float32 CSR; cells without counts stay empty
    """
    adata = ad.AnnData(counts.astype(np.float32, copy=True))
    sc.pp.normalize_total(adata, target_sum=target_sum)
    sc.pp.log1p(adata, base=LOG_BASE)
    return csr_matrix(adata.X)


def choose_target_sum(target_sum: str, totals: np.ndarray) -> float:
    """Read `--target_sum`: a number, or `median` for the median total of the cells given (training cells only)."""
    if target_sum == "median":
        return float(np.median(totals[totals > 0]))
    try:
        number = float(target_sum)
    except ValueError:
        number = 0.0
    if not 0 < number < np.inf:
        raise UserError(f"--target_sum {target_sum!r} is neither 'median' nor a positive number; try --target_sum 1e4")
    return number


def harmonise_genes(counts: csr_matrix, genes: Sequence[str], species: str) -> tuple[csr_matrix, np.ndarray, dict]:
    """Bring human symbols up to date and sum the genes that then share one.

    Parameters
    ----------
    counts : [cells, genes]
    genes : symbols
    species : human, mouse (left as they are) or auto (by spelling)

    Returns
    -------
    counts [cells, genes'], symbols [genes'], and a report of what was done
    """
    if species == "auto":
        species = detect_species(genes)
    report = {"species": species, "genes_in_file": len(genes)}
    symbols = np.asarray(genes, dtype=object)
    if species == "human":
        update = update_symbols(genes)
        symbols = update.symbols
        report |= {
            "symbols_updated": len(update.updated),
            "symbols_ambiguous": sorted(update.ambiguous),
            "symbols_unknown": len(update.unknown),
        }
    counts, symbols = sum_duplicates(counts, symbols)
    return counts, symbols, report | {"genes_after_merging": len(symbols)}


def align_features(values: csr_matrix, names: Sequence[str], reference: Sequence[str]) -> tuple[csr_matrix, float]:
    """Put columns into the reference's order; absent ones become empty, extra ones are dropped.

    Returns
    -------
    [cells, len(reference)] CSR, and the share of the reference's features that were found
    """
    position = pd.Index(reference).get_indexer(pd.Index(names))
    kept = np.flatnonzero(position >= 0)
    selector = csr_matrix(
        (np.ones(len(kept), np.float32), (kept, position[kept])), shape=(len(names), len(reference)), dtype=np.float32
    )
    aligned = (values @ selector).tocsr()
    aligned.sort_indices()
    return aligned, len(kept) / max(len(reference), 1)


def sort_peaks(counts: csr_matrix, names: Sequence[str], var: pd.DataFrame | None) -> tuple[csr_matrix, np.ndarray]:
    """Columns in genome order, with names of the form chr1:10-20; a peak that occurs twice is merged."""
    intervals = parse_peaks(names, var)
    order = genome_order(intervals)
    counts, peaks = sum_duplicates(counts[:, order].tocsr(), format_peaks(intervals.iloc[order]))
    return counts, peaks


def binarise(counts: csr_matrix) -> csr_matrix:
    """1 where a peak has any fragment; float32 CSR with sorted indices."""
    is_open = counts.copy()
    is_open.eliminate_zeros()
    is_open.sort_indices()
    is_open.data = np.ones_like(is_open.data, dtype=np.float32)
    return is_open
