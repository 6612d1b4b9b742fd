"""Principal components of cells, for baselines."""

import numpy as np
from scipy import sparse
from sklearn.decomposition import PCA

from utils.errors import UserError


def fit_pca(x, n_components: int, seed: int) -> PCA:
    """Fit principal components of the rows of x, centred implicitly, so that sparse input stays sparse.

    There are fewer components if there are fewer rows or columns; with fewer than two of either, it is a UserError.
    """
    if min(x.shape) < 2:
        raise UserError("There are fewer than two training cells or fewer than two features: give a file with more.")
    n_components = max(1, min(n_components, min(x.shape) - 1))
    return PCA(n_components, svd_solver="arpack", random_state=seed).fit(as_rows(x))


def component_scale(z: np.ndarray, whitened: bool) -> np.ndarray:
    """Return what to divide components [cells, components] by: their own spreads if whitened, or one for all.

    Unwhitened components keep their relative sizes. Their mean variance is then 1, as that of whitened ones, so that
    the best penalty of a classifier is about the same for both.
    """
    variance = np.maximum(z.var(0), 1e-12)
    return np.sqrt(variance if whitened else variance.mean())


def as_rows(matrix):
    """Return a sparse matrix as CSR, anything else as an array: both can be indexed by rows."""
    return matrix.tocsr() if sparse.issparse(matrix) else np.asarray(matrix)
