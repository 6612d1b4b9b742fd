"""The learning rate at the moments that define it."""

import numpy as np
import pytest

from utils.train.schedule import FLOOR, learning_rate

PEAK = 1e-3


def rate(epoch: float, peak: float = PEAK) -> float:
    return learning_rate(epoch, peak, warmup_epochs=5, cycle_epochs=15)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, FLOOR),
        (2.5, (PEAK + FLOOR) / 2),
        (5, PEAK),
        (5 + 7.5, (PEAK + FLOOR) / 2),  # half of the first cycle
        (5 + 5, FLOOR + (PEAK - FLOOR) * 0.75),  # a third: (1 + cos 60°) / 2
        (5 + 15, 0.9 * PEAK),  # restart
        (5 + 15 + 15, (0.9 * PEAK + FLOOR) / 2),  # half of a cycle of 30
        (5 + 15 + 30, 0.81 * PEAK),
        (5 + 15 + 30 + 30, (0.81 * PEAK + FLOOR) / 2),  # half of a cycle of 60
        (5 + 15 + 30 + 60, 0.729 * PEAK),
    ],
)
def test_numbers(epoch, expected):
    assert rate(epoch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("end", [5 + 15, 5 + 45, 5 + 105])
def test_a_cycle_ends_at_the_floor(end):
    assert rate(end - 1e-6) == pytest.approx(FLOOR, rel=1e-6)


def test_never_outside_floor_and_peak_and_continuous_within_a_cycle():
    epochs = np.linspace(0, 300, 30_001)
    rates = np.array([rate(e) for e in epochs])
    assert rates.min() >= FLOOR
    assert rates.max() <= PEAK * (1 + 1e-12)
    jumps = epochs[1:][np.diff(rates) > 0.02 * PEAK]
    np.testing.assert_allclose(jumps, [20, 50, 110, 230], atol=0.011)


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(0, PEAK, warmup_epochs=0, cycle_epochs=15) == PEAK


@pytest.mark.parametrize("peak", [0.0, 1e-7])
def test_a_peak_below_the_floor_is_constant(peak):
    assert {rate(e, peak) for e in (0, 1, 5, 12, 20, 40, 100)} == {peak}
