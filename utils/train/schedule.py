"""The published learning rate: linear warm-up, then cosine cycles, each twice as long and with a 10 % lower peak."""

import math

FLOOR = 1e-6
"""Lowest learning rate: at the start of the warm-up and at the end of each cycle."""
CYCLE_GROWTH = 2
"""Length of a cycle, relative to the one before."""
CYCLE_DECAY = 0.9
"""Peak of a cycle, relative to the one before."""


def learning_rate(epoch: float, peak: float, warmup_epochs: float, cycle_epochs: float) -> float:
    """Return the learning rate at a point of training.

    Parameters
    ----------
    epoch : epochs since the start of training, fractions included
    peak : learning rate at the end of the warm-up
    warmup_epochs : length of the linear warm-up, in epochs
    cycle_epochs : length of the first cosine cycle, in epochs

    Returns
    -------
    Learning rate; never below the floor of 1e-6 (or `peak`, if that is smaller)
    """
    floor = min(FLOOR, peak)
    if epoch < warmup_epochs:
        return floor + (peak - floor) * epoch / warmup_epochs
    epoch -= warmup_epochs
    while epoch >= cycle_epochs:
        epoch -= cycle_epochs
        cycle_epochs *= CYCLE_GROWTH
        peak = max(peak * CYCLE_DECAY, floor)
    return floor + (peak - floor) * (1 + math.cos(math.pi * epoch / cycle_epochs)) / 2
