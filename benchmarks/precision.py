"""bfloat16 against float32: the demo's final scores at both precisions, for several seeds.

    python -m benchmarks.precision --seeds 3 --n_cells 800

A seed is another simulation and another training. The two precisions agree when their mean difference is within its
own noise: |mean| at most two standard errors over the seeds. Prints the table, and writes results.json into --out_path.
"""

import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.lib.stages import ROOT
from utils.cli import flag, parse_flags, run_script

SCORES = {
    "accuracy, with student": ("cell_types", "RNA only, with student", "accuracy"),
    "macro-F1, with student": ("cell_types", "RNA only, with student", "macro_f1"),
    "accuracy, RNA + ATAC": ("cell_types", "RNA + ATAC", "accuracy"),
    "macro-F1, RNA + ATAC": ("cell_types", "RNA + ATAC", "macro_f1"),
    "AUROC per peak, RNA → ATAC": ("translation_rna_to_atac", "scmomer", "peak_auroc"),
}


@dataclass
class Flags:
    seeds: int = flag("how many, from 0 on", 3)
    n_cells: int = flag("simulated cells of each", 800)
    out_path: str = flag("folder for the demos' outputs", "runs/precision")


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    found = {}
    for seed in range(flags.seeds):
        for precision in ("fp32", "bf16"):
            out = Path(flags.out_path).resolve() / f"{precision}_{seed}"
            out.parent.mkdir(parents=True, exist_ok=True)
            words = f"--n_cells {flags.n_cells} --seed {seed} --precision {precision}".split()
            print(f"seed {seed}, {precision}", flush=True)
            words = [sys.executable, "demo.py", "--out_path", str(out), *words]
            subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            summary = json.loads((out / "summary.json").read_text())
            for name, (part, row, score) in SCORES.items():
                found.setdefault(name, {}).setdefault(precision, []).append(summary[part][row][score])
    table = []
    for name, scores in found.items():
        difference = np.subtract(scores["bf16"], scores["fp32"])
        error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else np.nan
        row = {"score": name, "fp32": np.mean(scores["fp32"]), "bf16": np.mean(scores["bf16"])}
        table.append(row | {"difference": difference.mean(), "standard error": error})
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {flags.seeds} seeds")
    print(pd.DataFrame(table).round(4).to_string(index=False))
    (Path(flags.out_path) / "results.json").write_text(json.dumps({"scores": found, "table": table}, indent=1))


if __name__ == "__main__":
    run_script(main)
