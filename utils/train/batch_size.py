"""Which minibatch fits into memory and is fastest, measured by a few steps."""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from models.minibatch import Minibatch
from models.objectives import Objective
from utils.cells.minibatches import CellDataset, MicroBatch
from utils.errors import UserError
from utils.memory import forget_peak_memory, peak_memory
from utils.train.config import TrainConfig
from utils.train.distributed import Runtime

SHARE = 0.8
"""Of the memory that is free, to be planned with."""
GAIN = 0.97
"""Stop when a larger minibatch saves less than 3 % of the time per cell."""


@dataclass(frozen=True)
class Step:
    """Forward and backward pass of `cells` cells: seconds, and the peak of the process's (or GPU's) memory in bytes,
    with Adam's moments."""

    cells: int
    seconds: float
    peak: float

    @property
    def seconds_per_cell(self) -> float:
        return self.seconds / self.cells


def free_memory(device: torch.device) -> float:
    """Bytes that this process may come to use in all, when processes of one machine share what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with suppress(OSError, ValueError, KeyError):  # a container's limit; "max" is none
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(counted["inactive_file"]))  # files read lately give way
    forget_peak_memory()
    resident = peak_memory()
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + resident


def measure_steps(
    objective: Objective,
    make_batch: Callable[[int], Minibatch],
    sizes: Iterable[int],
    device: torch.device,
    precision: str = "fp32",
    memory: float | None = None,
) -> list[Step]:
    """Passes of growing minibatches, as long as they fit and larger ones are faster; weights stay what they are.

    Parameters
    ----------
    objective : on `device`
    make_batch : number of cells → minibatch
    sizes : numbers of cells to try, increasing
    memory : bytes to stay below; by default a share of what is free
    """
    memory = SHARE * free_memory(device) if memory is None else memory
    moments = 2 * sum(p.numel() * p.element_size() for p in objective.parameters() if p.requires_grad)
    steps: list[Step] = []
    objective.train()
    for n in sizes:
        if steps and (steps[-1].peak > memory or (len(steps) > 1 and largest_fit(steps, memory) < n)):
            break
        batch = make_batch(n).to(device)
        for _ in range(2 if not steps else 1):  # the first one warms up
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            else:
                forget_peak_memory()
            started = time.perf_counter()
            try:
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    objective(batch)[0].sum().backward()
            except torch.OutOfMemoryError:
                objective.zero_grad(set_to_none=True)
                return steps
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
            objective.zero_grad(set_to_none=True)
        steps.append(Step(n, seconds, peak + moments))
        pace = [step.seconds_per_cell for step in steps]
        if len(pace) > 2 and min(pace[-2:]) > GAIN * min(pace[:-2]):
            break
    return steps


def largest_fit(steps: list[Step], memory: float) -> int:
    """The largest minibatch within `memory` bytes, when every cell takes what it took between the last two steps."""
    if len(steps) < 2:
        return steps[0].cells if steps and steps[0].peak <= memory else 0
    first, last = steps[-2:]
    per_cell = max((last.peak - first.peak) / (last.cells - first.cells), 1.0)
    return max(int(last.cells + (memory - last.peak) // per_cell), 0)


def choose_batch_size(objective: Objective, train: CellDataset, config: TrainConfig, runtime: Runtime) -> TrainConfig:
    """Cut the cells of an optimiser step, --grad_acc times the stage's usual minibatch, into the best micro-batches.

    The longest training cells are measured. What is learned does not depend on the cut, but for rounding.

    Parameters
    ----------
    objective : on its device
    config : TrainConfig with --batch_size auto

    Returns
    -------
    The same with batch_size and grad_acc

    Raises
    ------
    UserError
        If not even one cell fits.
    """
    usual = type(config).batch_size  # the default: the stage's own, or the preset's
    cells = usual * config.grad_acc
    longest = np.argsort(train.lengths, kind="stable")[::-1]

    def make_batch(n: int) -> Minibatch:
        return train[MicroBatch(np.resize(longest, n), np.ones(n, np.float32), 0, n)]

    memory = SHARE * free_memory(runtime.device)
    sizes = [size for size in range(1, cells + 1) if cells % size == 0]
    steps = measure_steps(objective, make_batch, sizes, runtime.device, config.precision, memory)
    steps = [step for step in steps if step.peak <= memory]
    size = min(steps, key=lambda step: step.seconds_per_cell).cells if steps else 0
    size = min(runtime.gather(size))  # all processes cut alike
    if not size:
        raise UserError(
            "--batch_size auto: not even one cell fits into memory; use --tokens expressed, --precision bf16, or a "
            "smaller --dim or --depth"
        )
    runtime.say(f"--batch_size auto: {size} cells at a time, {cells // size} times per step and process")
    return replace(config, batch_size=size, grad_acc=cells // size)
