"""What differs between devices: how much a step holds in memory at a time, and when the CPU waits."""

from dataclasses import dataclass
from functools import lru_cache

import torch

CPU_TOKENS = 256
"""Tokens per block of attention on a CPU. The size is fixed, so that sums are taken in the same order for any cells."""
GPU_MEMORY = 8 * 2**30
"""Bytes of a GPU whose memory cannot be asked for."""


@dataclass(frozen=True)
class Sizes:
    """How many values a step holds at a time.

    Attributes
    ----------
    block_tokens : tokens per block of attention; 0 for as many as `block_values` allows
    block_values : about how many random features of attention are in memory
    feed_tokens : tokens that pass a feed-forward at a time in inference
    recompute_values : size of [B, L, dim] above which the feed-forward is computed again in the backward pass
    logits : logits of a peak decoder
    """

    block_tokens: int
    block_values: int
    feed_tokens: int
    recompute_values: int
    logits: int


ON_CPU = Sizes(CPU_TOKENS, 2**21, CPU_TOKENS, 2**20, 2**22)
"""8 MB of features and 16 MB of logits, which fit into a CPU's cache."""


@lru_cache
def sizes_for(device: torch.device) -> Sizes:
    """The sizes for a device.

    Those of a GPU follow from its whole memory, never from what is free at the moment: they decide in which order sums
    are taken, and a resumed run must take them in the same. About one eightieth of the memory holds features, a quarter
    at most the hidden layers of six feed-forwards, and a sixteenth the logits.
    """
    if device.type == "cpu":
        return ON_CPU
    memory = GPU_MEMORY
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "mps":
        memory = torch.mps.recommended_max_memory()
    return Sizes(0, memory // 320, 2**62, memory // 768, memory // 256)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given, to measure its time."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def is_cpu(x: torch.Tensor) -> bool:
    """Whether the values of a tensor can be looked at without waiting.

    A shape that depends on values makes the CPU wait for a GPU. So where this is false, code keeps fixed shapes.
    """
    return x.device.type == "cpu"
