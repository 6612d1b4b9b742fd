"""Find the operations in which the RNA encoder spends its time, with the profiler of torch.

    python -m benchmarks.where_time_goes

Profiles inference at the published size, for all genes and for 2,000 expressed ones. Writes where_time_goes.md into
--out_path.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.lib.bench import RESULTS, machine
from benchmarks.rna_encoder import make_step
from utils.cli import flag, parse_flags, run_script

WORKS = ("inference, expressed genes, fp32", "inference, all genes, fp32")


@dataclass
class Flags:
    threads: int = flag("CPU threads", 2)
    rows: int = flag("number of operations to show, the slowest first", 12)
    out_path: str = flag("folder for the result", RESULTS)


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    torch.set_num_threads(flags.threads)
    lines = [machine()]
    for work in WORKS:
        step = make_step(work)
        step()  # warms up
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            step()
        operations = sorted(watched.key_averages(), key=lambda op: op.self_cpu_time_total, reverse=True)
        total = sum(op.self_cpu_time_total for op in operations)
        lines += ["", f"{work}: {total / 1e6:.3g} s", "", "| operation | ms | share | calls |", "|---|---|---|---|"]
        lines += [
            f"| {op.key} | {op.self_cpu_time_total / 1e3:.1f} | {op.self_cpu_time_total / total:.1%} | {op.count} |"
            for op in operations[: flags.rows]
        ]
    text = "\n".join(lines) + "\n"
    print(text)
    out = Path(flags.out_path)
    out.mkdir(parents=True, exist_ok=True)
    (out / "where_time_goes.md").write_text(text)


if __name__ == "__main__":
    run_script(main)
