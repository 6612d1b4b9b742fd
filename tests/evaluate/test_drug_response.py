"""Drug responses: splits keep their promise, simple rows equal hand computation, intervals equal plain resampling."""

import numpy as np
import pytest
from scipy.stats import pearsonr, rankdata, spearmanr

from utils.evaluate.comparison import in_words
from utils.evaluate.drug_baselines import Means, blend, fit_factors, ridge_per_drug
from utils.evaluate.drug_response import (
    MIN_LINES,
    Responses,
    differences,
    per_drug_pearson,
    response_scores,
    split_responses,
)


def made(n_lines: int = 40, n_drugs: int = 20, seed: int = 0) -> Responses:
    """Some of all pairs of lines and drugs, a tenth of them twice."""
    rng = np.random.default_rng(seed)
    pairs = rng.choice(n_lines * n_drugs, int(0.8 * n_lines * n_drugs), replace=False)
    pairs = np.concatenate([pairs, pairs[: len(pairs) // 10]])
    line, drug = np.divmod(pairs, n_drugs)
    y = rng.normal(size=n_drugs)[drug] * 2 + rng.normal(size=n_lines)[line] + rng.normal(size=len(pairs))
    return Responses(line, drug, y, n_lines, n_drugs)


def full(table: np.ndarray) -> Responses:
    """All cells of a table [lines, drugs] as rows."""
    line, drug = np.indices(table.shape).reshape(2, -1)
    return Responses(line, drug, table.ravel().astype(float), *table.shape)


@pytest.mark.parametrize("by", ["lines", "drugs", "both", "pairs"])
def test_splits_keep_their_promise(by):
    data = made()
    sides = split_responses(data, by, 0.25, 0.2, np.random.default_rng(0))
    units = {
        "lines": lambda rows: [rows.line],
        "drugs": lambda rows: [rows.drug],
        "both": lambda rows: [rows.line, rows.drug],
        "pairs": lambda rows: [rows.line * rows.n_drugs + rows.drug],
    }[by]
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        for ours, theirs in zip(units(sides[one]), units(sides[other]), strict=True):
            assert len(ours) and len(theirs) and not np.isin(ours, theirs).any()
    assert sum(map(len, sides.values())) == len(data) or by == "both"
    for name, share in (("test", 0.25), ("val", 0.2)):
        for ours, of_all in zip(units(sides[name]), units(data), strict=True):
            assert len(np.unique(ours)) == pytest.approx(share * len(np.unique(of_all)), abs=1)
    # All rows of a pair are together: each side has either all or none of them.
    whole = data.table()
    for rows in sides.values():
        assert np.isin(rows.table() / np.maximum(whole, 1), (0, 1)).all()


def test_means_are_those_of_hand():
    """Drugs' means are 1 and 7; what is left over sums to -4 and 4, and a line's effect weighs as 2 + 3 responses."""
    train = full(np.array([[0, 4], [2, 10]]))
    means = Means.of(train)
    assert means.overall == 4
    assert np.allclose(means.drug, [-3, 3]) and np.allclose(means.line, [-0.8, 0.8])
    assert np.allclose(means.additive(train), [0.2, 6.2, 1.8, 7.8])
    assert np.allclose(means.drug_mean(train), [1, 7, 1, 7])
    assert np.allclose(means.line_mean(train), [3.2, 3.2, 4.8, 4.8])


def test_unseen_lines_and_drugs_have_no_effect():
    data = full(np.array([[0.0, 4, 9], [2, 10, 9], [9, 9, 9]]))
    train = data[(data.line < 2) & (data.drug < 2)]
    means = Means.of(train)
    assert means.drug[2] == means.line[2] == 0
    assert means.spread[2] == pytest.approx(np.std([-1, 1, -3, 3]))
    assert np.allclose(means.additive(data)[[2, 8]], [3.2, 4])


def test_factors_are_a_shrunk_singular_value_decomposition():
    """Of a full table, the best factors have the singular values less the penalty (Mazumder and others 2010)."""
    rng = np.random.default_rng(0)
    centred = lambda n: np.linalg.qr(np.hstack([np.ones((n, 1)), rng.normal(size=(n, 2))]))[0][:, 1:]
    u, v = centred(30), centred(12)
    table = 5 + u @ np.diag([12, 8]) @ v.T  # no line and no drug has a main effect
    predicted, chosen = fit_factors(full(table), full(table), full(table), Means.of(full(table)))
    penalty = float(chosen.split()[-1])
    assert penalty == 3
    assert np.allclose(predicted["test"], (5 + u @ np.diag([9, 5]) @ v.T).ravel(), atol=1e-3)


def test_ridge_is_that_of_the_equations():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    data = full(x @ rng.normal(size=(3, 2)) + rng.normal(size=(60, 2)))
    train, val, test = (data[(data.line >= a) & (data.line < b)] for a, b in ((0, 30), (30, 45), (45, 60)))
    means = Means.of(train)
    predicted, chosen = ridge_per_drug(x, train, val, test, means)
    assert chosen.startswith("3 components")
    z = (x - x[:30].mean(0)) / x[:30].std(0)
    _, _, axes = np.linalg.svd(z[:30], full_matrices=False)
    z = z @ axes.T
    z /= z[:30].std(0).mean()
    for drug in range(2):
        y = train.y[train.drug == drug]
        weights = np.linalg.solve(z[:30].T @ z[:30] + float(chosen.split()[-1]) * np.eye(3), z[:30].T @ (y - y.mean()))
        assert np.allclose(predicted["test"][test.drug == drug], y.mean() + z[45:] @ weights)


def test_scores_are_those_of_scipy():
    test = made()
    predicted = test.y + np.random.default_rng(1).normal(size=len(test))
    scores = response_scores(test, {"one": predicted, "equal": np.full(len(test), 3.0)}, n=0)[0]
    own = [test.drug == drug for drug in range(test.n_drugs)]
    per_drug = np.mean([pearsonr(test.y[rows], predicted[rows])[0] for rows in own])
    assert scores["one"]["per_drug_pearson"] == pytest.approx(per_drug)
    assert scores["one"]["pearson"] == pytest.approx(pearsonr(test.y, predicted)[0])
    assert scores["one"]["spearman"] == pytest.approx(spearmanr(test.y, predicted)[0])
    assert scores["one"]["rmse"] == pytest.approx(np.sqrt(np.mean((test.y - predicted) ** 2)))
    assert scores["equal"]["per_drug_pearson"] == scores["equal"]["pearson"] == 0


def test_drugs_with_few_lines_do_not_count():
    test = full(np.random.default_rng(0).normal(size=(MIN_LINES, 2)))
    test = test[:-1]  # the second drug has one line too few
    predicted = test.y * np.where(test.drug == 0, 1, -1)
    assert per_drug_pearson(test, predicted) == pytest.approx(1)
    few = test[test.drug == 1]
    assert np.isnan(response_scores(few, {"": few.y}, n=5)[0][""]["per_drug_pearson"])
    assert per_drug_pearson(few, few.y) == pytest.approx(1)  # the correlation of all rows


@pytest.mark.parametrize("over", ["lines", "drugs", "both"])
def test_samples_are_those_of_plain_resampling(over):
    """Each sample's rows are written out, a row as often as its line and its drug were drawn."""
    test, n = made(), 5
    predicted = test.y + np.random.default_rng(1).normal(size=len(test))
    drawn = response_scores(test, {"": predicted}, over, n=n, seed=7)[1][""]
    rng = np.random.default_rng(7)
    times = {}
    for unit, size in (("lines", test.n_lines), ("drugs", test.n_drugs)):
        is_drawn = over in (unit, "both")
        times[unit] = rng.multinomial(size, np.full(size, 1 / size), size=n) if is_drawn else np.ones((n, size), int)
    ranks = rankdata(test.y), rankdata(predicted)
    for sample in range(n):
        lines, drugs = times["lines"][sample], times["drugs"][sample]
        rows = np.repeat(np.arange(len(test)), lines[test.line] * drugs[test.drug])
        y, p = test.y[rows], predicted[rows]
        of_drug = {}
        for drug in range(test.n_drugs):
            own = np.repeat(np.arange(len(test)), lines[test.line] * (test.drug == drug))
            of_drug[drug] = np.corrcoef(test.y[own], predicted[own])[0, 1]
        per_drug = np.average(list(of_drug.values()), weights=drugs)
        wanted = [per_drug, np.corrcoef(y, p)[0, 1], np.corrcoef(ranks[0][rows], ranks[1][rows])[0, 1]]
        assert np.allclose(drawn[sample], [*wanted, np.sqrt(np.mean((y - p) ** 2))])


def test_the_blend_is_chosen_on_validation_rows():
    val, test = made(seed=1), made(seed=2)
    noise = lambda rows: np.random.default_rng(3).normal(size=len(rows))
    good, bad = {"val": val.y, "test": noise(test)}, {"val": noise(val), "test": test.y}
    predicted, weight = blend(good, bad, val)
    assert weight == 1 and np.array_equal(predicted["test"], good["test"])


def test_a_difference_wins_only_beyond_its_interval():
    test = made()
    methods = {"good": test.y + 0.1, "mean": np.zeros(len(test)), "again": test.y + 0.1}
    scores, drawn = response_scores(test, methods, n=200)
    say = lambda one, other: in_words(one, differences([one], [other], scores, drawn, ("pearson",))[0], "Pearson")
    assert "wins against" in say("good", "mean") and "loses against" in say("mean", "good")
    assert "does not differ clearly from" in say("good", "again")
