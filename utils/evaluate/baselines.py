"""Baselines: simple predictors, fitted on the model's training cells and tuned on the same validation cells."""

import copy

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MaxAbsScaler, StandardScaler
from threadpoolctl import threadpool_limits

from utils.errors import UserError
from utils.evaluate.metrics import MIN_OPEN, classification_scores, feature_auroc

C_GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Inverse strengths of the L2 penalty to try, strongest penalty first: each fit starts from the one before."""
NEIGHBOURS = (5, 10, 15, 30, 50, 100, 200, 400)
"""Numbers of neighbours to try."""
ALPHA_GRID = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6)
"""Penalties of ridge regression to try; a penalty of n weighs as much as n cells."""
COMPONENTS_GRID = (10, 20, 50)
"""Numbers of principal components that ridge regression may use."""
TUNED_ON = 2000
"""Peaks on which ridge regression is tuned: more cost time, and change the mean AUROC little."""


def logistic_regression(x_train, y_train, x_val=None, y_val=None, seed: int = 0, x_all=None) -> tuple[Pipeline, float]:
    """Fit multinomial logistic regression with an L2 penalty on log-normalised expression.

    Each gene is divided by its largest training value. This keeps zeros, so sparse input stays sparse.

    Parameters
    ----------
    x_train : sparse or dense matrix [cells, genes]
        Log-normalised values.
    y_train : array-like of labels [cells]
    x_val, y_val : as above, optional
        Validation cells. They are used only to choose the penalty, by the mean of accuracy and macro-F1. Without
        validation cells of at least two classes, C is 1.
    seed, x_all
        Unused; all baselines have the same parameters.

    Returns
    -------
    estimator : Pipeline
        Fitted on the training cells; `predict` and `predict_proba` take log-normalised values.
    c : float
        The chosen inverse strength of the penalty.

    Raises
    ------
    UserError
        The training cells hold fewer than two classes.
    """
    return _tuned([("scale", MaxAbsScaler())], x_train, y_train, x_val, y_val, seed)


def pca_logistic_regression(
    x_train, y_train, x_val=None, y_val=None, seed: int = 0, x_all=None, n_components: int = 50
) -> tuple[Pipeline, float]:
    """Fit logistic regression on principal components, a common quick way to annotate cells.

    The components are computed from centred training cells (centred implicitly, so sparse input stays sparse) and
    scaled to unit variance.

    Parameters
    ----------
    x_train, y_train, x_val, y_val, seed
        As in :func:`logistic_regression`; `seed` sets the start of the eigensolver.
    x_all : matrix [cells, genes], optional
        Training cells with and without a label; the components are computed from them. By default `x_train`.
    n_components : int
        Number of components; fewer if there are fewer cells or genes.

    Returns
    -------
    estimator, c
        As in :func:`logistic_regression`.

    Raises
    ------
    UserError
        The training cells hold fewer than two classes.
    """
    pca = _pca(x_train if x_all is None else x_all, n_components, seed)
    steps = [("pca", FrozenEstimator(pca)), ("scale", StandardScaler())]
    return _tuned(steps, x_train, y_train, x_val, y_val, seed)


@threadpool_limits.wrap(limits=1)  # threads do not speed up such small matrices, and slow them down on busy cores
def _tuned(steps: list, x_train, y_train, x_val, y_val, seed: int) -> tuple[Pipeline, float]:
    """Fit the transforming steps and logistic regression; choose C on the validation cells."""
    y_train = np.asarray(y_train)
    if len(np.unique(y_train)) < 2:
        raise UserError("The training cells have fewer than two cell types: give a file with at least two.")
    transform = Pipeline(steps)
    z_train = transform.fit_transform(_rows(x_train))
    # The tolerance is so small that the result does not depend on the fit before, from which each fit starts. And a fit
    # that stopped early would be a weaker baseline.
    classifier = LogisticRegression(max_iter=2000, tol=1e-5, random_state=seed, warm_start=True)

    if x_val is None or y_val is None or len(np.unique(np.asarray(y_val))) < 2:
        best = classifier.set_params(C=1.0).fit(z_train, y_train)
        return Pipeline([*transform.steps, ("classify", best)]), 1.0

    z_val, y_val = transform.transform(_rows(x_val)), np.asarray(y_val)
    best, best_score = None, -np.inf
    for c in C_GRID:
        classifier.set_params(C=c).fit(z_train, y_train)
        scores = classification_scores(y_val, classifier.predict(z_val))
        score = (scores["accuracy"] + scores["macro_f1"]) / 2
        if score > best_score:  # on a tie, keep the stronger penalty
            best, best_score = copy.deepcopy(classifier), score
    return Pipeline([*transform.steps, ("classify", best)]), float(best.C)


def self_trained_logistic_regression(x_train, y_train, x_val=None, y_val=None, seed: int = 0, x_all=None):
    """Fit logistic regression on the labelled cells, then again on all training cells with its predictions as labels.

    Other parameters, returns and errors are those of :func:`logistic_regression`.

    Parameters
    ----------
    x_all : matrix [cells, genes]
        Training cells with and without a label. Labelled cells enter twice: with their label and with the prediction.
    """
    first, _ = logistic_regression(x_train, y_train, x_val, y_val, seed)
    x, y = sparse.vstack([x_train, x_all], format="csr"), np.concatenate([y_train, first.predict(x_all)])
    return logistic_regression(x, y, x_val, y_val, seed)


def majority_class(x_train, y_train, x_val=None, y_val=None, seed: int = 0, x_all=None) -> tuple[DummyClassifier, None]:
    """Predict the most frequent training type for every cell."""
    return DummyClassifier(strategy="most_frequent").fit(x_train, y_train), None


def nearest_neighbours(x_train, y_train, x_val=None, y_val=None, seed: int = 0, x_all=None, n_components: int = 50):
    """Predict the majority type of the nearest training cells on principal components.

    Parameters and errors are those of :func:`pca_logistic_regression`. The number of neighbours is chosen on validation
    cells; it is 15 without them.

    Returns
    -------
    estimator : Pipeline
    k : int
        The number of neighbours.
    """
    y_train = np.asarray(y_train)
    pca = _pca(x_train if x_all is None else x_all, n_components, seed)
    z_train = pca.transform(_rows(x_train))
    choices = [k for k in NEIGHBOURS if k <= len(z_train)] or [1]
    fits = {k: KNeighborsClassifier(k).fit(z_train, y_train) for k in choices}
    k = 15 if 15 in fits else choices[-1]
    if y_val is not None and len(np.unique(np.asarray(y_val))) > 1:
        z_val = pca.transform(_rows(x_val))
        scores = {k: classification_scores(y_val, fit.predict(z_val)) for k, fit in fits.items()}
        k = max(scores, key=lambda k: scores[k]["accuracy"] + scores[k]["macro_f1"])
    return Pipeline([("pca", pca), ("classify", fits[k])]), k


def _pca(x, n_components: int, seed: int) -> PCA:
    """Fit principal components of the rows of x."""
    if min(x.shape) < 2:
        raise UserError("There are fewer than two training cells or fewer than two features: give a file with more.")
    n_components = max(1, min(n_components, min(x.shape) - 1))
    return PCA(n_components, svd_solver="arpack", random_state=seed).fit(_rows(x))


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
    pca = _pca(x_train, max(COMPONENTS_GRID), seed)
    # The intercept comes first, so that fewer components are the first columns.
    with_one = lambda x: np.hstack([np.ones((x.shape[0], 1)), pca.transform(_rows(x))]).astype(np.float32)
    z = with_one(x_train)
    gram, moments = z.T @ z, _dense(z.T @ _rows(y_train))
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
            truth, some = _rows(y_val)[:, scored], moments[:, scored]
            auroc = lambda k, a: np.nanmean(feature_auroc(truth, z_val[:, : k + 1] @ weights(k, a, some), MIN_OPEN))
            best = max(grid, key=lambda choice: auroc(*choice))
        else:
            val_gram, val_moments = z_val.T @ z_val, _dense(z_val.T @ _rows(y_val))

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
    n_open = np.asarray((_rows(y_val) != 0).sum(0)).ravel()
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
    pca = _pca(x_train, 50, seed)
    index = NearestNeighbors().fit(pca.transform(_rows(x_train)))
    right = sparse.csr_matrix(y_train, dtype=np.float32)

    def weights(x, k: int) -> sparse.csr_matrix:
        return index.kneighbors_graph(pca.transform(_rows(x)), k).astype(np.float32) / k

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


def _rows(matrix):
    """Return a sparse matrix as CSR, anything else as an array: both can be indexed by rows."""
    return matrix.tocsr() if sparse.issparse(matrix) else np.asarray(matrix)


TYPE_BASELINES = {
    "majority class": majority_class,
    "nearest neighbours": nearest_neighbours,
    "logistic regression": logistic_regression,
    "PCA + logistic regression": pca_logistic_regression,
}
FEW_LABEL_BASELINES = {"logistic regression, self-trained": self_trained_logistic_regression}
"""Further baselines, for data in which some training cells have no label."""
