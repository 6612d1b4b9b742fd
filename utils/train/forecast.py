"""What a run will take, before it is begun: a few real micro-batches are measured."""

import time
from collections.abc import Callable
from itertools import islice

import torch

from models.minibatch import Minibatch
from models.objectives import Objective
from utils.cells.minibatches import CellDataset, Plan
from utils.progress import duration
from utils.train.config import TrainConfig

PASSES = 3
SHARE = 0.02
"""Of a run that measuring may take, in passes; shorter runs are not measured."""
LONG = 5.0
"""Seconds after which one pass, however slow the first one is, must do."""
VALIDATION = 1 / 3
"""Cost of a forward pass, as a share of forward and backward."""


def forecast(
    objective: Objective,
    forward: Callable[[Minibatch], tuple],
    train: CellDataset,
    plan: Plan,
    val_plan: Plan,
    config: TrainConfig,
    steps_done: int,
) -> str:
    """How many epochs and steps there are, and about how long they will take, in words.

    Parameters
    ----------
    objective : on its device; its weights, and the random numbers of the run, stay what they are
    forward : minibatch → (loss [B], …), as the run computes it, but without exchange between processes
    train : the training cells
    plan, val_plan : how an epoch is cut
    config, steps_done : of the run; what is done already is not counted again
    """
    total = config.epochs * plan.n_steps
    total = min(total, config.max_steps) if config.max_steps else total
    left = max(total - steps_done, 0)
    words = f"{_count(config.epochs, 'epoch')} × {_count(plan.n_steps, 'step')} of {_count(plan.step_size, 'cell')}"
    words += f", stopped after {_count(total, 'step')} (--max_steps)" if total < config.epochs * plan.n_steps else ""
    words += f", of which {_count(left, 'step')} are left" if steps_done else ""
    n = min(PASSES, int(SHARE * left * plan.micro_batches))
    if n:
        looks = left / plan.n_steps / config.val_every * val_plan.n_steps * val_plan.micro_batches
        passes = left * plan.micro_batches + VALIDATION * looks
        words += f": about {duration(passes * seconds_per_pass(objective, forward, train, plan, n))}"
        words += ", less if the loss stops falling (--patience)" if config.patience else ""
    return words


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def seconds_per_pass(objective: Objective, forward: Callable, train: CellDataset, plan: Plan, n: int) -> float:
    """Seconds of forward and backward pass of a micro-batch: the mean of n, the first of which only warms up.

    They are of middling length: within a step, cells are sorted by length.
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
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
            objective.zero_grad(set_to_none=True)
            if sum(seconds) > LONG:
                break
    measured = seconds[1:] or seconds
    return sum(measured) / len(measured)
