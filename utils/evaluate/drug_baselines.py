"""Predict drug responses without a model of cells: means, factors, ridge regressions and a random forest."""

from dataclasses import dataclass

import numpy as np
from sklearn.ensemble import RandomForestRegressor

from utils.evaluate.drug_response import Responses, per_drug_pearson

RANKS, FACTOR_PENALTIES = (2, 5, 10, 20), (3.0, 10.0, 30.0)
COMPONENTS, PENALTIES = (10, 30, 100, 300), (10.0, 30.0, 100.0, 300.0, 1e3, 3e3)
"""Numbers of principal components and penalties of the ridge regressions; a penalty of n weighs as much as n lines."""
LEAF_SIZES = (3, 10)
MAX_FOREST_ROWS, N_TREES, FOREST_COMPONENTS = 20_000, 40, 30
"""Bounds of the random forest, so that it takes less than a minute."""
SHRINKAGE = 3.0
"""A mean over few responses is drawn towards 0 as if so many more had been 0."""

DRUG_MEAN, LINE_MEAN, ADDITIVE, FACTORS = "drug mean", "line mean", "drug + line means", "drug + line + factors"
RIDGE_EMBEDDING = "ridge on the embedding, per drug"
RIDGE, FOREST = "ridge on expression, per drug", "random forest on expression and fingerprint"
UNDEFINED = {
    "lines": "unseen lines have no mean and no factors: line mean is the overall mean, and the rows with means and "
    "factors are the drug mean",
    "drugs": "unseen drugs have no mean and no factors: drug mean is the overall mean, the rows with means and factors "
    "are the line mean, and ridge predicts the mean over drugs",
    "both": "neither lines nor drugs were seen: means and factors are the overall mean, and ridge predicts the mean "
    "over drugs",
    "pairs": "all lines and drugs are in the training rows as well: this split is for comparison with others",
}
"""Rows that a split leaves without a value of their own."""


@dataclass
class Means:
    """Main effects of the training rows; what was not in training has 0, and a spread like all others.

    Attributes
    ----------
    overall : mean of ln IC50
    drug : [n_drugs] a drug's mean minus `overall`
    line : [n_lines] mean of what is left over in a line
    spread : [n_drugs] standard deviation of a drug's responses
    """

    overall: float
    drug: np.ndarray
    line: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, train: Responses) -> "Means":
        overall = float(train.y.mean())
        drug, line = np.zeros(train.n_drugs), np.zeros(train.n_lines)
        for _ in range(5):  # each is what the other leaves over; lines did not meet all drugs
            drug = _mean_by(train.drug, train.y - overall - line[train.line], train.n_drugs, 0.0)
            line = _mean_by(train.line, train.y - overall - drug[train.drug], train.n_lines, SHRINKAGE)
        drug = _mean_by(train.drug, train.y - overall, train.n_drugs, 0.0)
        centred = train.y - overall - drug[train.drug]
        n, typical = np.bincount(train.drug, minlength=train.n_drugs), centred.var()
        squares = np.bincount(train.drug, weights=centred**2, minlength=train.n_drugs)
        spread = np.sqrt((squares + 10 * typical) / (n + 10))
        return cls(overall, drug, line, spread)

    def drug_mean(self, rows: Responses) -> np.ndarray:
        """[rows] mean of the drug; the overall mean for an unseen drug."""
        return self.overall + self.drug[rows.drug]

    def line_mean(self, rows: Responses) -> np.ndarray:
        """[rows] overall mean and the line's effect, the same for all drugs."""
        return self.overall + self.line[rows.line]

    def additive(self, rows: Responses) -> np.ndarray:
        """[rows] effects of drug and line."""
        return self.drug_mean(rows) + self.line[rows.line]


def _mean_by(of: np.ndarray, values: np.ndarray, n: int, extra: float) -> np.ndarray:
    """[n] sums of values by group, divided by the group's size plus `extra`."""
    return np.bincount(of, weights=values, minlength=n) / np.maximum(np.bincount(of, minlength=n) + extra, 1.0)


def fit_factors(train: Responses, val: Responses, test: Responses, means: Means, seed: int = 0):
    """Add the product of line and drug factors to the main effects, by alternating least squares.

    Returns
    -------
    predicted : val and test → [rows]; where the line or the drug is unseen, the main effects
    chosen : rank and penalty, by the squared error of the validation rows
    """
    counts = train.table()
    left = train.table(train.y - means.additive(train))
    best = (np.inf, None, "")
    for rank in RANKS:
        for penalty in FACTOR_PENALTIES:
            of_line, of_drug = _alternate(counts, left, rank, penalty, np.random.default_rng(seed))
            add = lambda rows, a=of_line, b=of_drug: means.additive(rows) + (a[rows.line] * b[rows.drug]).sum(1)
            error = float(np.square(add(val) - val.y).mean())
            if error < best[0]:
                best = error, {"val": add(val), "test": add(test)}, f"rank {rank}, penalty {penalty:g}"
    return best[1], best[2]


def _alternate(counts, sums, rank: int, penalty: float, rng, n_rounds: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Factors [n_lines, rank] and [n_drugs, rank] of the means of a table; zeros for empty rows and columns."""
    of_drug, identity = rng.normal(scale=0.3, size=(counts.shape[1], rank)), penalty * np.eye(rank)
    for _ in range(n_rounds):
        of_line = np.linalg.solve(
            np.einsum("ld,dr,ds->lrs", counts, of_drug, of_drug, optimize=True) + identity, (sums @ of_drug)[..., None]
        )[..., 0]
        of_drug = np.linalg.solve(
            np.einsum("ld,lr,ls->drs", counts, of_line, of_line, optimize=True) + identity,
            (sums.T @ of_line)[..., None],
        )[..., 0]
    return of_line, of_drug


def principal_components(values: np.ndarray, train_lines: np.ndarray, n: int) -> np.ndarray:
    """[n_lines, ≤ n] scores on the principal components of the training lines, which are scaled by one number."""
    centred = values - values[train_lines].mean(0)
    n = min(n, len(train_lines) - 1, values.shape[1])
    _, _, axes = np.linalg.svd(centred[train_lines], full_matrices=False)
    found = centred @ axes[:n].T
    return found / max(float(found[train_lines].std(0).mean()), 1e-12)


def ridge_per_drug(features: np.ndarray, train: Responses, val: Responses, test: Responses, means: Means):
    """One ridge regression on the lines' features for each drug; an unseen drug gets that of the mean over drugs.

    Number of components and penalty are the same for all drugs, chosen by the per-drug correlation on validation rows.

    Parameters
    ----------
    features : [n_lines, width]

    Returns
    -------
    predicted : val and test → [rows]
    chosen : components and penalty
    """
    lines = np.unique(train.line)
    scaled = features - features[lines].mean(0)
    scaled = scaled / np.maximum(features[lines].std(0), 1e-6)
    counts = train.table()
    response = train.table((train.y - means.drug_mean(train)) / means.spread[train.drug]) / np.maximum(counts, 1)
    seen = counts > 0
    common = (response * seen).sum(1) / np.maximum(seen.sum(1), 1)
    best = (-np.inf, None, "")
    widths = [k for k in COMPONENTS if k < scaled.shape[1]] + [min(scaled.shape[1], COMPONENTS[-1])]
    for width in dict.fromkeys(widths):
        x = principal_components(scaled, lines, width)
        by_penalty = np.zeros((len(PENALTIES), *counts.shape))
        fit = lambda rows, y, x=x: _ridge(x, rows, y)
        for drug in range(train.n_drugs):
            rows = np.flatnonzero(seen[:, drug])
            if len(rows):
                by_penalty[:, :, drug] = fit(rows, response[rows, drug])
        unseen = ~seen.any(0)
        by_penalty[:, :, unseen] = fit(lines, common[lines])[:, :, None]
        for penalty, table in zip(PENALTIES, by_penalty, strict=True):
            of = lambda rows, t=table: means.drug_mean(rows) + means.spread[rows.drug] * t[rows.line, rows.drug]
            score = per_drug_pearson(val, of(val))
            if score > best[0]:
                best = score, {"val": of(val), "test": of(test)}, f"{x.shape[1]} components, penalty {penalty:g}"
    return best[1], best[2]


def _ridge(x: np.ndarray, rows: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[penalties, lines] predictions of ridge regressions of y [rows] on x [lines, width], with an intercept."""
    middle, mean = x[rows].mean(0), y.mean()
    u, s, axes = np.linalg.svd(x[rows] - middle, full_matrices=False)
    projected = u.T @ (y - mean)
    weights = np.stack([axes.T @ (s / (s**2 + penalty) * projected) for penalty in PENALTIES])
    return mean + weights @ (x - middle).T


def forest(
    features: np.ndarray, drugs: np.ndarray, train: Responses, val: Responses, test: Responses, means: Means, seed: int
):
    """Random forest on the lines' principal components and those of the drugs' fingerprints.

    It learns what is left over beside the drug's mean and, where the test lines are known, the line's effect, as ours
    does, from at most `MAX_FOREST_ROWS` rows.

    Parameters
    ----------
    features : [n_lines, width]
    drugs : [n_drugs, bits] fingerprints

    Returns
    -------
    predicted : val and test → [rows]
    chosen : size of the leaves, by the per-drug correlation on validation rows
    """
    x = principal_components(features, np.unique(train.line), FOREST_COMPONENTS)
    z = principal_components(drugs.astype(np.float64), np.unique(train.drug), FOREST_COMPONENTS)
    describe = lambda rows: np.hstack([x[rows.line], z[rows.drug]]).astype(np.float32)
    sample = train[np.random.default_rng(seed).permutation(len(train))[:MAX_FOREST_ROWS]]
    knows_lines = np.isin(test.line, train.line).all()
    main = means.additive if knows_lines else means.drug_mean
    target = (sample.y - main(sample)) / means.spread[sample.drug]
    best = (-np.inf, None, "")
    for leaf in LEAF_SIZES:
        trees = RandomForestRegressor(N_TREES, max_features=1 / 3, min_samples_leaf=leaf, random_state=seed)
        trees.fit(describe(sample), target)
        of = lambda rows, t=trees: main(rows) + means.spread[rows.drug] * t.predict(describe(rows))
        score = per_drug_pearson(val, of(val))
        if score > best[0]:
            best = score, {"val": of(val), "test": of(test)}, f"leaves of at least {leaf}"
    return best[1], best[2]


def blend(
    one: dict[str, np.ndarray], other: dict[str, np.ndarray], val: Responses
) -> tuple[dict[str, np.ndarray], float]:
    """Mix two predictions, val and test → [rows], by the weight of the first that is best on the validation rows.

    Returns
    -------
    predicted : val and test → [rows]
    weight : from 0 to 1
    """
    mix = lambda weight, side: weight * one[side] + (1 - weight) * other[side]
    weight = max(np.linspace(0, 1, 11), key=lambda weight: per_drug_pearson(val, mix(weight, "val")))
    return {side: mix(weight, side) for side in ("val", "test")}, float(weight)


def baselines(
    expression: np.ndarray | None, embedding: np.ndarray, drugs: np.ndarray, sides: dict[str, Responses], seed: int
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str]]:
    """Predict the validation and test rows by means, factors, ridge regressions and a random forest.

    Parameters
    ----------
    expression : [n_lines, genes], or None
    embedding : [n_lines, width]
    drugs : [n_drugs, bits] fingerprints
    sides : train, val and test → rows
    seed : seed of factors and forest

    Returns
    -------
    predicted : method → val and test → [rows] ln IC50
    chosen : method → settings chosen on the validation rows
    """
    rows = sides["train"], sides["val"], sides["test"]
    means, both = Means.of(rows[0]), ("val", "test")
    predicted = {
        DRUG_MEAN: {side: means.drug_mean(sides[side]) for side in both},
        LINE_MEAN: {side: means.line_mean(sides[side]) for side in both},
        ADDITIVE: {side: means.additive(sides[side]) for side in both},
    }
    chosen = {}
    predicted[FACTORS], chosen[FACTORS] = fit_factors(*rows, means, seed)
    if expression is not None:
        predicted[RIDGE], chosen[RIDGE] = ridge_per_drug(expression, *rows, means)
        predicted[FOREST], chosen[FOREST] = forest(expression, drugs, *rows, means, seed)
    predicted[RIDGE_EMBEDDING], chosen[RIDGE_EMBEDDING] = ridge_per_drug(embedding, *rows, means)
    return predicted, chosen
