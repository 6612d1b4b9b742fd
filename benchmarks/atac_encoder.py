"""Measure how ATAC pretraining and the peak decoder scale with the number of peaks, at the published size.

    python -m benchmarks.atac_encoder

Times training steps on minibatches of 4 cells with 10,000 open peaks each, of 115,000 and of 1,154,464 peaks in turn,
and takes the median. The loss of the decoder is computed in blocks of peaks; the size of the largest block is reported.
Prints targets and measured values, and writes atac_encoder.json into --out_path.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.lib.bench import RESULTS, Row, random_cells, save_rows
from models.atac_encoder import ATACEncoder, ATACEncoderConfig
from models.objectives import MaskedATAC
from models.peak_loss import decoded_peak_bce
from utils.cli import flag, parse_flags, run_script

N_CELLS, N_OPEN, FEW, MANY = 4, 10_000, 115_000, 1_154_464


@dataclass
class Flags:
    repeats: int = flag("repeats of each measurement; the median is reported", 5)
    threads: int = flag("CPU threads", 2)
    out_path: str = flag("folder for the result", RESULTS)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation in the block makes and for which `counts` is true."""

    def __init__(self, counts):
        super().__init__()
        self.counts, self.values = counts, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and self.counts(tensor):
                self.values = max(self.values, tensor.numel())
        return out


def make_step(n_peaks: int):
    torch.manual_seed(0)
    objective = MaskedATAC(ATACEncoder(ATACEncoderConfig(), n_peaks))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4, fused=True)
    batch = random_cells("atac", n_peaks, N_OPEN, N_CELLS)

    def step() -> None:
        objective(batch)[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    torch.set_num_threads(flags.threads)
    steps, seconds = {n: make_step(n) for n in (FEW, MANY)}, {FEW: [], MANY: []}
    for repeat in range(flags.repeats + 1):
        for n_peaks, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:  # the first one warms up
                seconds[n_peaks].append(time.perf_counter() - start)
    few, many = (float(np.median(seconds[n])) for n in (FEW, MANY))
    del steps

    decoder, embedding = nn.Linear(128, MANY), torch.randn(N_CELLS, 128, requires_grad=True)
    atac = random_cells("atac", MANY, N_OPEN, N_CELLS).atac
    with LargestTensor(lambda tensor: tensor.ndim == 2 and N_CELLS in tensor.shape) as largest:
        decoded_peak_bce(decoder, embedding, atac, 5.0).mean().backward()
    print(f"a step of {N_CELLS} cells: {few:.3g} s at {FEW:,} peaks, {many:.3g} s at {MANY:,}")
    name = f"ATAC encoder, training step at {MANY:,} peaks against {FEW:,}"
    rows = [
        Row(name, many / few, 1.5, "times", at_most=True),
        Row(f"peak decoder, of {N_CELLS * MANY:,} logits at a time", largest.values, 4_194_304, "logits", at_most=True),
    ]
    save_rows("atac_encoder", rows, flags.out_path, seconds={FEW: few, MANY: many}, threads=flags.threads)


if __name__ == "__main__":
    run_script(main)
