import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from utils.evaluate.calibration import (
    ENOUGH_CELLS,
    Calibration,
    error_auroc,
    expected_calibration_error,
    fit_temperature,
    share_ratios,
)


def calibrated_logits(n=20_000, classes=5, seed=0):
    """Logits whose softmax is exactly the distribution from which the labels are drawn."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, classes))
    labels = (softmax(logits, axis=1).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1).clip(0, classes - 1)
    return logits, labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_temperature_is_recovered(temperature):
    logits, labels = calibrated_logits()
    assert fit_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.03)


def test_temperature_beside_an_offset_is_recovered():
    """Classes are as frequent as the offset says; without it the temperature would be another."""
    logits, offset = calibrated_logits()[0], np.log([4, 2, 1, 0.5, 0.25])
    draw = np.random.default_rng(1).random((len(logits), 1))
    labels = (softmax(logits + offset, axis=1).cumsum(axis=1) < draw).sum(axis=1).clip(0, 4)
    assert fit_temperature(3 * logits, labels, offset) == pytest.approx(3, rel=0.03)
    assert fit_temperature(3 * logits, labels) > 3.3


def test_temperature_minimises_the_likelihood_and_mends_calibration():
    logits, labels = calibrated_logits(2000, seed=1)
    logits = 2.5 * logits
    found = fit_temperature(logits, labels)

    def loss(temperature):
        return -log_softmax(logits / temperature, axis=1)[np.arange(len(labels)), labels].mean()

    assert all(loss(found) <= loss(found * factor) + 1e-9 for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2))
    before = expected_calibration_error(softmax(logits, axis=1), labels)
    after = expected_calibration_error(softmax(logits / found, axis=1), labels)
    assert before > 0.1 and after < 0.04


def test_temperature_of_extreme_cases():
    logits, labels = calibrated_logits(9)
    assert fit_temperature(logits, labels) == 1.0  # too few cells
    assert fit_temperature(np.zeros((0, 3)), np.zeros(0, dtype=int)) == 1.0
    logits, labels = calibrated_logits(ENOUGH_CELLS, seed=3)
    assert fit_temperature(logits / 3, labels) < 0.6
    assert fit_temperature(logits[1:] / 3, labels[1:]) == 1.0  # too few cells to sharpen
    assert fit_temperature(logits[1:] * 3, labels[1:]) > 1.5  # but enough to soften
    right = 1e4 * np.eye(3)[np.arange(30) % 3]
    # Neither all right nor all wrong leaves the bounds or overflows.
    assert 0.1 <= fit_temperature(right, np.arange(30) % 3) <= 10
    assert fit_temperature(right, (np.arange(30) + 1) % 3) == pytest.approx(10, rel=1e-3)


def test_too_few_cells_are_not_called_calibrated():
    labels = np.repeat([0, 1, 2], [60, 40, 4])
    few = Calibration.of(labels[5:], ["A", "B", "C", "D"])
    assert (few.n_cells, few.is_enough) == (99, False) and "not calibrated" in str(few)
    partly = Calibration.of(labels, ["A", "B", "C", "D"])
    assert partly.is_enough and partly.few == ("C", "D") and "2 of 4" in str(partly) and "C, D" in str(partly)
    enough = Calibration.of(np.repeat([0, 1], 50), ["A", "B"])
    assert enough.is_enough and not enough.few and "not" not in str(enough)
    assert Calibration.of(np.zeros(0, np.int64), ["A", "B"]).few == ("A", "B")


def test_expected_calibration_error_by_hand():
    prob = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    # Bin of 0.9: accuracy 1/2, gap 0.4. Bin of 0.6: accuracy 1, gap 0.4.
    assert expected_calibration_error(prob, [0, 1, 1, 1]) == pytest.approx(0.4)
    # In one bin the two gaps have opposite signs: mean confidence 0.75, accuracy 0.75.
    assert expected_calibration_error(prob, [0, 1, 1, 1], bins=1) == pytest.approx(0)
    assert expected_calibration_error(np.eye(4), np.arange(4)) == 0
    assert expected_calibration_error(np.eye(4), (np.arange(4) + 1) % 4) == 1


def test_a_bin_holds_its_upper_edge():
    # 0.6 is the upper edge of bin 3 of 5 and 0.55 lies in the same bin: their gaps cancel.
    prob = np.array([[0.6, 0.4], [0.55, 0.45]])
    assert expected_calibration_error(prob, [1, 0], bins=5) == pytest.approx(abs(1 - 1.15) / 2)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="match"):
        fit_temperature(np.zeros((12, 3)), np.zeros(11, dtype=int))
    with pytest.raises(ValueError, match="class indices"):
        fit_temperature(np.zeros((12, 3)), np.full(12, 3))
    with pytest.raises(ValueError, match="class indices"):
        fit_temperature(np.zeros((12, 3)), np.full(12, -1))
    with pytest.raises(ValueError, match="not finite"):
        fit_temperature(np.full((12, 3), np.nan), np.zeros(12, dtype=int))
    with pytest.raises(ValueError, match="no cells"):
        expected_calibration_error(np.zeros((0, 3)), np.zeros(0, dtype=int))


def test_auroc_of_a_doubt():
    wrong = [True, True, False, False, False]
    assert error_auroc(wrong, [3, 2, 1, 0, 0]) == 1
    assert error_auroc(wrong, [1, 1, 1, 1, 1]) == 0.5
    assert error_auroc(wrong, [2, 0, 1, 0, 0]) == pytest.approx((3 + 1) / 6)  # three pairs won, two tied
    assert np.isnan(error_auroc([False, False], [1, 2]))


def test_the_text_says_that_cells_were_left_out():
    for n in (30, 60):
        assert "donor" in str(Calibration.of(np.repeat([0, 1], n), ["A", "B"], "donor"))


def test_ratios_of_shares_by_hand():
    """Half of 20 training cells are of each class, and 90 and 8 of 98 validation cells; two more are half and half."""
    train, val = np.repeat([0, 1], 10), np.repeat([0, 1], [90, 8])
    np.testing.assert_allclose(share_ratios(train, val, 2), [0.91 / 0.5, 0.09 / 0.5])
    np.testing.assert_allclose(share_ratios(train, val[:0], 2), 1)
    np.testing.assert_allclose(share_ratios(train, train, 2), 1)


def test_ratios_of_shares_make_a_classifier_right_where_classes_have_other_shares():
    """Bayes' rule: probabilities learned on even classes, times the ratios, are those of the uneven ones."""
    density = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])  # of three values, in two classes
    even = density / density.sum(0)
    uneven = density * [[0.8], [0.2]] / (density * [[0.8], [0.2]]).sum(0)
    ratios = share_ratios(np.repeat([0, 1], 50), np.repeat([0, 1], [80_000, 20_000]), 2)
    corrected = even * ratios[:, None]
    np.testing.assert_allclose(corrected / corrected.sum(0), uneven, atol=1e-4)
