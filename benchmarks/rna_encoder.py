"""Measure the time and memory of the RNA encoder at the published size, beside the Performer of performer-pytorch.

    pip install --no-deps performer-pytorch==1.1.4 local-attention==1.9.0 axial-positional-embedding==0.3.12
    python -m benchmarks.rna_encoder

One cell with 16,906 genes; width 200, 6 blocks with 10 heads of 64 dimensions, 266 random features. The peer and our
encoder are timed in turn in one process, and the median is taken. Peak memory is that of a process that does a single
step. Prints targets and measured values, and writes rna_encoder.json into --out_path. Without performer-pytorch, only
our encoder is measured.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch

from benchmarks.lib.bench import RESULTS, Row, save_rows
from benchmarks.lib.steps import our_step, peer_step
from models.shapes import RNAEncoderConfig
from utils.cli import flag, parse_flags, run_script
from utils.memory import forget_peak_memory, peak_memory

HAS_PEER = find_spec("performer_pytorch") is not None
REACH = {  # work → target speed (× the peer's), target memory (% of the peer's)
    "training, all genes, fp32": (1.8, 25),
    "training, all genes, bf16": (2.5, 25),
    "inference, all genes, fp32": (2.0, 25),
    "training, expressed genes, fp32": (18, None),
    "inference, expressed genes, fp32": (25, None),
}


@dataclass
class Flags:
    repeats: int = flag("repeats of each measurement; the median is reported", 5)
    threads: int = flag("CPU threads", 2)
    only: str | None = flag("do one step of this work and print the peak memory in MB", None)
    out_path: str = flag("folder for the result", RESULTS)


def make_step(work: str) -> Callable[[], None]:
    """Return a step of the peer or of our encoder: training or inference, as `work` says."""
    how = {"precision": "bf16" if "bf16" in work else "fp32", "trains": "inference" not in work}
    if work.startswith("peer"):
        return peer_step(**how)
    return our_step(shape=RNAEncoderConfig(tokens="expressed" if "expressed" in work else "all"), **how)


def memory_of(work: str, threads: int) -> float:
    """Return the peak memory in MiB of a process that does one step."""
    forget_peak_memory()
    command = [sys.executable, "-m", "benchmarks.rna_encoder", "--only", work, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    torch.set_num_threads(flags.threads)
    if flags.only:
        make_step(flags.only)()
        print(peak_memory() / 2**20)
        return
    peers = ["peer training", "peer inference"] if HAS_PEER else []
    if not peers:
        print("performer-pytorch is not installed (see --help); only our encoder is measured")
    works = [*peers, *REACH]
    memory = {work: memory_of(work, flags.threads) for work in works}
    steps = {work: make_step(work) for work in works}
    seconds = {work: [] for work in steps}
    for repeat in range(flags.repeats + 1):
        for work, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:  # the first one warms up
                seconds[work].append(time.perf_counter() - start)
        print(f"round {repeat} of {flags.repeats}", flush=True)
    median = {work: float(np.median(times)) for work, times in seconds.items()}
    rows = []
    for work, (speed, share) in REACH.items():
        print(f"{work}: {median[work]:.3g} s, peak {memory[work]:,.0f} MiB")
        if peers:
            peer = f"peer {work.split(',')[0]}"
            rows.append(Row(f"RNA encoder, {work}", median[peer] / median[work], speed, "× the peer's speed"))
            if share:
                part = 100 * memory[work] / memory[peer]
                rows.append(Row(f"RNA encoder, {work}, memory", part, share, "% of the peer's", at_most=True))
    save_rows("rna_encoder", rows, flags.out_path, seconds=median, peak_mb=memory, threads=flags.threads)


if __name__ == "__main__":
    run_script(main)
