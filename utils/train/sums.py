"""Metrics on their way: sums and counts, added up over minibatches and processes, divided at the end."""

from utils.train.distributed import Runtime

Sums = dict[str, list[float]]  # metric → [sum, count]


def add_up(sums: Sums, metrics: dict) -> None:
    """Add a minibatch's (sum, count) pairs."""
    for name, (value, count) in metrics.items():
        entry = sums.setdefault(name, [0.0, 0.0])
        entry[0] += float(value)
        entry[1] += float(count)


def total(sums: Sums, runtime: Runtime) -> Sums:
    """Sums over all processes."""
    flat = runtime.sum({f"{name} {i}": value for name, pair in sums.items() for i, value in enumerate(pair)})
    names = dict.fromkeys(key.rpartition(" ")[0] for key in flat)
    return {name: [flat[f"{name} 0"], flat[f"{name} 1"]] for name in names}


def means(sums: Sums, runtime: Runtime) -> dict[str, float]:
    """Means over all processes of what was added up; `loss` first."""
    everywhere = total(sums, runtime)
    names = sorted(everywhere, key=lambda name: (name != "loss", name))
    return {name: everywhere[name][0] / max(everywhere[name][1], 1e-12) for name in names}
