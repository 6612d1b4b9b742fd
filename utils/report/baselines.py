"""Simple predictors every model has to beat: same training cells, tuned on the same validation cells."""

import copy

import numpy as np
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MaxAbsScaler, StandardScaler
from threadpoolctl import threadpool_limits

from utils.errors import UserError
from utils.report.metrics import classification_scores

# Inverse strengths of the L2 penalty that are tried, weak fits first: each fit starts from the one before.
C_GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def logistic_regression(x_train, y_train, x_val=None, y_val=None, seed: int = 0) -> tuple[Pipeline, float]:
    """Multinomial logistic regression with an L2 penalty on log-normalised expression.

    Each gene is divided by its largest training value, which keeps zeros and hence sparsity.

    Parameters
    ----------
    x_train : sparse or dense matrix [cells, genes]
        Log-normalised values.
    y_train : array-like of labels [cells]
    x_val, y_val : as above, optional
        Validation cells; they choose the penalty (mean of accuracy and macro-F1) and are not fitted. Without
        validation cells of at least two classes, C is 1.
    seed : int
        For the interface's sake: this solver draws nothing.

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
    x_train, y_train, x_val=None, y_val=None, seed: int = 0, n_components: int = 50
) -> tuple[Pipeline, float]:
    """Logistic regression on principal components: the usual quick annotation of single cells.

    The components are those of the training cells, centred (implicitly: sparse input stays sparse) and brought to unit
    variance.

    Parameters
    ----------
    x_train, y_train, x_val, y_val, seed
        As in :func:`logistic_regression`; `seed` starts the eigensolver.
    n_components : int
        At most so many; fewer when there are fewer cells or genes.

    Returns
    -------
    estimator, c
        As in :func:`logistic_regression`.

    Raises
    ------
    UserError
        The training cells hold fewer than two classes.
    """
    n_components = max(1, min(n_components, min(x_train.shape) - 1))
    pca = PCA(n_components, svd_solver="arpack", random_state=seed)
    return _tuned([("pca", pca), ("scale", StandardScaler())], x_train, y_train, x_val, y_val, seed)


@threadpool_limits.wrap(limits=1)  # matrices this thin gain nothing from threads, and lose a lot where cores are shared
def _tuned(steps: list, x_train, y_train, x_val, y_val, seed: int) -> tuple[Pipeline, float]:
    y_train = np.asarray(y_train)
    if len(np.unique(y_train)) < 2:
        raise UserError(
            "The training cells hold fewer than two cell types: give a file with at least two to tell apart."
        )
    transform = Pipeline(steps)
    z_train = transform.fit_transform(_rows(x_train))
    # Tight enough that the fit before leaves no trace; and a fit that stops early would be a handicapped baseline.
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
        if score > best_score:  # on a tie the stronger penalty stays
            best, best_score = copy.deepcopy(classifier), score
    return Pipeline([*transform.steps, ("classify", best)]), float(best.C)


def _rows(matrix):
    return matrix.tocsr() if sparse.issparse(matrix) else np.asarray(matrix)


def mean_accessibility(accessibility_train) -> np.ndarray:
    """Share of the training cells in which each peak is open: the same prediction for every cell.

    Parameters
    ----------
    accessibility_train : sparse or dense matrix [cells, peaks]
        Open where not zero.

    Returns
    -------
    ndarray of float32 [peaks]
    """
    matrix = accessibility_train
    n_open = (matrix != 0).sum(axis=0)
    return (np.asarray(n_open, dtype=np.float64).ravel() / matrix.shape[0]).astype(np.float32)
