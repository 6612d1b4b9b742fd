"""A number for the values of each cell, by which a run recognises its cells without reading them."""

import numpy as np
from scipy.sparse import csr_matrix

_FEATURE, _VALUE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
"""Odd multipliers, which spread numbers over all 64 bits."""
_MIX = np.uint64(0xBF58476D1CE4E5B9)
"""First multiplier of SplitMix64's finaliser (Steele, Lea & Flood 2014)."""


def cell_hashes(block: csr_matrix) -> np.ndarray:
    """Hash the values of cells: [cells] uint64, the sum over a cell's entries of a hash of feature and value.

    Stored zeros and the order of a cell's entries do not matter. The hash is made to notice changes, not forgery.

    Parameters
    ----------
    block : [cells, features]
    """
    values = block.data.astype(np.float32).view(np.uint32).astype(np.uint64)
    with np.errstate(over="ignore"):
        entry = (block.indices.astype(np.uint64) + np.uint64(1)) * _FEATURE ^ (values + np.uint64(1)) * _VALUE
        entry = (entry ^ (entry >> np.uint64(30))) * _MIX
        entry = (entry ^ (entry >> np.uint64(31))) * (block.data != 0)
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(entry, dtype=np.uint64)])
        return sums[block.indptr[1:]] - sums[block.indptr[:-1]]
