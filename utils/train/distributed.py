"""Run as one process or as several, with the same code.

Without a launcher there is one process, and every exchange below returns what it was given.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from utils.errors import UserError


@dataclass(frozen=True)
class Runtime:
    """This process among all processes of a run.

    Attributes
    ----------
    device : the device it computes on
    rank, world_size : its number, from 0 on, and the number of processes
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, the only one that prints and writes files."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a text on the first process only."""
        if self.is_main:
            print(text, flush=True)

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Return the sum of each number over all processes.

        Processes may have different names. Numbers are added in the order of ranks, so all processes get the same bits.
        """
        total: dict[str, float] = {}
        for part in self.gather(values):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def sum_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes, on the CPU."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is true on any process."""
        return [count > 0 for count in self.sum_tensor(torch.tensor(flags, dtype=torch.float64)).tolist()]

    @property
    def restarted(self) -> bool:
        """Whether the launcher has restarted these processes after one of them died (torchrun --max_restarts)."""
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    def gather(self, value) -> list:
        """Return the values of all processes in the order of ranks.

        Values travel pickled, which is slow: use it for small values, or rarely.
        """
        if self.world_size == 1:
            return [value]
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def in_turn(self, function: Callable, items: Iterable) -> Iterator:
        """Apply a function to items, which the processes take in turn; yield all results in order on every process.

        With one process it is `map`. Results travel as in `gather`.

        Raises
        ------
        UserError
            On every process, if the function raises it on any.
        """
        if self.world_size == 1:
            yield from map(function, items)
            return
        items = list(items)
        for start in range(0, len(items), self.world_size):
            mine, found = start + self.rank, None
            if mine < len(items):
                try:
                    found = function(items[mine])
                except UserError as error:
                    found = error
            for result in self.gather(found)[: len(items) - start]:
                if isinstance(result, UserError):
                    raise result
                yield result

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        if self.world_size > 1:
            dist.barrier()


class Quiet(Runtime):
    """A process that does not print: the runs of folds would hide the results."""

    def say(self, text: str) -> None:
        pass


def choose_device(name: str, local_rank: int = 0, is_alone: bool = True) -> torch.device:
    """Return the device for --device: `auto` is an NVIDIA GPU, else an Apple GPU, else the CPU.

    Parameters
    ----------
    name : auto, cpu, cuda or mps
    local_rank : number of this process on its machine, and of its GPU
    is_alone : whether there is one process; several cannot share an Apple GPU

    Raises
    ------
    UserError
        If a GPU is asked for that is not visible, or that several processes cannot share.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind in there if there[kind] and (is_alone or kind == "cuda")), "cpu")
    if not there.get(name, True):
        raise UserError(f"--device {name}: no such device is visible here; use --device auto or --device cpu")
    if name == "mps" and not is_alone:
        raise UserError("--device mps: several processes cannot share it; start one, or use --device cpu")
    if name != "cuda":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} has no GPU of its own, because {torch.cuda.device_count()} are visible here; start "
            "as many processes as GPUs"
        )
    return torch.device("cuda", local_rank)


def set_up(device: torch.device, deterministic: bool = True) -> None:
    """Prepare a device for a run; nothing is done for CPUs.

    Matrix products of float32 on an NVIDIA GPU are computed in TF32, with the range of float32 and 10 bits of fraction.

    Parameters
    ----------
    device : from `choose_device`
    deterministic : the same run gives the same bits again. PyTorch then chooses algorithms that add in a fixed order
    """
    if device.type != "cuda":
        return
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's buffers, which decide about its order
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a safeguard that costs a pass over memory


_groups = []
"""Process groups, referenced until the program ends. DistributedDataParallel holds a reference to its group. If that
were the last one, dropping it would wait for gloo's thread while holding the interpreter lock, for which that thread
may be waiting: a deadlock."""


def lone_process(device: str) -> Runtime:
    """The `Runtime` of a script that is never launched as several processes."""
    chosen = choose_device(device)
    set_up(chosen)
    return Runtime(chosen)


@contextmanager
def distributed_run(device: str, deterministic: bool = True) -> Iterator[Runtime]:
    """Yield the `Runtime` of this process: one of those that a launcher (torchrun) started, or a single one.

    Processes communicate by NCCL between GPUs and by gloo between CPUs.

    Parameters
    ----------
    device : auto, cpu, cuda or mps
    deterministic : see `set_up`
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")), world_size == 1)
    set_up(chosen, deterministic)
    if world_size == 1:
        yield Runtime(chosen)
        return
    # When torchrun restarts its workers, its store still holds the addresses of those that died; a prefix hides them.
    store, rank, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    _groups.append(dist.group.WORLD)
    try:
        yield Runtime(chosen, dist.get_rank(), world_size)
    finally:
        dist.destroy_process_group()
