"""Simple classifiers of cell types, fitted on the model's training cells and tuned on the same validation cells.

Each tries `tuning.BUDGET` settings and keeps the one with the best mean of accuracy and macro-F1 on validation cells.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import MaxAbsScaler
from threadpoolctl import threadpool_limits

from utils.errors import UserError
from utils.evaluate.boxed import MOST_FEATURES, even_rows
from utils.evaluate.calibration import fit_temperature, share_ratios, with_shares
from utils.evaluate.dropout_mlp import Encoder, class_weights, fit_denoiser, fit_mlp, most_steps
from utils.evaluate.label_spreading import spread_labels
from utils.evaluate.metrics import classification_scores
from utils.evaluate.principal_components import as_rows, component_scale, fit_pca
from utils.evaluate.tuning import Tuned, tune

C_GRID = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Inverse strengths of the L2 penalty to choose from."""
BALANCES = (0.0, 0.5, 1.0)
"""A training cell weighs (cells of its type)^-balance; 1 is the "balanced" of scikit-learn."""
COMPONENTS = (5, 10, 20, 50, 100, 200)
"""Numbers of principal components to choose from."""
NEAR_COMPONENTS = 30
"""Principal components by which labels are spread over neighbours."""
NEIGHBOURS = (1, 2, 5, 10, 15, 30, 50, 100, 200, 400, 800)
"""Numbers of neighbours to choose from."""
MLP_AXES = {
    "steps": (50, 100, 200, 400, 800, 1600),
    "balance": BALANCES,
    "dropout": (0.0, 0.25, 0.5, 0.75),
    "hidden": (64, 128, 256, 512),
    "decay": (0.0, 0.01, 0.1, 1.0),
}
MLP_START = {"steps": 400, "balance": 0.5, "dropout": 0.5, "hidden": 256, "decay": 0.01}
DENOISER_AXES = {name: values for name, values in MLP_AXES.items() if name != "hidden"}
DENOISER_AXES = {"start_rate": (0.0, 0.1, 0.3, 1.0)} | DENOISER_AXES
DENOISER_START = {name: MLP_START.get(name, 0.3) for name in DENOISER_AXES}
LEAST_PROBABILITY = 1e-6
"""Of nearest neighbours, which give zeros."""
MOST_TRAINING, MOST_VALIDATION = 50_000, 10_000
"""Cells that baselines are fitted and tuned on, at most, so that time and memory are bounded on atlases."""


class Unlabelled:
    """What can be learned from training cells without a label: computed when first needed, and once.

    Parameters
    ----------
    x : model-ready values [cells, features] of all training cells, with and without a label
    seed : of the eigensolver and the denoiser
    """

    def __init__(self, x, seed: int = 0):
        self.x, self.seed = as_rows(x), seed

    @cached_property
    def pca(self) -> PCA:
        return fit_pca(self.x, max(COMPONENTS), self.seed)

    @cached_property
    def points(self) -> np.ndarray:
        """[cells, components] in which near cells are alike."""
        return self.pca.transform(self.x)[:, :NEAR_COMPONENTS]

    @cached_property
    def features(self) -> np.ndarray:
        """Columns that the networks read: those with the largest variance."""
        x = sparse.csr_matrix(self.x)
        variance = np.asarray(x.multiply(x).mean(0)).ravel() - np.asarray(x.mean(0)).ravel() ** 2
        return np.sort(np.argsort(-variance, kind="stable")[:MOST_FEATURES])

    @cached_property
    def denoiser(self) -> Encoder:
        return fit_denoiser(self.x[:, self.features], self.seed)


@dataclass
class Fitted:
    """A classifier behind a fixed transformation of the features, with the methods of a scikit-learn classifier."""

    transform: Callable
    classifier: object

    @property
    def classes_(self) -> np.ndarray:
        return self.classifier.classes_

    def predict(self, x) -> np.ndarray:
        return self.classifier.predict(self.transform(x))

    def predict_proba(self, x) -> np.ndarray:
        return self.classifier.predict_proba(self.transform(x))


def logistic_regression(x_train, y_train, x_val=None, y_val=None, seed=0, unlabelled=None) -> tuple[Fitted, Tuned]:
    """Fit multinomial logistic regression with an L2 penalty on log-normalised expression.

    Each gene is divided by its largest training value. This keeps zeros, so sparse input stays sparse. The strength of
    the penalty and the weights of the types are chosen.

    Parameters
    ----------
    x_train : sparse or dense matrix [cells, genes]
        Log-normalised values.
    y_train : array-like of labels [cells]
    x_val, y_val : as above, optional
        Validation cells, which choose the setting. Without validation cells of at least two classes, it is the first
        that would have been tried.
    seed : int
    unlabelled : Unlabelled, optional
        All training cells, also those without a label; by default those of `x_train`. Not used here; all baselines
        have the same parameters.

    Returns
    -------
    estimator : Fitted
        `predict` and `predict_proba` take log-normalised values.
    tuned : Tuned
        The chosen setting.

    Raises
    ------
    UserError
        The training cells hold fewer than two classes.
    """
    scaler = MaxAbsScaler().fit(as_rows(x_train))
    transform = lambda x: scaler.transform(as_rows(x))
    # A fit begins with the one before it, which saves time; the small tolerance keeps the result independent of it.
    fitted = LogisticRegression(max_iter=2000, tol=1e-4, random_state=seed, warm_start=True)
    z_train = transform(x_train)

    def fit(setting: dict) -> Fitted:
        _fit_logistic(fitted, z_train, y_train, setting)
        return Fitted(transform, copy.deepcopy(fitted))

    axes, start = {"C": C_GRID, "balance": BALANCES}, {"C": 1.0, "balance": 0.5}
    return _tuned(fit, axes, start, y_train, x_val, y_val, ("C",))


def pca_logistic_regression(x_train, y_train, x_val=None, y_val=None, seed=0, unlabelled=None) -> tuple[Fitted, Tuned]:
    """Fit logistic regression on principal components of all training cells, a common quick way to annotate cells.

    The penalty, the number of components, their scaling to unit variance (`whitened`) and the weights of the types are
    chosen. Parameters, returns and errors are those of :func:`logistic_regression`.
    """
    pca = (unlabelled or Unlabelled(x_train, seed)).pca

    def fit(setting: dict) -> Fitted:
        transform = _components(pca, x_train, setting)
        classifier = LogisticRegression(max_iter=2000, tol=1e-4, random_state=seed)
        return Fitted(transform, _fit_logistic(classifier, transform(x_train), y_train, setting))

    offered = _offered(COMPONENTS, pca.n_components_)
    axes = {"C": C_GRID, "components": offered, "whitened": (False, True), "balance": BALANCES}
    start = {"C": 0.1, "components": offered[min(3, len(offered) - 1)], "whitened": True, "balance": 0.5}
    return _tuned(fit, axes, start, y_train, x_val, y_val, ("C", "components"))


def nearest_neighbours(x_train, y_train, x_val=None, y_val=None, seed=0, unlabelled=None) -> tuple[Fitted, Tuned]:
    """Predict the majority type of the nearest training cells on principal components of all training cells.

    The number of neighbours, that of components and their scaling to unit variance are chosen. Parameters, returns and
    errors are those of :func:`logistic_regression`.
    """
    pca = (unlabelled or Unlabelled(x_train, seed)).pca

    def fit(setting: dict) -> Fitted:
        transform = _components(pca, x_train, setting)
        return Fitted(transform, KNeighborsClassifier(setting["k"]).fit(transform(x_train), np.asarray(y_train)))

    neighbours, offered = _offered(NEIGHBOURS, x_train.shape[0]), _offered(COMPONENTS, pca.n_components_)
    axes = {"k": neighbours, "components": offered, "whitened": (False, True)}
    start = {"k": neighbours[min(4, len(neighbours) - 1)], "components": offered[min(3, len(offered) - 1)]}
    return _tuned(fit, axes, start | {"whitened": False}, y_train, x_val, y_val, ("k", "components"))


def mlp(
    x_train, y_train, x_val=None, y_val=None, seed=0, unlabelled=None, denoised: bool = False
) -> tuple[Fitted, Tuned]:
    """Fit a neural network with one hidden layer, which sees a part of each cell's features in each step.

    Steps, weights of the types, the share of features left out, weight decay and hidden units are chosen. It reads the
    `MOST_FEATURES` features with the largest variance. Other parameters, returns and errors are those of
    :func:`logistic_regression`.

    Parameters
    ----------
    denoised : begin with an encoder that has learned to denoise all training cells; its hidden units are given,
        and the share of the learning rate that it gets (`start_rate`) is chosen
    """
    unlabelled = unlabelled or Unlabelled(x_train, seed)
    features = unlabelled.features
    transform = lambda x: sparse.csr_matrix(x)[:, features]
    z_train, begin = transform(x_train), {"start": unlabelled.denoiser} if denoised else {}
    fit = lambda setting: Fitted(transform, fit_mlp(z_train, np.asarray(y_train), seed, **setting, **begin))
    axes, start = (DENOISER_AXES, DENOISER_START) if denoised else (MLP_AXES, MLP_START)
    steps = _offered(MLP_AXES["steps"], most_steps(z_train.shape[0]))
    axes, start = axes | {"steps": steps}, start | {"steps": min(start["steps"], steps[-1])}
    return _tuned(fit, axes, start, y_train, x_val, y_val, ("steps",) if denoised else ("steps", "hidden"))


def majority_class(x_train, y_train, x_val=None, y_val=None, seed=0, unlabelled=None) -> tuple[DummyClassifier, None]:
    """Predict the most frequent training type for every cell."""
    return DummyClassifier(strategy="most_frequent").fit(x_train, y_train), None


TYPE_BASELINES = {
    "majority class": majority_class,
    "nearest neighbours": nearest_neighbours,
    "logistic regression": logistic_regression,
    "PCA + logistic regression": pca_logistic_regression,
    "MLP": mlp,
}
FEW_LABEL_BASELINES = {"denoiser + MLP": partial(mlp, denoised=True)}
"""Further baselines, for data in which some training cells have no label."""
NOT_SELF_TRAINED = ("majority class",)
NETWORKS = ("MLP", *FEW_LABEL_BASELINES)
"""Rows that take minutes where they learn from unlabelled cells."""


def fit_all(
    x_train, y_train, x_val, y_val, x_more=None, seed: int = 0, say=print, quick: bool = False
) -> tuple[dict[str, tuple], Unlabelled]:
    """Fit all baselines.

    Where some training cells have no label, there are further rows: a denoiser of all training cells under the MLP, and
    each baseline self-trained, that is fitted once more on all training cells, with its own predictions as labels of
    those without one (Lee 2013). It is tuned for each result of `own_labels`, and the best of these is kept.

    Parameters
    ----------
    x_train, y_train, x_val, y_val : labelled training cells and validation cells
    x_more : training cells without a label; None if all have one
    seed : of all fits
    say : prints a line
    quick : without the further rows of networks

    Returns
    -------
    fits : name → (estimator, Tuned or None)
    unlabelled : what was learned without labels
    """
    y_train, y_val = np.asarray(y_train), np.asarray(y_val)
    has_more = x_more is not None
    x_all = sparse.vstack([x_train, x_more], format="csr") if has_more else x_train
    unlabelled, fits = Unlabelled(x_all, seed), {}

    def add(name: str, fit: Callable, x, choices: list[np.ndarray]) -> None:
        started = time.process_time()
        found = [fit(x, y, x_val, y_val, seed=seed, unlabelled=unlabelled) for y in choices]
        fits[name] = max(found, key=lambda one: (one[1] and one[1].score) or 0)
        tuned, seconds = fits[name][1], time.process_time() - started
        if isinstance(tuned, Tuned):
            tuned.tried = sum(one.tried for _, one in found)
            end = f"; at an end of what is offered: {' and '.join(tuned.at_end)}" if tuned.at_end else ""
            say(f"{name}: {tuned.tried} settings tried in {seconds:.0f} s of CPU time, chosen: {tuned}{end}")

    rows = TYPE_BASELINES | (FEW_LABEL_BASELINES if has_more and not quick else {})
    not_again = (*NOT_SELF_TRAINED, *(NETWORKS if quick else ()))
    for name, fit in rows.items():
        add(name, fit, x_train, [y_train])
    for name in [name for name in rows if has_more and name not in not_again]:
        own = own_labels(fits[name][0], y_train, x_val, y_val, unlabelled)
        add(f"{name}, self-trained", rows[name], x_all, [np.concatenate([y_train, labels]) for labels in own])
    return fits, unlabelled


def own_labels(fitted: Fitted, y_train, x_val, y_val, unlabelled: Unlabelled) -> list[np.ndarray]:
    """Return a classifier's labels for the training cells without one: as it predicts them, and made better.

    The latter are made as our model's pseudo-labels are: corrected for the shares of types (`share_ratios`), and spread
    over neighbours (`spread_labels`), here by principal components. A temperature is fitted first, since the penalty
    may have been chosen so strong that all probabilities are alike.

    Parameters
    ----------
    fitted : the classifier
    y_train : labels of the labelled training cells
    x_val, y_val : validation cells, optional
    unlabelled : all training cells, the labelled ones first

    Returns
    -------
    one or two choices of labels [cells without a label]
    """
    classes, n = np.asarray(fitted.classes_, dtype=object), len(y_train)
    plain = fitted.predict(unlabelled.x[n:])
    truths = [] if x_val is None else y_val
    known, truth = (pd.Index(classes).get_indexer(np.asarray(labels, dtype=object)) for labels in (y_train, truths))
    place, temperature = np.flatnonzero(truth >= 0), 1.0
    ratios = share_ratios(known, truth[place], len(classes))
    logits = lambda x: np.log(np.clip(fitted.predict_proba(x), LEAST_PROBABILITY, None))
    if len(place):
        temperature = fit_temperature(logits(x_val)[place], truth[place], np.log(ratios))
    probability = with_shares(softmax(logits(unlabelled.x) / temperature, axis=1), ratios)
    known = np.concatenate([known, np.full(len(plain), -1)])
    better = classes[spread_labels(probability, unlabelled.points, known, unlabelled.seed)[n:].argmax(1)]
    return [plain] if (better == plain).all() else [plain, better]


def fewer(labels, most: int, seed: int = 0) -> np.ndarray:
    """Return the positions of at most so many cells, in order: small types keep their cells, the others their shares.

    Parameters
    ----------
    labels : [cells]
    most : number of cells, a tenth of which is drawn from the types in turn
    seed : of the draw
    """
    labels = np.asarray(labels)
    if len(labels) <= most:
        return np.arange(len(labels))
    kept = even_rows(labels, most // 10, seed)
    others = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(len(labels)), kept))
    return np.sort(np.concatenate([kept, others[: most - len(kept)]]))


@threadpool_limits.wrap(limits=1)  # threads do not speed up such small matrices, and slow them down on busy cores
def _tuned(fit, axes: dict, start: dict, y_train, x_val, y_val, open_ended: tuple) -> tuple[Fitted, Tuned]:
    """Choose the setting on the validation cells, if they have at least two types."""
    if len(np.unique(np.asarray(y_train))) < 2:
        raise UserError("The training cells have fewer than two cell types: give a file with at least two.")
    score = None
    if x_val is not None and y_val is not None and len(np.unique(np.asarray(y_val))) > 1:

        def score(fitted: Fitted) -> float:
            return _score(y_val, fitted.predict(x_val))

    tuned = tune(fit, score, axes, start, open_ended)
    return tuned.fit, tuned


def _score(true, predicted) -> float:
    """What settings are chosen by."""
    scores = classification_scores(true, predicted)
    return (scores["accuracy"] + scores["macro_f1"]) / 2


def _fit_logistic(classifier: LogisticRegression, z, y, setting: dict) -> LogisticRegression:
    classes, codes = np.unique(np.asarray(y), return_inverse=True)
    weight = dict(zip(classes, class_weights(codes, setting["balance"]), strict=True))
    return classifier.set_params(C=setting["C"], class_weight=weight).fit(z, np.asarray(y))


def _components(pca: PCA, x_train, setting: dict) -> Callable:
    """Return the step from features to the chosen principal components, scaled by their spread in labelled cells."""
    k = setting["components"]
    scale = component_scale(pca.transform(as_rows(x_train))[:, :k], setting["whitened"])
    return lambda x: pca.transform(as_rows(x))[:, :k] / scale


def _offered(values: tuple, most: int) -> tuple:
    """Return those of the values that are possible, at least one."""
    return tuple(value for value in values if value <= most) or (most,)
