"""Score predictions of one modality from the other.

A prediction [cells, features] can be too large for memory. It is given as two factors, left [cells, k] and right
[k, features], and only blocks of their product are computed.
"""

import math

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, issparse
from scipy.special import expit

from models.scmomer import ATAC_JOINT_OPEN_WEIGHT


def product(left, right) -> np.ndarray:
    """Return left @ right as a dense float32 array."""
    product = left @ right
    return np.asarray(product.todense() if issparse(product) else product, dtype=np.float32)


def unweighted_probability(logits: np.ndarray) -> np.ndarray:
    """Return the probability that a peak is open, from the logits of the joint model's decoder.

    That decoder was trained with open peaks weighted w times, so its odds are w times too large.
    """
    return expit(logits - math.log(ATAC_JOINT_OPEN_WEIGHT))


def squared_error(left, right, truth: csr_matrix) -> float:
    """Return the squared error of left @ right, averaged over cells and features."""
    blocks = range(0, truth.shape[0], 1024)
    errors = [np.square(product(left[b : b + 1024], right) - truth[b : b + 1024].toarray()).sum() for b in blocks]
    return float(sum(errors) / truth.shape[0] / truth.shape[1])


def pseudobulk_rmse(left, right, truth: csr_matrix, types: np.ndarray, transform=None) -> float:
    """Return the root mean squared error of mean profiles per type, over features and types with at least ten cells.

    Parameters
    ----------
    left, right : [cells, k] and [k, features]; their product is the prediction
    truth : measured values [cells, features]
    types : cell types [cells], None where unknown
    transform : applied to the prediction, to bring it to the scale of `truth`; None if it is on that scale

    Returns
    -------
    float, NaN if no type has ten cells
    """
    names, sizes = np.unique(types[pd.notna(types)].astype(str), return_counts=True)
    errors = []
    for name in names[sizes >= 10]:
        mine = np.flatnonzero(types == name)
        total = np.zeros(truth.shape[1])
        for start in range(0, len(mine), 512):
            predicted = product(left[mine[start : start + 512]], right)
            total += (predicted if transform is None else transform(predicted)).sum(0, dtype=np.float64)
        errors.append(np.square(total / len(mine) - np.asarray(truth[mine].mean(0)).ravel()).mean())
    return float(np.sqrt(np.mean(errors))) if errors else float("nan")
