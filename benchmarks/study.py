"""Make the tables and the figure of the study from the results of its runs, without any training.

    python -m benchmarks.study

Reads the results of benchmarks/snareseq2.py and benchmarks/rna_only.py from benchmarks/results/snareseq2/ and
rna_only/. The tables replace the text between two marks in RESULTS.md; the figure is written beside the results.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.lib.bench import RESULTS
from benchmarks.lib.stages import ROOT
from benchmarks.lib.study import Run, f1_of_types, interval, load_runs, mean_score
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError
from utils.evaluate.plots import bars
from utils.progress import progress_bar

ALL = "all labels"
OURS, PLAIN = "scMomer", "scMomer without the student"
LINEAR = ("logistic regression", "PCA + logistic regression")
WHICH_TYPES = (ALL, "30 labels per type")  # the groups in the table with the F1 of each type
MARKS = ("<!-- tables: python -m benchmarks.study -->", "<!-- end of tables -->")
SCORES = {"accuracy": "accuracy", "macro_f1": "macro-F1"}


@dataclass
class Flags:
    results_path: str = flag("folder with one .json file per run of snareseq2.py", f"{RESULTS}/snareseq2")
    rna_only_path: str = flag("folder with one .json file per run of rna_only.py", f"{RESULTS}/rna_only")
    page: str = flag("page in which to replace the tables", f"{ROOT}/benchmarks/RESULTS.md")
    n_bootstrap: int = flag("resamples per interval", 1000)


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    page = Path(flags.page)
    text = page.read_text()
    if not all(mark in text for mark in MARKS):
        raise UserError(f"{page}: lacks the lines {MARKS[0]} and {MARKS[1]}, between which the tables go")
    runs = load_runs(flags.results_path)
    tables = [covered(runs)]
    for group in groups_of(runs):
        tables += [f"### RNA alone at test time, {group}" if "ATAC" not in group else f"### {group} at test time"]
        tables += [types_table(runs, group, flags.n_bootstrap)]
    tables += ["### Each run, all labels", runs_table(runs, flags.n_bootstrap)]
    tables += ["### Which types are found", which_types_table(runs)]
    tables += ["### What each part is for", parts_table(runs, flags.n_bootstrap)]
    tables += ["### RNA → ATAC", translation_table(runs)]
    tables += ["### Time and memory", cost_table(runs)]
    if Path(flags.rna_only_path).is_dir():
        for name, some_runs in by_data(load_runs(flags.rna_only_path)).items():
            tables += [f"### {name}", covered(some_runs), types_table(some_runs, ALL, flags.n_bootstrap)]
            tables += [runs_table(some_runs, flags.n_bootstrap)]
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    page.write_text("\n\n".join([before + MARKS[0], *tables, MARKS[1] + after]))
    figure(runs, Path(flags.results_path).with_suffix(".png"), flags.n_bootstrap)
    print("\n\n".join(tables) + f"\n\nwrote {page}")


def covered(runs: list[Run]) -> str:
    """Return a sentence with the folds and seeds of the runs, their dates and machines."""
    which = ", ".join(f"fold {run.fold} seed {run.metadata['seed']}" for run in runs)
    where = "; ".join(
        sorted({f"{at['machine']}, {at['date']}" for run in runs for at in run.metadata["rows"].values()})
    )
    return textwrap.fill(f"{len(runs)} runs ({which}); {where}.", 120)


def by_data(runs: list[Run]) -> dict[str, list[Run]]:
    """Return the runs of each data set."""
    names = dict.fromkeys(run.metadata["data"] for run in runs)
    return {name: [run for run in runs if run.metadata["data"] == name] for name in names}


def groups_of(runs: list[Run]) -> list[str]:
    """Return all groups of the runs: "all labels" first, then those with few labels by their number, then others."""
    groups = {group for run in runs for group in run.cells}
    number = lambda group: int(group.split()[0]) if group[0].isdigit() else 0
    return sorted(groups, key=lambda group: (group != ALL, not group[0].isdigit(), number(group), group))


def methods_of(runs: list[Run], group: str) -> list[str]:
    """Return all methods of a group, ours first."""
    found = dict.fromkeys(name for run in runs for name in run.cells.get(group, ()) if name != "label")
    return sorted(found, key=lambda name: (name != OURS, not name.startswith(OURS)))


def types_table(runs: list[Run], group: str, n: int) -> str:
    """Return a table of mean scores with intervals, and of the difference between ours and each method."""
    ours = next((name for name in methods_of(runs, group) if name.startswith(OURS)), OURS)
    lines = [
        f"| | runs | accuracy (95 %) | macro-F1 (95 %) | {ours} is better by, accuracy | macro-F1 |",
        "|---|---|---|---|---|---|",
    ]
    methods = methods_of(runs, group)
    bar = progress_bar(len(methods), group, "methods")
    for method in methods:
        having = [run for run in runs if method in run.cells.get(group, ())]
        cells = [
            with_interval(mean_score(having, group, method, score), interval(having, group, method, score, n=n))
            for score in SCORES
        ]
        cells += ["" if method == ours else difference(having, group, ours, method, score, n) for score in SCORES]
        lines.append(f"| {method} | {len(having)} | {' | '.join(cells)} |")
        bar.update()
    bar.close()
    return "\n".join(lines)


def runs_table(runs: list[Run], n: int) -> str:
    """Return a table of our scores in each run, with intervals, beside the linear baselines on the same test cells."""
    lines = ["| run | test cells | scMomer, accuracy (95 %) | macro-F1 (95 %) | " + " | ".join(LINEAR) + " |"]
    lines += ["|---|---|---|---|" + "---|" * len(LINEAR)]
    for run in runs:
        cells = [with_interval(mean_score([run], ALL, OURS, s), interval([run], ALL, OURS, s, n=n)) for s in SCORES]
        cells += [" / ".join(f"{mean_score([run], ALL, name, s):.3f}" for s in SCORES) for name in LINEAR]
        name = f"fold {run.fold} seed {run.metadata['seed']}"
        lines.append(f"| {name} | {len(run.cells[ALL]):,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(runs: list[Run], group: str, ours: str, other: str, score: str, n: int) -> str:
    """Return by how many percentage points one method is above another, with its interval.

    Runs that have both methods count. The text is bold if the interval excludes zero.
    """
    runs = [run for run in runs if {ours, other} <= set(run.cells.get(group, ()))]
    if not runs:
        return ""
    mean = mean_score(runs, group, ours, score) - mean_score(runs, group, other, score)
    low, high = interval(runs, group, ours, score, against=other, n=n)
    text = f"{100 * mean:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def which_types_table(runs: list[Run]) -> str:
    """Return a table of the F1 of each type for ours and the linear baselines, with all labels and with 30 per type."""
    columns = [(method, group) for group in WHICH_TYPES for method in (OURS, *LINEAR)]
    columns = [(method, group) for method, group in columns if any(method in run.cells.get(group, ()) for run in runs)]
    lines = ["| | test cells | " + " | ".join(f"{method}, {group}" for method, group in columns) + " |"]
    lines += ["|---|---|" + "---|" * len(columns)]
    scores = [f1_of_types(runs, group, method) for method, group in columns]
    sizes = scores[0]["test_cells"].sort_values(ascending=False, kind="stable") if scores else {}
    for name, n_cells in sizes.items():
        f1 = " | ".join(f"{score['f1'][name]:.2f}" for score in scores)
        lines.append(f"| {name} | {n_cells:.0f} | {f1} |")
    return "\n".join(lines)


def parts_table(runs: list[Run], n: int) -> str:
    """Return a table of what the student adds, for every number of labels, with pseudo-labels and without them."""
    lines = ["| the student adds | runs | accuracy | macro-F1 |", "|---|---|---|---|"]
    for group in groups_of(runs):
        for how in ("", ", labelled cells alone"):
            having = [run for run in runs if {OURS + how, PLAIN + how} <= set(run.cells.get(group, ()))]
            if having:
                added = (difference(having, group, OURS + how, PLAIN + how, score, n) for score in SCORES)
                lines.append(f"| {group}{how} | {len(having)} | {' | '.join(added)} |")
    return "\n".join(lines)


def translation_table(runs: list[Run]) -> str:
    """Return a table of the translation scores: mean over the runs, with the lowest and the highest value."""
    names = dict.fromkeys(name for run in runs for name in run.metadata["translation"])
    measures = {
        "peak_auroc": "AUROC per peak",
        "cell_auroc": "AUROC per cell",
        "peak_ap": "AP per peak",
        "cell_ap": "AP per cell",
    }
    lines = [f"| | runs | {' | '.join(measures.values())} |", "|---|---|" + "---|" * len(measures)]
    for name in names:
        rows = [run.metadata["translation"][name] for run in runs if name in run.metadata["translation"]]
        cells = []
        for measure in measures:
            values = [row[measure] for row in rows]
            cells.append(f"{np.mean(values):.4f} ({min(values):.4f}–{max(values):.4f})")
        lines.append(f"| {OURS if name == 'scmomer' else name} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_table(runs: list[Run]) -> str:
    """Return a table of the time and memory of each stage.

    Of the runs, the shortest time counts, since longer ones may have shared the machine, and the largest memory.
    """
    lines = ["| stage | seconds, least of the runs | peak memory (GB), most of the runs |", "|---|---|---|"]
    for name in dict.fromkeys(name for run in runs for name in run.metadata["stages"]):
        used = [run.metadata["stages"][name] for run in runs if name in run.metadata["stages"]]
        seconds, memory = min(row["seconds"] for row in used), max(row["peak_memory_gb"] for row in used)
        lines.append(f"| {name} | {seconds:.0f} | {memory:.2f} |")
    return "\n".join(lines)


def with_interval(mean: float, bounds: tuple[float, float]) -> str:
    """Return a mean and its interval as text."""
    return f"{mean:.3f} ({bounds[0]:.3f}–{bounds[1]:.3f})"


def figure(runs: list[Run], path: Path, n: int) -> None:
    """Draw macro-F1 against the number of labels, for the methods that all runs have for every number."""
    groups = [group for group in groups_of(runs) if "ATAC" not in group]
    groups = [*groups[1:], groups[0]]  # more labels from left to right
    everywhere = set.intersection(*(set(run.cells[group]) for run in runs for group in groups if group in run.cells))
    shown = [name for name in methods_of(runs, groups[0]) if name in everywhere and name != "majority class"]
    values = {m: {g: mean_score(runs, g, m, "macro_f1") for g in groups} for m in shown}
    intervals = {m: {g: interval(runs, g, m, "macro_f1", n=n) for g in groups} for m in shown}
    bars(values, path, "SNARE-seq2, macro-F1 of the test batches, RNA alone", intervals)


if __name__ == "__main__":
    run_script(main)
