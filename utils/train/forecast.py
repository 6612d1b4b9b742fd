"""Estimate before a run how long it will take, by measuring a few real micro-batches."""

import time
from collections.abc import Callable
from itertools import islice

import torch

from models.device import wait_for
from models.minibatch import Minibatch
from models.objectives import Objective
from utils.cells.minibatches import CellDataset, Plan
from utils.progress import duration
from utils.train.config import TrainConfig

PASSES = 3
"""Number of passes that are measured."""
SHARE = 0.02
"""Measuring may take at most this share of the run's passes; shorter runs are not measured."""
LONG = 5.0
"""No further pass is measured once the passes so far have taken this many seconds."""
VALIDATION = 1 / 3
"""Cost of a forward pass, relative to a forward and backward pass."""


def forecast(
    objective: Objective,
    forward: Callable[[Minibatch], tuple],
    train: CellDataset,
    plan: Plan,
    val_plan: Plan,
    config: TrainConfig,
    steps_done: int,
) -> str:
    """Return a sentence with the number of epochs and steps of a run, and the time they will take.

    Parameters
    ----------
    objective : on its device; its weights and the random numbers of the run do not change
    forward : minibatch → (loss [B], …), as in the run, but without exchange between processes
    train : training cells
    plan, val_plan : division of an epoch into steps and micro-batches, of training and of validation cells
    config : training settings
    steps_done : optimiser steps taken before the run was resumed; they are not part of the estimate
    """
    total = config.epochs * plan.n_steps
    total = min(total, config.max_steps) if config.max_steps else total
    left = max(total - steps_done, 0)
    words = f"{_count(config.epochs, 'epoch')} × {_count(plan.n_steps, 'step')} of {_count(plan.step_size, 'cell')}"
    words += f", stopped after {_count(total, 'step')} (--max_steps)" if total < config.epochs * plan.n_steps else ""
    words += f", of which {_count(left, 'step')} are left" if steps_done else ""
    n = min(PASSES, int(SHARE * left * plan.micro_batches))
    if n:
        validation_passes = left / plan.n_steps / config.val_every * val_plan.n_steps * val_plan.micro_batches
        passes = left * plan.micro_batches + VALIDATION * validation_passes
        words += f": about {duration(passes * seconds_per_pass(objective, forward, train, plan, n))}"
        words += ", less if the loss stops falling (--patience)" if config.patience else ""
    return words


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def seconds_per_pass(objective: Objective, forward: Callable, train: CellDataset, plan: Plan, n: int) -> float:
    """Return the mean seconds of a forward and backward pass of a micro-batch.

    Of the n passes, the first only warms up. They take the micro-batches at one half, one quarter and three quarters of
    a step: within a step, cells are sorted by length, so these have typical lengths.
    """
    device = next(objective.parameters()).device
    some = list(islice(plan, max(plan.micro_batches, PASSES)))
    seconds: list[float] = []
    objective.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for quarter in (2, 1, 3)[:n]:
            batch = train[some[len(some) * quarter // 4]]
            started = time.perf_counter()
            forward(batch)[0].sum().backward()
            wait_for(device)
            seconds.append(time.perf_counter() - started)
            objective.zero_grad(set_to_none=True)
            if sum(seconds) > LONG:
                break
    measured = seconds[1:] or seconds
    return sum(measured) / len(measured)
