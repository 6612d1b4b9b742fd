"""Calibration of predicted peaks, and scores of predicted modalities with their intervals."""

import numpy as np
import pytest
from scipy import sparse
from scipy.special import expit

from utils.evaluate.translation import (
    PeakCalibration,
    calibrate_peaks,
    fit_peaks,
    offset_per_peak,
    product,
    unweighted_probability,
)
from utils.evaluate.translation_scores import PROBABILITY_BINS, draw_resamples, interval, score_prediction
from utils.predict.score_translation import differences, verdict


def test_calibration_is_found_and_keeps_the_order_of_a_cells_peaks():
    draw = np.random.default_rng(0)
    left, right = draw.normal(size=(900, 3)), np.vstack([draw.normal(size=(2, 300)), np.full(300, 0.3)])
    detected = draw.integers(100, 1000, 900)
    planted = PeakCalibration(slope=0.7, offset=-3.5, depth=0.5)
    chance = expit(product(*planted.factors(left, right, detected)))
    truth = sparse.csr_matrix(draw.random(chance.shape) < chance, dtype=np.float32)
    found = fit_peaks(left, right, detected, truth)
    assert found.slope == pytest.approx(0.7, abs=0.03) and found.depth == pytest.approx(0.5, abs=0.05)
    ours = expit(product(*found.factors(left, right, detected)))
    assert ours.min() >= 0 and ours.max() <= 1
    np.testing.assert_allclose(ours, chance, atol=0.02)
    ranks = lambda values: np.argsort(values, axis=1)
    assert (ranks(ours) == ranks(left @ right)).mean() > 0.99
    plain = np.abs(unweighted_probability(left @ right).mean(0) - chance.mean(0)).mean()
    assert np.abs(ours.mean(0) - chance.mean(0)).mean() < 0.1 * plain
    assert fit_peaks(left[:5], right, detected[:5], truth[:5]) == PeakCalibration()
    assert fit_peaks(-left, right, detected, truth) == PeakCalibration()  # a slope below zero would turn the order


def drawn_peaks(n: int, seed: int, spread: float):
    """Factors of a decoder that is off by a constant per peak, detected genes, and the open peaks: of n cells."""
    fixed, draw = np.random.default_rng(5), np.random.default_rng(seed)
    right = np.vstack([fixed.normal(size=(2, 400)), np.full(400, 0.3)])
    off = spread * fixed.normal(size=400)
    left, detected = draw.normal(size=(n, 3)), draw.integers(100, 1000, n)
    chance = expit(product(*PeakCalibration(0.7, -3.5, 0.2).factors(left, right, detected)) + off)
    return left, right, detected, sparse.csr_matrix(draw.random(chance.shape) < chance, dtype=np.float32)


def test_offsets_of_peaks_are_found_where_they_help():
    train, val, test = (drawn_peaks(n, seed, 1.0) for n, seed in ((1500, 0), (400, 1), (600, 2)))
    three, found = fit_peaks(*val), calibrate_peaks(val, train)
    error = lambda calibration: np.abs(
        expit(product(*calibration.factors(*test[:3]))).mean(0) - np.asarray(test[3].mean(0)).ravel()
    ).mean()
    assert found.peaks.shape == (400,) and found.pseudo_cells < 100
    assert error(found) < 0.5 * error(three)
    ours, plain = (product(*c.factors(*test[:3])) for c in (found, three))
    np.testing.assert_array_equal(np.argsort(ours, axis=0), np.argsort(plain, axis=0))  # the order of a peak's cells
    weak, strong = offset_per_peak(three, *train, [1.0, 1e6])
    assert np.abs(strong.peaks).max() < 0.01 < np.abs(weak.peaks).max()
    # Where the decoder is right about every peak, offsets are noise: they are shrunk strongly or left out.
    right = calibrate_peaks(drawn_peaks(400, 1, 0), drawn_peaks(300, 0, 0))
    assert right.pseudo_cells >= 30
    assert calibrate_peaks(val, None) == three and calibrate_peaks(val, None).peaks is None


def test_scores_of_values_by_hand(monkeypatch):
    draw = np.random.default_rng(0)
    types = np.repeat(np.array(["a", "b", "few", None], dtype=object), [200, 60, 5, 20])
    chance = draw.uniform(0.01, 0.9, (285, 40))
    truth = sparse.csr_matrix(draw.random(chance.shape) < chance, dtype=np.float32)
    dense, resamples = truth.toarray(), draw_resamples(285, 40, types)
    found = score_prediction(chance, np.eye(40), truth, resamples, types, np.arange(285))
    means = [[x[types == name].mean(0) for x in (chance, dense)] for name in ("a", "b")]
    of_all = np.mean(means, axis=0)
    expected = {
        "brier": np.square(chance - dense).mean(),
        "pseudobulk_rmse": np.sqrt(np.mean([np.square(a - b).mean() for a, b in means])),
        "pseudobulk_correlation": np.mean([np.corrcoef(a - of_all[0], b - of_all[1])[0, 1] for a, b in means]),
    }
    bins = np.digitize(chance, PROBABILITY_BINS)
    gaps = [abs((chance - dense)[bins == i].sum()) for i in range(len(PROBABILITY_BINS) + 1)]
    expected["calibration_error"] = sum(gaps) / dense.size
    for name, value in expected.items():
        score, draws = found[name]
        assert score == pytest.approx(value, rel=1e-4), name
        low, high = interval(draws, score)
        assert low < score < high, name
    # A linear prediction below 0 or above 1 is clipped for the Brier score, and for nothing else.
    wide = score_prediction(3 * chance - 1, np.eye(40), truth, resamples, types, np.arange(285))
    assert wide["brier"][0] == pytest.approx(np.square((3 * chance - 1).clip(0, 1) - dense).mean(), rel=1e-4)
    genes = score_prediction(chance, np.eye(40), truth, resamples, None, np.arange(285), is_peaks=False)
    assert genes.keys() == {"rna_mse"} and genes["rna_mse"][0] == pytest.approx(expected["brier"], rel=1e-4)
    constant = score_prediction(np.ones((285, 1)), chance[:1], truth, resamples, types, np.arange(285))
    assert constant["pseudobulk_correlation"][0] == 0
    assert constant["peak_auroc"][0] == 0.5
    # A few features at a time, as for very many: the same sums.
    monkeypatch.setattr("utils.evaluate.translation_scores.STRETCH", 7)
    few = score_prediction(chance, np.eye(40), truth, resamples, types, np.arange(285))
    for name, (score, draws) in found.items():
        np.testing.assert_allclose(few[name][0], score, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(few[name][1], draws, rtol=1e-4, err_msg=name)


def test_the_interval_covers_resampled_cells_and_a_difference_is_paired():
    draw = np.random.default_rng(1)
    truth = sparse.csr_matrix(draw.random((400, 60)) < 0.2, dtype=np.float32)
    chance = np.where(truth.toarray() > 0, 0.3, 0.2) + 0.05 * draw.random((400, 60))
    resamples = draw_resamples(400, 60)
    assert (resamples.cells.sum(1) == 400).all() and (resamples.features.sum(1) == 60).all()
    methods = {"scmomer": chance, "a": chance + 1e-3 * draw.random((400, 60)), "b": draw.random((400, 60))}
    scores = {
        name: score_prediction(p, np.eye(60), truth, resamples, None, np.arange(400)) for name, p in methods.items()
    }
    draws = {name: {k: d for k, (_, d) in row.items() if len(d)} for name, row in scores.items()}
    table = {name: {k: value for k, (value, _) in row.items()} for name, row in scores.items()}
    brier = next(r for r in differences(table, draws, "scmomer", ["a", "b"]) if r["score"] == "brier")
    assert brier["baseline"] == "a" and brier["lower_is_better"]
    low, high = brier["difference_95%"]
    alone = np.subtract(*interval(draws["scmomer"]["brier"], table["scmomer"]["brier"])[::-1])
    assert low < brier["difference"] < high and high - low < 0.1 * alone
    words = verdict(differences(table, draws, "scmomer", ["b"]), "scmomer")
    assert all("wins against" in sentence and "b:" in sentence for sentence in words)
