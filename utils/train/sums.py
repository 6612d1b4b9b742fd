"""Read metrics off the device, and add them up over minibatches and processes.

Each metric is a sum and a count, and is divided only at the end: a mean of means would give the cells of a small last
minibatch more weight than others.
"""

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from utils.train.distributed import Runtime

Sums = dict[str, list[float]]  # metric → [sum, count]


def read_together(tree):
    """Return nested lists, tuples and dicts of tensors with the tensors on the CPU, as float32.

    All travel in one transfer: each one would make the CPU wait until a GPU has done everything before it.
    """
    tensors, structure = tree_flatten(tree)
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    shapes = [tensor.shape for tensor in tensors]
    return tree_unflatten([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], structure)


def add_up(sums: Sums, metrics: dict) -> None:
    """Add the (sum, count) pairs of a minibatch to `sums`, in place."""
    for name, (value, count) in metrics.items():
        entry = sums.setdefault(name, [0.0, 0.0])
        entry[0] += float(value)
        entry[1] += float(count)


def total(sums: Sums, runtime: Runtime) -> Sums:
    """Return the sums over all processes."""
    # One flat dict, so that all metrics travel in a single exchange.
    flat = runtime.sum({f"{name} {i}": value for name, pair in sums.items() for i, value in enumerate(pair)})
    names = dict.fromkeys(key.rpartition(" ")[0] for key in flat)
    return {name: [flat[f"{name} 0"], flat[f"{name} 1"]] for name in names}


def means(sums: Sums, runtime: Runtime) -> dict[str, float]:
    """Return the mean of each metric over all processes; `loss` comes first."""
    everywhere = total(sums, runtime)
    names = sorted(everywhere, key=lambda name: (name != "loss", name))
    return {name: everywhere[name][0] / max(everywhere[name][1], 1e-12) for name in names}
