"""Measure the memory of predict_cell_type.py at 20,000 and at 200,000 cells: it must not grow with the file.

    python -m benchmarks.prediction_memory

Simulates .h5ad files of 20,000 human genes with about 1,500 expressed per cell (at random, since only their number
matters here), labels each by a model folder in a separate process, and prints peak resident memory and cells per second
of both, and their ratios. The larger file takes 2.5 GB, and its labelled copy as much; both are deleted afterwards.
With a time limit in mind, --sizes 5000,50000 shows the same. Writes prediction_memory.json into --out_path.
"""

import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.bench import RESULTS, Row, save_rows
from benchmarks.lib.stages import Stages
from benchmarks.preprocessing import simulate
from utils.cli import flag, parse_flags, run_script


@dataclass
class Flags:
    model_path: str = flag("a cell type model of human RNA", "reference/pbmc")
    sizes: str = flag("comma-separated numbers of cells", "20000,200000")
    report: bool = flag("also write the page with figures", False)
    seed: int = flag("random seed of the simulated counts", 0)
    work_path: str | None = flag("folder for the files; by default a temporary folder", None)
    out_path: str = flag("folder for the result", RESULTS)


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    stages, sizes = Stages(), sorted(map(int, flags.sizes.split(",")))
    model = shlex.quote(str(Path(flags.model_path).resolve()))
    for n_cells in sizes:
        with tempfile.TemporaryDirectory(dir=flags.work_path) as folder:
            path = Path(folder) / "cells.h5ad"
            simulate(path, n_cells, "csr", flags.seed)
            data = f"--data_path {shlex.quote(str(path))} --model_path {model} --min_count_coverage 0"
            stages.run(str(n_cells), f"predict_cell_type.py {data}{' --report' if flags.report else ''}")
    used = [stages.used[str(n_cells)] for n_cells in sizes]
    rates = [n_cells / one["seconds"] for n_cells, one in zip(sizes, used, strict=True)]
    for n_cells, one, rate in zip(sizes, used, rates, strict=True):
        print(f"{n_cells:>9,} cells  {one['peak_memory_gb']:.3f} GB  {rate:,.0f} cells/s")
    against = f"{sizes[-1]:,} cells against {sizes[0]:,}"
    rows = [
        Row(
            f"peak memory of prediction, {against}",
            used[-1]["peak_memory_gb"] / used[0]["peak_memory_gb"],
            1.2,
            "times",
            at_most=True,
        ),
        Row(f"cells/s of prediction, {against}", rates[-1] / rates[0], 0.9, "times"),
    ]
    runs = {
        n_cells: {"seconds": one["seconds"], "peak_memory_gb": one["peak_memory_gb"], "cells_per_second": rate}
        for n_cells, one, rate in zip(sizes, used, rates, strict=True)
    }
    save_rows("prediction_memory", rows, flags.out_path, runs=runs)


if __name__ == "__main__":
    run_script(main)
