"""Choose the batch size for --batch_size auto: measure which sizes fit into memory and which is fastest."""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from models.device import wait_for
from models.minibatch import Minibatch
from models.objectives import Objective
from utils.cells.minibatches import CellDataset, MicroBatch
from utils.errors import UserError
from utils.memory import forget_peak_memory, peak_memory
from utils.train.config import TrainConfig
from utils.train.distributed import Runtime

SHARE = 0.8
"""Share of the free memory that training may use."""
GAIN = 0.97
"""Stop measuring when a larger minibatch saves less than 3 % of the time per cell."""


@dataclass(frozen=True)
class Step:
    """Measurement of one forward and backward pass.

    Attributes
    ----------
    cells : cells in the minibatch
    seconds : wall-clock time
    peak : peak memory of the process (or of the GPU) in bytes, plus the size of Adam's moments
    """

    cells: int
    seconds: float
    peak: float

    @property
    def seconds_per_cell(self) -> float:
        return self.seconds / self.cells


def free_memory(device: torch.device) -> float:
    """Return the bytes that this process may use in total; the processes on one machine share the free memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with suppress(OSError, ValueError, KeyError):  # the limit of a container; without one, the file says "max"
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(
            free, limit - used + int(counted["inactive_file"])
        )  # cached files do not count: the system drops them
    forget_peak_memory()
    resident = peak_memory()
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + resident


def weights_memory(objective: Objective) -> int:
    """Return the bytes of all weights, and of the gradients and AdamW's two moments of those that are trained."""
    return sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in objective.parameters())


def check_weights_fit(objective: Objective, device: torch.device) -> None:
    """Raise a UserError if the weights with all that training keeps of them exceed the memory of this process.

    Layers with a row for each peak are the large ones: at a million peaks, own maps of patches and a student that reads
    ATAC.
    """
    needed, free = weights_memory(objective), free_memory(device)
    if needed > free:
        largest, size = max(((name, p.numel()) for name, p in objective.named_parameters()), key=lambda item: item[1])
        raise UserError(
            f"the weights, with gradients and optimiser, take {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; "
            f"the largest part is {largest} ({size:,} numbers): choose smaller sizes (--dim, --latent_dim, "
            "--student_hidden, or --patch_maps shared), or read fewer peaks"
        )


def measure_steps(
    objective: Objective,
    make_batch: Callable[[int], Minibatch],
    sizes: Iterable[int],
    device: torch.device,
    precision: str = "fp32",
    memory: float | None = None,
) -> list[Step]:
    """Measure passes of growing minibatches, until one does not fit or a larger one is no longer faster.

    Weights do not change.

    Parameters
    ----------
    objective : on `device`
    make_batch : number of cells → minibatch
    sizes : numbers of cells to try, increasing
    device : where to compute
    precision : fp32 or bf16
    memory : limit in bytes; by default the share `SHARE` of the free memory

    Returns
    -------
    One measurement per size that was tried; the last one may exceed `memory`
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
            wait_for(device)
            seconds = time.perf_counter() - started
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
            objective.zero_grad(set_to_none=True)
        steps.append(Step(n, seconds, peak + moments))
        pace = [step.seconds_per_cell for step in steps]
        if len(pace) > 2 and min(pace[-2:]) > GAIN * min(pace[:-2]):
            break
    return steps


def largest_fit(steps: list[Step], memory: float) -> int:
    """Return how many cells fit into `memory` bytes, extrapolated linearly from the last two measurements."""
    if len(steps) < 2:
        return steps[0].cells if steps and steps[0].peak <= memory else 0
    first, last = steps[-2:]
    per_cell = max((last.peak - first.peak) / (last.cells - first.cells), 1.0)
    return max(int(last.cells + (memory - last.peak) // per_cell), 0)


def choose_batch_size(objective: Objective, train: CellDataset, config: TrainConfig, runtime: Runtime) -> TrainConfig:
    """Split the cells of an optimiser step into the fastest micro-batches that fit into memory.

    A step has --grad_acc times the default batch size of the stage or preset. How it is split does not change the
    result, except for rounding. The longest training cells are measured, as they need the most memory.

    Parameters
    ----------
    objective : on its device
    train : training cells
    config : settings with batch_size None (--batch_size auto)
    runtime : this process

    Returns
    -------
    The settings with batch_size and grad_acc set

    Raises
    ------
    UserError
        If not even one cell fits into memory.
    """
    usual = type(config).batch_size  # the class's default is that of the stage or preset, see cli.with_defaults
    cells = usual * config.grad_acc
    longest = np.argsort(train.lengths, kind="stable")[::-1]

    def make_batch(n: int) -> Minibatch:
        return train[MicroBatch(np.resize(longest, n), np.ones(n, np.float32), 0, n)]

    memory = SHARE * free_memory(runtime.device)
    sizes = [size for size in range(1, cells + 1) if cells % size == 0]
    steps = measure_steps(objective, make_batch, sizes, runtime.device, config.precision, memory)
    steps = [step for step in steps if step.peak <= memory]
    size = min(steps, key=lambda step: step.seconds_per_cell).cells if steps else 0
    size = min(runtime.gather(size))  # the processes must agree; the smallest choice fits everywhere
    if not size:
        raise UserError(
            "--batch_size auto: not even one cell fits into memory; use --tokens expressed, --precision bf16, or a "
            "smaller --dim or --depth"
        )
    runtime.say(f"--batch_size auto: {size} cells at a time, {cells // size} times per step and process")
    return replace(config, batch_size=size, grad_acc=cells // size)
