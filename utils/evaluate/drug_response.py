"""Split drug responses, score predictions of them, and predict them without a model of cells."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

SPLITS = ("lines", "drugs", "both", "pairs")
MIN_LINES = 10
"""Fewest test lines of a drug whose correlation counts."""
SCORES = ("per_drug_pearson", "pearson", "spearman", "rmse")
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
    "both": "neither lines nor drugs were seen: means and factors are the overall mean, and ridge predicts the mean over "
    "drugs",
    "pairs": "all lines and drugs are in the training rows as well: this split is for comparison with others",
}
"""Rows that a split leaves without a value of their own."""


@dataclass
class Responses:
    """Rows of ln IC50; a line and a drug may meet in several rows.

    Attributes
    ----------
    line, drug : [rows] int
    y : [rows] ln IC50
    n_lines, n_drugs : how many there are in all splits together
    """

    line: np.ndarray
    drug: np.ndarray
    y: np.ndarray
    n_lines: int
    n_drugs: int

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: np.ndarray) -> "Responses":
        return Responses(self.line[rows], self.drug[rows], self.y[rows], self.n_lines, self.n_drugs)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of responses, lines and drugs."""
        return {"responses": len(self), "lines": len(np.unique(self.line)), "drugs": len(np.unique(self.drug))}

    def table(self, values: np.ndarray | None = None) -> np.ndarray:
        """[n_lines, n_drugs] sum over rows of `values`, or how many rows there are."""
        at = self.line * self.n_drugs + self.drug
        return np.bincount(at, weights=values, minlength=self.n_lines * self.n_drugs).reshape(self.n_lines, -1)


def split_responses(
    data: Responses, by: str, test_fraction: float, val_fraction: float, rng: np.random.Generator
) -> dict[str, Responses]:
    """Split rows: train, val and test → rows. All rows of one line and one drug are on one side.

    Parameters
    ----------
    by : what is on one side alone. lines; drugs; both (the rows of a test line and a training drug, and the like, are
        on no side); pairs of a line and a drug
    test_fraction, val_fraction : shares of the lines, drugs or pairs; of lines and of drugs for both
    """

    def side_of(units: np.ndarray) -> np.ndarray:
        """[units] 0 for training, 1 for validation, 2 for the test."""
        side, order = np.zeros(len(units), dtype=int), rng.permutation(len(units))
        n_test, n_val = round(test_fraction * len(units)), round(val_fraction * len(units))
        side[order[:n_test]], side[order[n_test : n_test + n_val]] = 2, 1
        return side

    of = {"line": data.line, "drug": data.drug, "pair": data.line * data.n_drugs + data.drug}
    sides = []
    for unit in {"lines": ["line"], "drugs": ["drug"], "both": ["line", "drug"], "pairs": ["pair"]}[by]:
        units, which = np.unique(of[unit], return_inverse=True)
        sides.append(side_of(units)[which])
    side = np.where(sides[0] == sides[-1], sides[0], -1)
    return {name: data[side == i] for i, name in enumerate(("train", "val", "test"))}


# Scores --------------------------------------------------------------------------------------------------------------


def response_scores(
    test: Responses, predicted: dict[str, np.ndarray], over: str = "lines", n: int = 1000, seed: int = 0
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Score predictions, on the test rows and in bootstrap samples of lines, of drugs or of both.

    The per-drug Pearson correlation is the mean over drugs with at least `MIN_LINES` test lines; a prediction that is
    equal for all lines of a drug has 0 there. All methods see the same samples.

    Parameters
    ----------
    test : rows
    predicted : method → [rows] ln IC50
    over : lines, drugs or both
    n, seed : number of samples, and their seed

    Returns
    -------
    scores : method → score (see `SCORES`) → value
    drawn : method → [n, 4] the same in each sample
    """
    rng = np.random.default_rng(seed)
    lines, drugs = np.unique(test.line), np.unique(test.drug)
    counted = (test.table() > 0).sum(0)[drugs] >= MIN_LINES
    draw = lambda k: np.vstack([np.ones(k), rng.multinomial(k, np.full(k, 1 / k), size=n)])
    ones = lambda k: np.ones((n + 1, k))
    of_line = draw(len(lines)) if over in ("lines", "both") else ones(len(lines))
    of_drug = draw(len(drugs)) if over in ("drugs", "both") else ones(len(drugs))
    y, y_rank = test.y - test.y.mean(), rankdata(test.y)
    scores, drawn = {}, {}
    for name, values in predicted.items():
        p = values - test.y.mean()
        by_drug = _sums(test, lines, drugs, of_line, y, p)  # 6 × [samples, drugs]
        pooled = [(part * of_drug).sum(1) for part in by_drug]
        ranked = [(part * of_drug).sum(1) for part in _sums(test, lines, drugs, of_line, y_rank, rankdata(p))]
        weight = of_drug * counted
        per_drug = (_pearson(by_drug) * weight).sum(1) / np.maximum(weight.sum(1), 1e-12)
        per_drug[weight.sum(1) == 0] = np.nan
        count, _, _, yy, pp, yp = pooled
        rmse = np.sqrt(np.maximum(yy + pp - 2 * yp, 0) / np.maximum(count, 1e-12))
        found = np.stack([per_drug, _pearson(pooled), _pearson(ranked), rmse], axis=1)
        scores[name], drawn[name] = dict(zip(SCORES, map(float, found[0]), strict=True)), found[1:]
    return scores, drawn


def _sums(test: Responses, lines, drugs, of_line: np.ndarray, y: np.ndarray, p: np.ndarray) -> list[np.ndarray]:
    """Sums over lines, weighted by [samples, lines], of 1, y, p, y², p², yp: each [samples, drugs]."""
    at = np.ix_(lines, drugs)
    return [of_line @ test.table(values)[at] for values in (np.ones(len(y)), y, p, y * y, p * p, y * p)]


def _pearson(sums: list[np.ndarray]) -> np.ndarray:
    """Correlations from the sums; 0 where either side does not vary."""
    n, y, p, yy, pp, yp = sums
    n = np.maximum(n, 1e-12)
    y_var, p_var = yy / n - (y / n) ** 2, pp / n - (p / n) ** 2
    varies = (y_var > 1e-9 * (yy / n + 1e-12)) & (p_var > 1e-9 * (pp / n + 1e-12))
    return np.where(varies, (yp / n - y * p / n**2) / np.sqrt(np.where(varies, y_var * p_var, 1.0)), 0.0)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95% percentile interval of bootstrap values; NaN if none could be computed."""
    if np.isnan(values).all():
        return np.nan, np.nan
    return tuple(map(float, np.nanpercentile(values, [2.5, 97.5])))


def with_intervals(scores: dict[str, dict[str, float]], drawn: dict[str, np.ndarray]) -> dict[str, dict]:
    """Return the scores of each method, each with its interval as `<score>_95%`."""
    return {
        name: row | {f"{score}_95%": interval(drawn[name][:, i]) for i, score in enumerate(SCORES)}
        for name, row in scores.items()
    }


def verdict(ours: str, others: list[str], scores: dict, drawn: dict[str, np.ndarray], score: str) -> str:
    """Return a sentence that compares a method with the best of others, with the interval of the difference."""
    if np.isnan(scores[ours][score]):
        return f"no drug has {MIN_LINES} test lines, so {score} is undefined"
    best, i = max(others, key=lambda name: scores[name][score]), SCORES.index(score)
    low, high = interval(drawn[ours][:, i] - drawn[best][:, i])
    how = "wins against" if low > 0 else "loses against" if high < 0 else "cannot be told apart from"
    one, other = scores[ours][score], scores[best][score]
    return (
        f"{ours} {how} the best baseline, {best}: {score} {one:.3f} against {other:.3f}, difference {one - other:+.3f} "
        f"(95% from {low:+.3f} to {high:+.3f})"
    )


def per_drug_pearson(test: Responses, predicted: np.ndarray) -> float:
    """Return the mean over drugs of the correlation across lines; the correlation of all rows if no drug has enough."""
    scores = response_scores(test, {"": predicted}, n=0)[0][""]
    return scores["per_drug_pearson"] if np.isfinite(scores["per_drug_pearson"]) else scores["pearson"]


# Without a model of cells --------------------------------------------------------------------------------------------


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

    It learns a drug's deviation from its mean, as ours does, from at most `MAX_FOREST_ROWS` rows.

    Parameters
    ----------
    features : [n_lines, width]
    drugs : [n_drugs, bits] fingerprints

    Returns
    -------
    predicted : val and test → [rows]
    chosen : size of the leaves, by the per-drug correlation on validation rows
    """
    from sklearn.ensemble import RandomForestRegressor

    x = principal_components(features, np.unique(train.line), FOREST_COMPONENTS)
    z = principal_components(drugs.astype(np.float64), np.unique(train.drug), FOREST_COMPONENTS)
    describe = lambda rows: np.hstack([x[rows.line], z[rows.drug]]).astype(np.float32)
    sample = train[np.random.default_rng(seed).permutation(len(train))[:MAX_FOREST_ROWS]]
    target = (sample.y - means.drug_mean(sample)) / means.spread[sample.drug]
    best = (-np.inf, None, "")
    for leaf in LEAF_SIZES:
        trees = RandomForestRegressor(N_TREES, max_features=1 / 3, min_samples_leaf=leaf, random_state=seed)
        trees.fit(describe(sample), target)
        of = lambda rows, t=trees: means.drug_mean(rows) + means.spread[rows.drug] * t.predict(describe(rows))
        score = per_drug_pearson(val, of(val))
        if score > best[0]:
            best = score, {"val": of(val), "test": of(test)}, f"leaves of at least {leaf}"
    return best[1], best[2]


def blend(one: dict[str, np.ndarray], other: dict[str, np.ndarray], val: Responses) -> tuple[np.ndarray, float]:
    """Mix two predictions, val and test → [rows], by the weight of the first that is best on the validation rows.

    Returns
    -------
    predicted : [test rows]
    weight : from 0 to 1
    """
    mix = lambda weight, side: weight * one[side] + (1 - weight) * other[side]
    weight = max(np.linspace(0, 1, 11), key=lambda weight: per_drug_pearson(val, mix(weight, "val")))
    return mix(weight, "test"), float(weight)


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
