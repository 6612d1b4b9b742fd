"""The mixture of a model with simple classifiers: its numbers, and what validation cells choose."""

import numpy as np
import pytest
from scipy.special import softmax

from utils.evaluate.boxed import MLP
from utils.evaluate.boxed import REGRESSION as LINEAR
from utils.evaluate.mixture import LEAST, LEAST_GAIN, OURS, check_mixture, fit_mixture, gain, log_members, mixed_logits


def test_the_product_of_two_known_tables():
    """0.8 · 0.6² against 0.2 · 0.4² is 9 to 1; a class that a member thinks impossible is merely improbable."""
    logits = np.log([[0.8, 0.2], [0.5, 0.5]]).astype(np.float32)
    members = log_members(logits, {LINEAR: np.array([[0.6, 0.4], [1.0, 0.0]])})
    mixed = mixed_logits({OURS: 1.0, LINEAR: 2.0}, members)
    assert mixed.dtype == np.float32
    found = softmax(mixed, axis=1)
    np.testing.assert_allclose(found[0], [0.9, 0.1], atol=1e-3)
    impossible = LEAST / 2
    np.testing.assert_allclose(found[1, 1] / found[1, 0], (impossible / (1 - impossible)) ** 2, rtol=1e-3)


def test_the_model_alone_has_its_own_order():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (50, 4)).astype(np.float32)
    members = log_members(logits, {LINEAR: np.full((50, 4), 0.25)})
    mixed = mixed_logits({OURS: 1.0, LINEAR: 0.0}, members)
    np.testing.assert_array_equal(np.argsort(mixed, axis=1), np.argsort(logits, axis=1))
    np.testing.assert_allclose(softmax(mixed, axis=1), softmax(logits, axis=1), atol=LEAST)


def made(rng, labels, signal: float):
    """[cells, 4] logits that know the class, the better the larger the signal."""
    return signal * np.eye(4)[labels] + rng.normal(size=(len(labels), 4))


@pytest.mark.parametrize("n", [40, 1000])
def test_noise_gets_little_weight(n):
    """The others when they are noise, and the model when it is."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, n)
    good, noise = made(rng, labels, 3), made(rng, labels, 0)
    alone = fit_mixture(log_members(good, {LINEAR: softmax(noise, 1), MLP: softmax(noise[::-1], 1)}), labels)
    assert alone[OURS] > 0.7 and max(alone[LINEAR], alone[MLP]) < 0.3 * alone[OURS]
    others = fit_mixture(log_members(noise, {LINEAR: softmax(good, 1), MLP: softmax(noise[::-1], 1)}), labels)
    assert others[LINEAR] > 0.7 and max(others[OURS], others[MLP]) < 0.3 * others[LINEAR]


def test_new_cells_are_no_worse_than_by_the_best_member():
    """Whichever member is the best, and better than each where all know something of their own."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 2100)
    for signals in ((3, 1, 1), (1, 3, 1), (1, 1, 3), (2, 2, 2)):
        ours, linear, mlp = (made(rng, labels, signal) for signal in signals)
        members = log_members(ours, {LINEAR: softmax(linear, 1), MLP: softmax(mlp, 1)})
        weights = fit_mixture({name: member[:100] for name, member in members.items()}, labels[:100])
        right = lambda scores: (scores[100:].argmax(1) == labels[100:]).mean()
        best = max(right(member) for member in members.values())
        assert right(mixed_logits(weights, members)) > best + (0.1 if signals == (2, 2, 2) else -0.01)


@pytest.mark.parametrize("n", [60, 700])
def test_the_gain_is_that_on_new_cells(n):
    """Estimated on the cells that choose the weights, and seen on 5,000 others; large only where it is real."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, n + 5000)
    right = lambda logits: (logits[n:].argmax(1) == labels[n:]).mean()
    for signals, helps in (((1, 3), True), ((3, 0), False), ((2, 2), True)):
        ours, linear = (made(rng, labels, signal) for signal in signals)
        members = log_members(ours, {LINEAR: softmax(linear, 1)})
        some = {name: member[:n] for name, member in members.items()}
        found, weights = gain(some, labels[:n]), fit_mixture(some, labels[:n])
        real = right(mixed_logits(weights, members)) - right(ours)
        assert abs(found - real) < (0.12 if n < 100 else 0.04)  # one and a half standard errors of n cells, or more
        assert (found >= LEAST_GAIN) == helps
        assert found == gain(some, labels[:n])


def test_too_few_cells_have_no_gain():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 12)
    members = log_members(rng.normal(size=(12, 2)), {LINEAR: np.full((12, 2), 0.5)})
    assert gain(members, labels) is None


def test_who_says_nothing_has_no_weight_and_too_few_cells_choose_nothing():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 4, 60)
    members = log_members(made(rng, labels, 2), {LINEAR: np.full((60, 4), 0.25)})
    some = lambda n: fit_mixture({name: member[:n] for name, member in members.items()}, labels[:n])
    assert some(9) is None
    assert some(10)[LINEAR] == some(60)[LINEAR] == 0 < some(60)[OURS]


@pytest.mark.parametrize("weights", [{OURS: 1.0}, {OURS: 1.0, LINEAR: -0.1}, {OURS: 0.0, LINEAR: 0.0}])
def test_damaged_weights_are_refused(weights):
    check_mixture({OURS: 1.0, LINEAR: 0.2}, (LINEAR,))
    with pytest.raises(ValueError, match="mixture"):
        check_mixture(weights, (LINEAR,))
