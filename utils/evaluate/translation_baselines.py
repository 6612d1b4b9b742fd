"""Simple predictors of one modality from the other, fitted on training cells and tuned on validation cells."""

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.neighbors import NearestNeighbors

from utils.evaluate.metrics import MIN_OPEN, feature_auroc
from utils.evaluate.principal_components import as_rows, fit_pca

NEIGHBOURS = (5, 10, 15, 30, 50, 100, 200, 400)
"""Numbers of neighbours to try."""
ALPHA_GRID = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6)
"""Penalties of ridge regression to try; a penalty of n weighs as much as n cells."""
COMPONENTS_GRID = (10, 20, 50)
"""Numbers of principal components that ridge regression may use."""
TUNED_ON = 2000
"""Peaks on which ridge regression is tuned: more cost time, and change the mean AUROC little."""


def ridge_translation(
    x_train, y_train, x_val, y_val, x_test, seed: int = 0, ranking: bool = False
) -> tuple[np.ndarray, np.ndarray, str]:
    """Predict one modality from principal components of the other, by ridge regression.

    Parameters
    ----------
    x_train, x_val, x_test : measured modality [cells, features]
    y_train, y_val : predicted modality [cells, features]
    seed : random seed of the eigensolver, and of the draw of features
    ranking : choose the number of components and the penalty by the mean AUROC of peaks on validation cells (of at most
        `TUNED_ON` peaks, drawn from those that are open and closed often enough to be scored), not by squared error

    Returns
    -------
    left, right : arrays [test cells, k] and [k, features], whose product left @ right is the prediction
    setting : the chosen number of components and penalty, in words; 50 and 100 without validation cells
    """
    pca = fit_pca(x_train, max(COMPONENTS_GRID), seed)
    # The intercept comes first, so that fewer components are the first columns.
    with_one = lambda x: np.hstack([np.ones((x.shape[0], 1)), pca.transform(as_rows(x))]).astype(np.float32)
    z = with_one(x_train)
    gram, moments = z.T @ z, _dense(z.T @ as_rows(y_train))
    penalised = np.diag([0.0] + [1.0] * (len(gram) - 1))  # all weights except the intercept

    def weights(k: int, alpha: float, moments=moments) -> np.ndarray:
        part = slice(k + 1)
        return np.linalg.solve((gram + alpha * penalised)[part, part], moments[part]).astype(np.float32)

    n_components = len(gram) - 1
    best = n_components, 100.0
    if x_val.shape[0]:
        z_val = with_one(x_val)
        grid = [(k, a) for k in sorted({min(k, n_components) for k in COMPONENTS_GRID}) for a in ALPHA_GRID]
        scored = _scored_peaks(y_val, seed) if ranking else np.array([], dtype=int)
        if len(scored):
            truth, some = as_rows(y_val)[:, scored], moments[:, scored]
            auroc = lambda k, a: np.nanmean(feature_auroc(truth, z_val[:, : k + 1] @ weights(k, a, some), MIN_OPEN))
            best = max(grid, key=lambda choice: auroc(*choice))
        else:
            val_gram, val_moments = z_val.T @ z_val, _dense(z_val.T @ as_rows(y_val))

            # Σ(zw - y)² = Σ(zw)² - 2 Σ(zw · y) + Σy²; the last term is the same for all choices and is left out.
            def error(k: int, alpha: float) -> float:
                w, part = weights(k, alpha), slice(k + 1)
                square = ((val_gram[part, part] @ w) * w).sum(dtype=np.float64)
                return float(square - 2 * (val_moments[part] * w).sum(dtype=np.float64))

            best = min(grid, key=lambda choice: error(*choice))
    left = with_one(x_test)[:, : best[0] + 1]
    return left, weights(*best), f"{best[0]} components, penalty {best[1]:g}"


def _scored_peaks(y_val, seed: int) -> np.ndarray:
    """Return at most `TUNED_ON` peaks, drawn from those that validation cells can score."""
    n_open = np.asarray((as_rows(y_val) != 0).sum(0)).ravel()
    scored = np.flatnonzero((n_open >= MIN_OPEN) & (y_val.shape[0] - n_open >= MIN_OPEN))
    return np.sort(np.random.default_rng(seed).permutation(scored)[:TUNED_ON])


def depth_translation(
    n_train: np.ndarray, y_train, n_test: np.ndarray, types_train=None, types_test=None
) -> tuple[np.ndarray, np.ndarray, None]:
    """Predict one modality as its mean over training cells times the depth of a cell: no cell's content is used.

    The depth is the total of the predicted modality that is expected from the number of features detected in the
    measured one; both logarithms are related by a line, fitted on training cells.

    Parameters
    ----------
    n_train, n_test : [cells] features of the measured modality that are detected in each cell
    y_train : predicted modality [cells, features]
    types_train, types_test : [cells] types, None or NaN where unknown; each type then has its own mean, and a cell of
        a type without training cells gets the mean over all. The types of the test cells are those of their labels,
        so this row knows more than a model does.

    Returns
    -------
    left, right, setting : as in :func:`ridge_translation`; there is nothing to choose
    """
    y_train = sparse.csr_matrix(y_train)
    log_total = np.log1p(np.asarray(y_train.sum(1), dtype=np.float64).ravel())
    log_n, log_n_test = np.log1p(np.asarray(n_train, float)), np.log1p(np.asarray(n_test, float))
    centred = log_n - log_n.mean()
    slope = (centred @ log_total) / max(centred @ centred, 1e-12)
    depth, depth_test = np.exp(slope * centred), np.exp(slope * (log_n_test - log_n.mean()))

    names = [] if types_train is None else sorted(set(np.asarray(types_train)[pd.notna(types_train)]))
    codes = pd.Index(names).get_indexer(types_train) if names else np.full(len(depth), -1)
    codes_test = pd.Index(names).get_indexer(types_test) if names else np.full(len(depth_test), -1)
    groups = [codes == i for i in range(len(names))] + [np.ones(len(depth), dtype=bool)]  # the last is all cells
    right = np.vstack([np.asarray(y_train[group].mean(0)) for group in groups]).astype(np.float32)
    typical = np.array([depth[group].mean() for group in groups])
    left = np.zeros((len(depth_test), len(groups)), dtype=np.float32)
    left[np.arange(len(left)), codes_test] = depth_test / typical[codes_test]  # -1 is the column of all cells
    return left, right, None


def neighbour_translation(x_train, y_train, x_val, y_val, x_test, seed: int = 0):
    """Predict one modality as its mean over the nearest training cells on principal components of the other.

    Parameters and returns are those of :func:`ridge_translation`, with the number of neighbours as the setting; `left`
    and `right` are sparse.
    """
    pca = fit_pca(x_train, 50, seed)
    index = NearestNeighbors().fit(pca.transform(as_rows(x_train)))
    right = sparse.csr_matrix(y_train, dtype=np.float32)

    def weights(x, k: int) -> sparse.csr_matrix:
        return index.kneighbors_graph(pca.transform(as_rows(x)), k).astype(np.float32) / k

    def error(k: int) -> float:  # squared error without its constant term, as in ridge_translation
        near, truth, total = weights(x_val, k), sparse.csr_matrix(y_val), 0.0
        for start in range(0, near.shape[0], 64):  # in blocks, since a mean over many cells is nearly dense
            mean, part = near[start : start + 64] @ right, truth[start : start + 64]
            total += (mean.data**2).sum(dtype=np.float64) - 2 * mean.multiply(part).sum(dtype=np.float64)
        return total

    choices = [k for k in NEIGHBOURS if k <= right.shape[0]] or [1]
    k = min(choices, key=error) if x_val.shape[0] else min(15, right.shape[0])
    return weights(x_test, k), right, k


def _dense(matrix) -> np.ndarray:
    """Return a matrix as a dense float64 array."""
    return np.asarray(matrix.todense() if sparse.issparse(matrix) else matrix, dtype=np.float64)
