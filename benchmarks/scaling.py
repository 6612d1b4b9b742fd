"""Measure how the time of a training step grows with genes, expressed genes, peaks, batch size and processes.

    python -m benchmarks.scaling

Times forward and backward passes of stage I at the published size in float32, and takes the fastest of a few. The curve
for processes is that of the demo's RNA encoder with one thread per process, taken from throughput.json if that exists.
Writes scaling.csv and scaling.png into --out_path.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.lib.bench import RESULTS, machine, random_cells, read_rows
from models.atac_encoder import ATACEncoder, ATACEncoderConfig
from models.objectives import MaskedATAC, MaskedRNA
from models.rna_encoder import RNAEncoder, RNAEncoderConfig
from utils.cli import flag, parse_flags, run_script
from utils.evaluate.plots import scaling
from utils.train.batch_size import measure_steps

N_GENES, N_EXPRESSED, N_PEAKS, N_OPEN = 16_906, 2_000, 1_154_464, 10_000


@dataclass
class Flags:
    repeats: int = flag("passes per size; the fastest is reported", 2)
    threads: int = flag("CPU threads", 2)
    out_path: str = flag("folder for the results", RESULTS)


def rna_pass(n_genes: int, n_expressed: int, tokens: str, cells: int = 1) -> tuple:
    torch.manual_seed(0)
    objective = MaskedRNA(RNAEncoder(RNAEncoderConfig(tokens=tokens), n_genes), seed=0)
    return objective, random_cells("rna", n_genes, n_expressed, cells)


def atac_pass(n_peaks: int) -> tuple:
    torch.manual_seed(0)
    objective = MaskedATAC(ATACEncoder(ATACEncoderConfig(), n_peaks))
    return objective, random_cells("atac", n_peaks, N_OPEN, 4)


def seconds(objective, batch, repeats: int) -> float:
    """Return the seconds of the fastest pass."""
    passes = [measure_steps(objective, lambda n: batch, (1,), torch.device("cpu"))[0].seconds for _ in range(repeats)]
    return float(np.min(passes))


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    torch.set_num_threads(flags.threads)
    curves = {
        "genes, all as tokens": ((n, *rna_pass(n, n // 8, "all")) for n in (1000, 2000, 4000, 8000, N_GENES)),
        "expressed genes": ((n, *rna_pass(N_GENES, n, "expressed")) for n in (250, 500, 1000, 2000, 4000, 8000)),
        "peaks": ((n, *atac_pass(n)) for n in (20_000, 115_000, 400_000, N_PEAKS)),
        "cells at a time": ((n, *rna_pass(N_GENES, N_EXPRESSED, "expressed", n)) for n in (1, 2, 4, 8)),
    }
    rows = []
    for curve, points in curves.items():
        for n, objective, batch in points:
            took = seconds(objective, batch, flags.repeats) / len(batch)
            rows.append({"curve": curve, "n": n, "seconds_per_cell": took})
            print(f"{curve}: {n:,}: {took:.3g} s per cell", flush=True)
    throughput = Path(flags.out_path) / "throughput.json"
    if throughput.is_file():
        rates = read_rows(throughput)[1]["rates"]
        rows += [
            {"curve": "processes", "n": int(n), "seconds_per_cell": 1 / np.median(rate)} for n, rate in rates.items()
        ]
    table = pd.DataFrame(rows)
    out = Path(flags.out_path)
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "scaling.csv", index=False, float_format="%.4g")
    scaling(table, machine(), out / "scaling.png")
    print(f"wrote {out / 'scaling.csv'} and {out / 'scaling.png'}")


if __name__ == "__main__":
    run_script(main)
