"""Cells of four types with marker genes, for the tests of baselines."""

import numpy as np
from scipy import sparse


def cells(n, seed, noise=1.0):
    """Sparse log values [n, 120] of four cell types; each has 12 marker genes."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, size=n, p=[0.5, 0.3, 0.15, 0.05])
    rate = np.full((4, 120), 0.3 * noise)
    for k in range(4):
        rate[k, 12 * k : 12 * k + 12] += 0.6
    values = np.log2(1 + rng.poisson(rate[kind])).astype(np.float32)
    return sparse.csr_matrix(values), np.array(["T", "B", "NK", "mono"], dtype=object)[kind]
