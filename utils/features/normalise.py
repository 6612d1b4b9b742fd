"""Turn counts into the values that models read: normalised expression for genes, open or closed for peaks."""

import anndata as ad
import numpy as np
from scipy.sparse import csr_matrix

from utils.errors import UserError

LOG_BASE = 2
"""Base of the logarithm: an increase by 1 doubles the expression."""


def log_normalise(counts: csr_matrix, target_sum: float) -> csr_matrix:
    """Return log2(1 + counts · target_sum / cell total), computed by scanpy.

    Parameters
    ----------
    counts : [cells, genes]
    target_sum : total of each cell after scaling

    Returns
    -------
    [cells, genes] float32 CSR; cells without counts stay empty
    """
    import scanpy as sc  # here, because it takes seconds to import

    adata = ad.AnnData(counts.astype(np.float32, copy=True))
    sc.pp.normalize_total(adata, target_sum=target_sum)
    sc.pp.log1p(adata, base=LOG_BASE)
    return csr_matrix(adata.X)


def choose_target_sum(target_sum: str, totals: np.ndarray) -> float:
    """Return the total that cells are scaled to.

    Parameters
    ----------
    target_sum : value of --target_sum: a number, or `median` for the median total of the training cells
    totals : [training cells] counts per cell

    Raises
    ------
    UserError
        If the flag is neither `median` nor a positive number, or no training cell has a count.
    """
    if target_sum == "median":
        if not (totals > 0).any():
            raise UserError("--target_sum median: no training cell has a count; give a number such as --target_sum 1e4")
        return float(np.median(totals[totals > 0]))
    try:
        number = float(target_sum)
    except ValueError:
        number = 0.0
    if not 0 < number < np.inf:
        raise UserError(f"--target_sum {target_sum!r} is neither 'median' nor a positive number; try --target_sum 1e4")
    return number


def binarise(counts: csr_matrix) -> csr_matrix:
    """Return [cells, peaks] float32 CSR with sorted indices: 1 where a peak has any fragment."""
    is_open = counts.copy()
    is_open.eliminate_zeros()
    is_open.sort_indices()
    is_open.data = np.ones_like(is_open.data, dtype=np.float32)
    return is_open


def model_values(modality: str, counts: csr_matrix, target_sum: float | None) -> csr_matrix:
    """Turn counts into the values that the models read; preprocessing and prediction both use this function.

    Parameters
    ----------
    modality : rna (log-normalised) or atac (binarised)
    counts : [cells, features]
    target_sum : RNA counts per cell after scaling; ATAC does not use it

    Returns
    -------
    [cells, features] float32 CSR
    """
    return log_normalise(counts, target_sum) if modality == "rna" else binarise(counts)
