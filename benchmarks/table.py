"""Collect the results of `make bench` in one table.

    python -m benchmarks.table

Reads the results of the other benchmarks from benchmarks/results/, also of those that `make bench` does not run, and
writes table.md there.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.bench import RESULTS, number, read_rows
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError

SCRIPTS = (
    *("rna_encoder", "atac_encoder", "loading", "throughput", "busy_neighbour", "prediction_memory"),
    *("disk", "atlas", "gpu"),  # not part of `make bench`: they need much disk, hours or a GPU
)


@dataclass
class Flags:
    out_path: str = flag("folder with the results", RESULTS)


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    lines, machines = ["| work | reach | measured | ratio |", "|---|---|---|---|"], {}
    for script in SCRIPTS:
        path = Path(flags.out_path) / f"{script}.json"
        if not path.is_file():
            lines.append(f"| {script}.py | | not measured | |")
            continue
        rows, metadata = read_rows(path)
        machines.setdefault(f"{metadata['date']}, {metadata['machine']}", []).append(f"{script}.py")
        for row in rows:
            bound, missed = "≤" if row.at_most else "≥", "" if row.ratio >= 1 else ", **missed**"
            lines.append(
                f"| {row.work} | {bound} {number(row.reach)} {row.unit} | {number(row.measured)} | "
                f"{row.ratio:.2f}{missed} |"
            )
    if not machines:
        raise UserError(f"{flags.out_path}: holds no results; run make bench")
    lines += ["", "The ratio is how far beyond (above 1) or short of it the measured figure is."]
    lines += [f"{', '.join(scripts)}: {machine}." for machine, scripts in machines.items()]
    text = "\n".join(lines) + "\n"
    (Path(flags.out_path) / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_script(main)
