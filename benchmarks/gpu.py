"""Check and measure everything on an NVIDIA GPU, in less than nine minutes.

    python -m benchmarks.gpu

Runs the tests that need a GPU; measures the card's matrix rate; then the RNA encoder at the published size with all
genes and with 2,000 expressed ones, and at the size of `--preset small`: training and inference, bfloat16 and float32,
cells per second, memory, and the share of the matrix rate. Then the Performer of performer-pytorch at its largest
minibatch (if it is installed), the loader alone, and two processes of which one fails.

The share counts the products that the formulas need: three times those of the forward pass for training, without
what is computed again to save memory. The rate is that of a product of two square matrices, in bfloat16 or TF32.

Needs PyTorch for CUDA, SciPy, pandas, einops, transformers and pytest, no file formats. Without a GPU it counts the
operators of a training step, and names the rows that stay open. Prints targets and measured values, and writes gpu.json
into --out_path.
"""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.lib.bench import RESULTS, Row, random_cells, save_rows
from benchmarks.lib.stages import ROOT
from benchmarks.lib.steps import N_EXPRESSED, N_GENES, PUBLISHED, our_step, peer_step
from models import favor
from models.device import ON_CPU, Sizes
from models.objectives import MaskedRNA
from models.performer import n_features_for
from models.rna_encoder import RNAEncoder
from models.shapes import RNAEncoderConfig
from utils.cli import flag, parse_flags, run_script

SMALL = RNAEncoderConfig(dim=64, depth=2, heads=2, dim_head=32, tokens="expressed")
SHAPES = {
    "published, all genes": PUBLISHED,
    "published, 2,000 expressed genes": replace(PUBLISHED, tokens="expressed"),
    "small, 2,000 expressed genes": SMALL,
}
REACH = {"published, all genes": 25, "published, 2,000 expressed genes": 15}
"""Shape → target share of the matrix rate in bfloat16 training, %."""
PEER_REACH = 4
H100 = Sizes(0, 2**28, 2**62, 80 * 2**30 // 768, 80 * 2**30 // 256)
"""Sizes of a card of 80 GB, to count operators without one."""
GAIN = 1.03
"""A larger minibatch is tried as long as it gains this factor."""
SECONDS = 150.0
"""Longest time for the tests."""


@dataclass
class Flags:
    part: str | None = flag("run one part alone: fail, as one of several processes", None)
    out_path: str = flag("folder for the result", RESULTS)


def flops(shape: RNAEncoderConfig) -> float:
    """Return the floating-point operations of the products in a forward pass of one cell."""
    length = N_GENES if shape.tokens == "all" else N_EXPRESSED
    inner, m = shape.heads * shape.dim_head, shape.n_features or n_features_for(shape.dim_head)
    projections = 4 * shape.dim * inner
    features = 2 * inner * m
    sums = 2 * shape.heads * m * (shape.dim_head + 1)
    feed_forward = 2 * shape.dim * shape.dim * shape.ff_mult
    return 2.0 * length * shape.depth * (projections + features + sums + feed_forward)


def timed(step: Callable[[], None], seconds: float = 1.5) -> float:
    """Return the seconds of a step, after two that warm up."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    started, n = time.perf_counter(), 0
    while n < 2 or time.perf_counter() - started < seconds:
        step()
        n += 1
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / n


def matrix_rate(dtype: torch.dtype) -> float:
    """Return the operations per second of a product of two matrices of 8,192 rows and columns."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * 8192**3 / timed(lambda: a @ b)


def fastest(make: Callable[[int], Callable[[], None]], most: int) -> dict[str, float]:
    """Double the minibatch while it fits and gains; return its size, cells/s and the peak memory in GiB."""
    best = {"cells": 0, "rate": 0.0, "gib": 0.0}
    for n in [2**i for i in range(most.bit_length())]:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            rate = n / timed(make(n))
        except torch.OutOfMemoryError:
            break
        if rate < GAIN * best["rate"] and n > 4:
            break
        if rate > best["rate"]:
            best = {"cells": n, "rate": rate, "gib": torch.cuda.max_memory_allocated() / 2**30}
    return best


class CountOperators(TorchDispatchMode):
    """Counts operators that compute something; views do not."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += not function.is_view
        return function(*args, **(kwargs or {}))


def operators(tokens: str, n_cells: int, sizes: Sizes) -> int:
    """Return how many operators a training step at the published length takes with these sizes.

    The number depends on how tokens and cells are cut into blocks, not on the widths, so it is counted on a narrow
    encoder with as many blocks.
    """
    shape = RNAEncoderConfig(dim=8, heads=1, dim_head=8, n_features=8, depth=PUBLISHED.depth, tokens=tokens)
    narrower = PUBLISHED.heads * n_features_for(PUBLISHED.dim_head) / (shape.heads * shape.n_features)
    sizes = replace(
        sizes,
        block_values=int(sizes.block_values / narrower),
        recompute_values=sizes.recompute_values * shape.dim // PUBLISHED.dim,
    )
    objective = MaskedRNA(RNAEncoder(shape, N_GENES), seed=0)
    batch = random_cells("rna", N_GENES, N_EXPRESSED, n_cells)
    places = [patch(f"models.{module}.sizes_for", lambda _: sizes) for module in ("favor", "performer")]
    with places[0], places[1], CountOperators() as counted:
        objective(batch)[0].sum().backward()
    return counted.n


def kernels(step: Callable[[], None]) -> int:
    """Return how many kernels a step starts on the GPU."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def loader_rate(n_cells: int = 512) -> float:
    """Return the cells per second that the loader alone makes and moves to the GPU, from values in memory."""
    import pandas as pd
    from scipy.sparse import csr_matrix

    from utils.cells.minibatches import CellDataset, Plan, make_loader

    rng, device = np.random.default_rng(0), "cuda" if torch.cuda.is_available() else "cpu"
    indices = np.concatenate([np.sort(rng.choice(N_GENES, N_EXPRESSED, replace=False)) for _ in range(n_cells)])
    values = rng.uniform(1, 6, len(indices)).astype(np.float32)
    matrix = csr_matrix((values, indices, np.arange(n_cells + 1) * N_EXPRESSED), shape=(n_cells, N_GENES))
    cells = CellDataset({"rna": matrix}, pd.Index([f"cell {i}" for i in range(n_cells)]))
    started = time.perf_counter()
    for epoch in range(4):
        plan = Plan(cells.lengths, 64, shuffle=True)
        plan.epoch = epoch
        for batch in make_loader(cells, plan, device):
            batch.to(device)
    return 4 * n_cells / (time.perf_counter() - started)


def fail() -> None:
    """One of two processes on one device: train two steps together, then the second process fails."""
    import torch.distributed as dist

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("gloo")
    objective = MaskedRNA(RNAEncoder(SMALL, 500), seed=0).to(device)
    module = torch.nn.parallel.DistributedDataParallel(objective)
    for step in range(10):
        if step == 2 and dist.get_rank() == 1:
            raise RuntimeError("this process fails on purpose")
        module(random_cells("rna", 500, 100, 4).to(device))[0].sum().backward()
        objective.zero_grad(set_to_none=True)


def seconds_to_end() -> float:
    """Return the seconds from the start of two processes, of which one fails, to the end of both."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    started = time.perf_counter()
    found = subprocess.run(
        [*command, "-m", "benchmarks.gpu", "--part", "fail"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    if found.returncode == 0 or "on purpose" not in found.stderr:
        raise RuntimeError(f"the failing process was not noticed:\n{found.stderr[-2000:]}")
    return time.perf_counter() - started


def run_tests() -> str:
    """Run the tests that need a GPU; return pytest's last line, or why they did not run."""
    if find_spec("pytest") is None:
        return "not run: pytest is not installed"
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"not finished within {SECONDS:.0f} s"
    lines = [line for line in found.stdout.splitlines() if line.startswith(("FAILED", "ERROR")) or " in " in line]
    return "\n".join([*lines, found.stderr[-500:]]).strip() or f"exit code {found.returncode}"


def measure() -> tuple[list[Row], dict]:
    """Measure all rows on this machine's GPU."""
    torch.set_float32_matmul_precision("high")
    rate = {"bf16": matrix_rate(torch.bfloat16), "fp32": matrix_rate(torch.float32)}
    print(f"matrix rate: {rate['bf16'] / 1e12:.0f} TFLOP/s in bfloat16, {rate['fp32'] / 1e12:.0f} in TF32", flush=True)
    rows, found = [], {"matrix_rate": rate}
    for name, shape in SHAPES.items():
        for trains in (True, False):
            for precision in ("bf16", "fp32"):
                work = f"{name}, {'training' if trains else 'inference'}, {precision}"
                step = partial(our_step, shape=shape, device="cuda", precision=precision, trains=trains)
                best = fastest(step, 256 if shape is SMALL else 64)
                share = 100 * best["rate"] * flops(shape) * (3 if trains else 1) / rate[precision]
                found[work] = best | {"share": share}
                size = f"{best['cells']} cells, {best['gib']:.1f} GiB"
                print(f"{work}: {best['rate']:.1f} cells/s, {share:.1f} % ({size})", flush=True)
                if trains and precision == "bf16" and name in REACH:
                    rows.append(Row(f"GPU, {work}", share, REACH[name], "% of the matrix rate"))
    work = "published, all genes, training, bf16"
    step = partial(our_step, device="cuda", precision="bf16")
    found["kernels per step"] = kernels(step(4))
    with patch.object(favor, "FUSED", False):
        favor.fused_favor.cache_clear()
        found[f"{work}, plain path"] = fastest(step, 64)
        found["kernels per step, plain path"] = kernels(step(4))
    favor.fused_favor.cache_clear()
    found["uses fused kernels"] = favor.fused_favor(torch.device("cuda", 0), torch.bfloat16, 64) is not None
    if find_spec("performer_pytorch"):
        peers = {how: partial(peer_step, device="cuda", precision=how) for how in ("bf16", "fp32")}
        found["peer"] = {how: fastest(step, 16) for how, step in peers.items()}
        theirs = max(best["rate"] for best in found["peer"].values())
        rows.append(Row(f"GPU, {work}, beside performer-pytorch", found[work]["rate"] / theirs, PEER_REACH, "times"))
    found["loader, cells/s"] = loader_rate()
    return rows, found


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    if flags.part == "fail":
        return fail()
    rows, found = [], {}
    if torch.cuda.is_available():
        found["tests"] = run_tests()
        print(found["tests"], flush=True)
        more, measured = measure()
        rows, found = rows + more, found | measured
    else:
        print("no NVIDIA GPU: its tests, rates, memory and the peer stay open; operators of a training step:")
        for tokens, n_cells in (("all", 16), ("expressed", 64)):
            before, now = operators(tokens, n_cells, ON_CPU), operators(tokens, n_cells, H100)
            found[f"operators, {tokens}, {n_cells} cells"] = {"cpu_sizes": before, "gpu_sizes": now}
            print(
                f"  {n_cells} cells, tokens {tokens}: {before:,} with a CPU's sizes, {now:,} with a GPU's", flush=True
            )
        found["loader, cells/s"] = loader_rate()
    print(f"loader alone: {found['loader, cells/s']:,.0f} cells/s")
    rows.append(Row("two processes, one fails: until both have ended", seconds_to_end(), 30, "s", at_most=True))
    save_rows("gpu", rows, flags.out_path, cpus=os.cpu_count(), **found)


if __name__ == "__main__":
    run_script(main)
