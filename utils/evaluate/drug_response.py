"""Split drug responses, and score predictions of them."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from utils.evaluate.comparison import percentiles

SPLITS = ("lines", "drugs", "both", "pairs")
MIN_LINES = 10
"""Fewest test lines of a drug whose correlation counts."""
SCORES = ("per_drug_pearson", "pearson", "spearman", "rmse")


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


def with_intervals(scores: dict[str, dict[str, float]], drawn: dict[str, np.ndarray]) -> dict[str, dict]:
    """Return the scores of each method, each with its interval as `<score>_95%`."""
    return {
        name: row | {f"{score}_95%": percentiles(drawn[name][:, i]) for i, score in enumerate(SCORES)}
        for name, row in scores.items()
    }


def differences(
    ours: list[str], others: list[str], scores: dict, drawn: dict[str, np.ndarray], measures: tuple[str, ...]
) -> list[dict]:
    """Compare methods with the best of others, with the interval of the difference.

    Parameters
    ----------
    ours, others : names of methods
    scores, drawn : as from `response_scores`
    measures : scores to compare, of which a higher one is better

    Returns
    -------
    A row for each measure and method of ours: score, ours, theirs, difference and its interval, and names of both. No
    row for a measure that is undefined.
    """
    rows = []
    for measure in measures:
        best, i = max(others, key=lambda name: scores[name][measure]), SCORES.index(measure)
        for name in ours:
            one, other = scores[name][measure], scores[best][measure]
            if np.isfinite(one):
                between = percentiles(drawn[name][:, i] - drawn[best][:, i])
                row = {"score": measure, "method": name, "ours": one, "baseline": best, "theirs": other}
                rows.append(row | {"difference": one - other, "difference_95%": between})
    return rows


def per_drug_pearson(test: Responses, predicted: np.ndarray) -> float:
    """Return the mean over drugs of the correlation across lines; the correlation of all rows if no drug has enough."""
    scores = response_scores(test, {"": predicted}, n=0)[0][""]
    return scores["per_drug_pearson"] if np.isfinite(scores["per_drug_pearson"]) else scores["pearson"]
