"""One process or many: the same path, with or without a launcher."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from utils.errors import UserError


@dataclass(frozen=True)
class Runtime:
    """Where this process stands.

    Attributes
    ----------
    device : what it computes on
    rank, world_size : its number among all processes, and how many there are
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print once, whatever the number of processes."""
        if self.is_main:
            print(text, flush=True)

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Add up numbers over all processes, in the order of their ranks; one that lacks a name adds nothing to it."""
        total: dict[str, float] = {}
        for share in self.gather(values):
            for name, value in share.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def sum_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over all processes."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process."""
        return [count > 0 for count in self.sum_tensor(torch.tensor(flags, dtype=torch.float64)).tolist()]

    @property
    def restarted(self) -> bool:
        """Whether the launcher has started these processes again after one of them died (torchrun --max_restarts)."""
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    def gather(self, value) -> list:
        """The values of all processes, by rank (small or rarely sent ones: they travel pickled between our own)."""
        if self.world_size == 1:
            return [value]
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            dist.barrier()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is a GPU when there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible here; use --device auto or --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


_groups = []
"""Process groups, kept to the end of the program. DistributedDataParallel refers to its group: if that is the last
reference, it joins gloo's thread while it holds the interpreter's lock, which that thread may be waiting for."""


@contextmanager
def distributed_run(device: str) -> Iterator[Runtime]:
    """Join the processes a launcher (torchrun) started, or run alone; NCCL between GPUs, gloo between CPUs.

    Parameters
    ----------
    device : auto, cpu or cuda
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        yield Runtime(chosen)
        return
    # torchrun keeps its store when it starts workers again, and with it the addresses of those that died.
    store, rank, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    _groups.append(dist.group.WORLD)
    try:
        yield Runtime(chosen, dist.get_rank(), world_size)
    finally:
        dist.destroy_process_group()
