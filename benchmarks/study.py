"""Make the tables and the figure of the study from the CSV files of its runs, without any training.

    python -m benchmarks.study
    python -m benchmarks.study --compare runs/again      # rows of a repeated run beside those that are kept

Reads what benchmarks/paired.py and benchmarks/rna_only.py wrote to benchmarks/results/study/. The tables replace the
text between two marks in docs/results.md; the figure is written beside the results.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.lib.bench import RESULTS
from benchmarks.lib.pairs import DATA, FEW_LABELS
from benchmarks.lib.stages import ROOT
from benchmarks.lib.study import (
    ACROSS,
    MIXED,
    OURS,
    RUN,
    SHUFFLED,
    interval,
    mean,
    of_folds,
    parsed,
    read_parts,
    read_rows,
    run_name,
    values_of,
)
from benchmarks.paired import PROBED
from benchmarks.rna_only import PARTS
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError
from utils.evaluate.plots import COLOURS, MARKERS

MARKS = ("<!-- tables: python -m benchmarks.study -->", "<!-- end of tables -->")
SCORES = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
NUMBERS = (0, *reversed(FEW_LABELS))
SHOWN = ("50 principal components", "stage I", "stage II", "student", "student, shuffled pairs")
"""The embeddings in the figure."""
QUESTIONS = (
    ("Does ATAC help? Real pairs above shuffled ones", "student", "student, shuffled pairs"),
    ("Does a trained teacher help?", "student", "student, untrained teacher"),
    ("Student above a denoiser of RNA and ATAC without a teacher", "student", "RNA + ATAC denoiser"),
    ("Does reconstructing ATAC help that denoiser?", "RNA + ATAC denoiser", "RNA denoiser"),
    ("Do its pairs have to be real?", "RNA + ATAC denoiser", "RNA + ATAC denoiser, shuffled pairs"),
    ("What stage II adds to stage I", "stage II", "stage I"),
    ("What the student adds to stage II", "student", "stage II"),
    ("What measured ATAC adds to stage II", "measured ATAC", "stage II"),
)
"""Question, and the two arms whose difference answers it."""
TRANSLATION = {
    "peak_auroc": "AUROC per peak",
    "cell_auroc": "AUROC per cell",
    "cell_ap": "AP per cell",
    "pseudobulk_rmse": "pseudo-bulk RMSE",
}


@dataclass
class Flags:
    results_path: str = flag("folder with the CSV files", f"{RESULTS}/study")
    page: str = flag("page in which to replace the tables", f"{ROOT}/docs/results.md")
    compare: str | None = flag("folder with CSV files of a repeated run: only compare them with those kept", None)


RNA_ONLY = ("pbmc_3tech", "immune", "pbmc68k")
OWN = (OURS, SHUFFLED, *PARTS.values())
"""What is no baseline."""
NEAR = 0.01
"""How far outside the range of kept values a repeated one may lie."""
KEYS = ["seed", "labels", "method", "measure"]


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    if flags.compare:
        print(compared(Path(flags.results_path), Path(flags.compare)))
        return
    page = Path(flags.page)
    text = page.read_text()
    if not all(mark in text for mark in MARKS):
        raise UserError(f"{page}: lacks the lines {MARKS[0]} and {MARKS[1]}, between which the tables go")
    folder = flags.results_path
    read = lambda *parts, data="snareseq2": read_parts(folder, data, *parts)
    types = read("types", "mixed", "shuffled", "scANVI")
    types = types[types.fold.isin(types.fold[types.method == OURS])]  # all rows are means over the same folds
    finer, embeddings = read("subclasses"), read(*PROBED).drop_duplicates([*RUN, *KEYS[1:]])
    marrow = read("types", "mixed", data="bmmc")
    blood, *human = (read(*PARTS, data=name) for name in RNA_ONLY)
    tables = [
        f"### Fine-tuned models and baselines\n\n{covered(types[types.method == OURS])}",
        field_table(types),
        "### Ours against the best baseline",
        *best_tables(types),
        f"### 23 subclasses\n\n{covered(finer)}",
        field_table(finer),
        *best_tables(finer),
        f"### The same classifier on each frozen embedding\n\n{covered(embeddings)}",
        arms_table(embeddings),
        "### What each part adds",
        questions_table(embeddings, types),
        "### Less RNA, finer types, another tissue",
        elsewhere_table(embeddings, read("embeddings", data="bmmc")),
        "### RNA → ATAC",
        translation_table(read("translation", "controls_translation")),
        f"### Human blood, an unseen chemistry, RNA alone\n\n{covered(blood)}",
        field_table(blood),
        *best_tables(blood),
        "### RNA alone, three small human data sets",
        rna_only_table(dict(zip(RNA_ONLY[1:], human, strict=True)) | {"bone marrow": marrow}),
    ]
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    page.write_text("\n\n".join([before + MARKS[0], *tables, MARKS[1] + after]))
    figure(embeddings, Path(folder).with_suffix(".png"))
    print("\n\n".join(tables) + f"\n\nwrote {page}")


def covered(table: pd.DataFrame) -> str:
    """Return how many folds there are, and pretrainings and draws of labels of each."""
    of_each = {
        what: ", ".join(map(str, table.groupby("fold")[column].nunique()))
        for what, column in (("Pretrainings", "pretraining"), ("Draws of labels", "seed"))
    }
    return f"Folds: {table.fold.nunique()}. " + " ".join(f"{what} of each: {n}." for what, n in of_each.items())


def field_table(types: pd.DataFrame) -> str:
    """Return accuracy and macro-F1 of all fine-tuned models and baselines, for each number of labels."""
    methods = sorted(dict.fromkeys(types.method), key=lambda name: OWN.index(name) if name in OWN else len(OWN))
    return cells_table(methods, lambda method, n: both(types, method, n), "accuracy / macro-F1", types)


def arms_table(embeddings: pd.DataFrame) -> str:
    """Return accuracy and macro-F1 of the classifier on each embedding, for each number of labels."""
    methods = [name for name in dict.fromkeys(embeddings.method) if not _special(name)]
    return cells_table(methods, lambda method, n: both(embeddings, method, n), "accuracy / macro-F1", embeddings)


def _special(name: str) -> bool:
    """Whether a row of the embeddings is about thinned RNA or about finer types."""
    return name.endswith((" of the RNA", "subclass"))


def cells_table(methods: list[str], cell, title: str, rows: pd.DataFrame) -> str:
    """Return a table with a row per method and a column per number of labels that the rows have."""
    numbers = [n for n in NUMBERS if n in set(rows.labels)]
    heads = [words(n) for n in numbers]
    lines = [f"| {title} | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    lines += [f"| {method} | {' | '.join(cell(method, n) for n in numbers)} |" for method in methods]
    return "\n".join(lines)


def words(n: int) -> str:
    """Return a number of labels in words."""
    return f"{n} per type" if n else "all labels"


def both(table: pd.DataFrame, method: str, n: int) -> str:
    """Return a method's mean accuracy and macro-F1; empty without values."""
    found = [mean(values_of(table, method, measure, n)) for measure in SCORES]
    return "" if np.isnan(found).any() else " / ".join(f"{value:.3f}" for value in found)


def difference(one: pd.Series, other: pd.Series) -> str:
    """Return the mean difference in points with its interval, paired by run; bold without zero in it."""
    paired = (one - other).dropna() * 100
    if paired.empty:
        return ""
    if len(paired) == 1:
        return f"{mean(paired):+.1f} (one run)"
    low, high = interval(paired)
    text = f"{mean(paired):+.1f} ({low:+.1f} … {high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def best_tables(types: pd.DataFrame) -> list[str]:
    """Return `best_table` of our model alone, and of its mixtures, if they have been run."""
    tables = [best_table(types)]
    for name in (MIXED, ACROSS):
        found = types[types.method == name]
        tables += [f"The same for {name}. {covered(found)}", best_table(types, name)] if len(found) else []
    return tables


def best_table(types: pd.DataFrame, ours_is: str = OURS) -> str:
    """Return, for each number of labels and score, the best baseline by its mean, and the difference to it."""
    baselines = [name for name in dict.fromkeys(types.method) if name not in OWN]
    lines = [
        "| labels | score | best baseline | ours is better by, in points | fold by fold |",
        "|---|---|---|---|---|",
    ]
    for n in NUMBERS:
        for measure, name in SCORES.items():
            if values_of(types, ours_is, measure, n).empty:
                continue
            best = max(baselines, key=lambda method: np.nan_to_num(mean(values_of(types, method, measure, n)), nan=-1))
            ours, theirs = values_of(types, ours_is, measure, n), values_of(types, best, measure, n)
            each = ", ".join(f"{value:+.1f}" for value in of_folds((ours - theirs).dropna() * 100))
            lines.append(f"| {words(n)} | {name} | {best} | {difference(ours, theirs)} | {each} |")
    return "\n".join(lines)


def questions_table(embeddings: pd.DataFrame, types: pd.DataFrame) -> str:
    """Return the differences between arms that answer the study's questions: accuracy, then macro-F1."""
    rows = [(question, embeddings, *arms) for question, *arms in QUESTIONS]
    rows.insert(1, ("the same, fine-tuned", types, OURS, SHUFFLED))
    rows.append(
        (
            "What simple classifiers add to the fine-tuned model, mixed in where validation cells say so",
            types,
            MIXED,
            OURS,
        )
    )
    lines = [f"| points of accuracy; of macro-F1 | {' | '.join(map(words, NUMBERS))} |"]
    lines += ["|---|" + "---|" * len(NUMBERS)]
    for question, table, one, other in rows:
        if {one, other} <= set(table.method):  # both have been run
            gaps = [
                [difference(values_of(table, one, m, n), values_of(table, other, m, n)) for m in SCORES]
                for n in NUMBERS
            ]
            lines.append(f"| {question} | {' | '.join(map('; '.join, gaps))} |")
    return "\n".join(lines)


def elsewhere_table(embeddings: pd.DataFrame, bmmc: pd.DataFrame) -> str:
    """Return real against shuffled pairs where the second modality could matter more."""
    lines = ["| | student | shuffled pairs | points of accuracy | of macro-F1 |", "|---|---|---|---|---|"]
    places = [
        *((f"{thinning} of the RNA, {words(n)}", embeddings, f", {thinning} of the RNA", n)
          for thinning in ("half", "quarter") for n in (30, 0)),
        ("23 subclasses, 30 per type", embeddings, ", subclass", 30),
        (f"bone marrow, other donor ({len(DATA['bmmc'].folds)} folds), all labels", bmmc, "", 0),
    ]  # fmt: skip
    for title, table, end, n in places:
        real, shuffled = "student" + end, "student, shuffled pairs" + end
        cells = [both(table, real, n), both(table, shuffled, n)]
        cells += [difference(values_of(table, real, m, n), values_of(table, shuffled, m, n)) for m in SCORES]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def translation_table(table: pd.DataFrame) -> str:
    """Return the scores of translation, with each fold's value of the first."""
    lines = [f"| | {' | '.join(TRANSLATION.values())} | AUROC per peak, fold by fold |"]
    lines += ["|---|" + "---|" * (len(TRANSLATION) + 1)]
    for method in dict.fromkeys(table.method):
        values = {measure: values_of(table, method, measure) for measure in TRANSLATION}
        digits = lambda measure: 5 if measure == "pseudobulk_rmse" else 4
        cells = [f"{mean(found):.{digits(measure)}f}" if len(found) else "" for measure, found in values.items()]
        cells.append(", ".join(f"{value:.4f}" for value in of_folds(values["peak_auroc"])))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rna_only_table(tables: dict[str, pd.DataFrame]) -> str:
    """Return the scores on data without ATAC, and by how much ours is better, and ours with baselines mixed in."""
    rivals = [ours for ours in (OURS, MIXED) if any((table.method == ours).any() for table in tables.values())]
    lines = [
        "| | " + " | ".join(f"{name} | {' | '.join(f'{r} is better by' for r in rivals)}" for name in tables) + " |"
    ]
    lines += ["|---|" + ("---|" * (1 + len(rivals))) * len(tables)]
    for method in dict.fromkeys(method for table in tables.values() for method in table.method):
        cells = []
        for table in tables.values():
            cells.append(both(table, method, 0))
            for ours in rivals:
                gaps = [difference(values_of(table, ours, m), values_of(table, method, m)) for m in SCORES]
                cells.append("" if method == ours else "; ".join(filter(None, gaps)))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(embeddings: pd.DataFrame, path: Path) -> None:
    """Draw accuracy and macro-F1 against the number of labels, for the embeddings of `SHOWN`."""
    drawing = Figure(figsize=(9, 3.8), layout="constrained")
    panels = drawing.subplots(1, len(SCORES))
    numbers = [*FEW_LABELS, 0]
    for panel, (measure, name) in zip(panels, SCORES.items(), strict=True):
        for i, method in enumerate(SHOWN):
            found = [values_of(embeddings, method, measure, n) for n in numbers]
            means, bounds = np.array([mean(values) for values in found]), np.array([interval(v) for v in found])
            x, style = np.arange(len(numbers)) + 0.06 * (i - 2), {"color": COLOURS[i], "marker": MARKERS[i]}
            ends = np.abs(bounds.T - means)
            panel.errorbar(x, means, ends, label=method, lw=1.4, ms=5, capsize=2, elinewidth=0.8, **style)
        panel.set(xlabel="labelled cells of each type", ylabel=f"{name} on unseen batches")
        panel.set_xticks(range(len(numbers)), [*map(str, FEW_LABELS), "all"])
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    drawing.suptitle("The same classifier on frozen embeddings of RNA alone, SNARE-seq2", fontsize=10)
    drawing.savefig(path, dpi=150)


def compared(kept: Path, again: Path) -> str:
    """Return a table of the rows that two folders share: how much their values differ, file by file.

    A file of the part quick is compared with the embeddings and the translation of the same run. The last column says
    how many values lie within the range of the kept values of all draws of labels and pretrainings of their fold, or
    within a point of it.
    """
    lines = [
        "| file | rows in both | largest difference | mean difference | within the range |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(again.glob("*.csv")):
        data, part, fold, pretraining = parsed(path)
        parts = ("embeddings", "translation") if part == "quick" else (part,)
        if not any((kept / f"{data}_{run_name(fold, pretraining)}_{name}.csv").is_file() for name in parts):
            continue
        rows = read_parts(kept, data, *parts)
        rows = rows[rows.fold == fold]
        both_runs = rows[rows.pretraining == pretraining].merge(read_rows(path), on=KEYS, suffixes=("", "_again"))
        gap = (both_runs.value_again - both_runs.value).abs()
        ends = rows.groupby(KEYS[1:])["value"].agg(["min", "max"])
        ends = ends.loc[list(both_runs[KEYS[1:]].itertuples(index=False, name=None))]
        value = both_runs.value_again.to_numpy()
        within = (value >= ends["min"].to_numpy() - NEAR) & (value <= ends["max"].to_numpy() + NEAR)
        lines.append(f"| {path.stem} | {len(gap)} | {gap.max():.4f} | {gap.mean():.4f} | {within.sum()} |")
    if len(lines) == 2:
        raise UserError(f"--compare {again}: shares no file with {kept}; give the --results_path of a repeated run")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
