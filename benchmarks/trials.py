"""Try changes to the training with few labels, on batches that no fold of the study tests.

    python -m benchmarks.trials --fold 0 --trials default,metacells
    python -m benchmarks.trials --table                     # the results as a table, without any training

Four batches of mouse cortex (SNARE-seq2) are in no test data of the study: 09A, 09B, 09D and 09E. A fold of the trials
sets one of them aside and trains on the other three, with 10 or 30 labels per type, as the study does. A trial changes
the data, or flags of the ordinary scripts. Its rows, accuracy and macro-F1 on the batch set aside, go to
benchmarks/results/trials/fold<f>.csv; differences to the trial "default" are paired by fold, draw and number of labels.
Rows that end in "labels not spread" were made before pseudo-labels were spread over near cells, which is now the
default; they are compared with each other.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.lib import fine_tune
from benchmarks.lib.bench import RESULTS
from benchmarks.lib.pairs import Data
from benchmarks.lib.stages import from_root
from benchmarks.lib.study import add_rows, interval, read_rows, scores_in, values_of
from benchmarks.lib.trial_data import with_neighbours, with_pooled_atac, write_lsi
from benchmarks.paired import PSEUDO_LABELS, UNTRAINED, Fold
from utils.cells.preprocessed import read_cells, read_raw
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError

BATCHES = ("09A", "09B", "09D", "09E")
NUMBERS = (10, 30)


@dataclass(frozen=True)
class Trial:
    """What a trial changes.

    Attributes
    ----------
    data : name of the raw file that it trains on
    teacher : flags of pretrain_multimodal.py
    student : flags of pretrain_missing_mod.py
    first, second : flags of the fine-tuning on labelled cells alone, and of that on all cells
    lsi : whether the student learns LSI of the cells' peaks, not the teacher's ATAC latent
    """

    data: str = "cells"
    teacher: str = ""
    student: str = ""
    first: str = ""
    second: str = ""
    lsi: bool = False


TRIALS = {
    "default": Trial(),
    "no teacher": Trial(teacher=UNTRAINED, student="--teacher_weight 0"),
    "metacells": Trial(data="metacells"),
    "neighbours": Trial(data="neighbours"),
    "LSI": Trial(lsi=True),
    "weights of types 0.5": Trial(second="--class_balance 0.5"),
}
NOT_SPREAD = "labels not spread"
MAKE = {"cells": lambda raw, batch: raw, "metacells": with_pooled_atac, "neighbours": with_neighbours}
"""Name of a raw file → what makes it of the cells of the four batches, one of which is set aside."""
AS_READ = {"neighbours": " --values counts"}
"""Name of a raw file → further flags of preprocess.py: means of counts have fractions."""


@dataclass
class Flags:
    data_path: str = flag("folder with snareseq2_mop.h5mu", "../shared/data")
    fold: int = flag("which batch to set aside, from 0", 0)
    trials: str = flag("what to try, a comma-separated list", "default")
    seeds: str = flag("of the draws of labels and of fine-tuning, separated by commas", "0")
    out_path: str | None = flag("folder for the models; by default runs/trials/fold<f>", None)
    results_path: str = flag("folder for the CSV files", f"{RESULTS}/trials")
    table: bool = flag("only print the results as a table", False)

    def __post_init__(self):
        if unknown := [name for name in self.trials.split(",") if name not in TRIALS]:
            raise UserError(f"--trials {self.trials}: {unknown[0]!r} is none of {', '.join(TRIALS)}")
        if not 0 <= self.fold < len(BATCHES):
            raise UserError(f"--fold {self.fold} must be between 0 and {len(BATCHES) - 1}")


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    if flags.table:
        print(table(Path(flags.results_path)))
        return
    out = Path(flags.out_path or f"runs/trials/fold{flags.fold}").resolve()
    path = Path(flags.results_path) / f"fold{flags.fold}.csv"
    for name in flags.trials.split(","):
        done = set() if not path.is_file() else set(read_rows(path).set_index(["method", "seed", "labels"]).index)
        for seed in map(int, flags.seeds.split(",")):
            for n in NUMBERS:
                if (name, seed, n) not in done:
                    add_rows(path, run(name, TRIALS[name], Path(flags.data_path), out, flags.fold, seed, n))
                    print(f"\nwrote {path}: {name}, {n} labels, seed {seed}")


def run(name: str, trial: Trial, folder: Path, out: Path, fold: int, seed: int, n: int) -> list[tuple]:
    """Train what a trial needs and has not been trained, and return its rows."""
    write_raw(trial.data, folder, out, BATCHES[fold])
    more = f"--target_sum 1000{AS_READ.get(trial.data, '')}"
    data = Data(f"--data_path {from_root(out / trial.data)}.h5mu", "batch", (BATCHES[fold],), more=more)
    models = Fold(data, folder, out / f"of_{trial.data}", 0)
    models.stages.run(
        "preprocess",
        f"preprocess.py {models.inputs} --split_by {data.group} --test_groups {models.groups} {data.more} "
        f"--out_path {models.ready}",
    )
    models.stage_one()
    teacher, student = f"teacher{key(trial.teacher)}", f"student{key(trial.teacher)}{key(trial.student)}"
    models.join(teacher, models.ready, trial.teacher)
    latents = ""
    if trial.lsi:
        source, student = f"latents_{teacher}", f"{student}_lsi"
        cells, to = read_cells(models.out / "ready.h5mu", ("atac",)), f"{source}_lsi"
        write_lsi(cells, models.out / source, models.out / to)
        latents = f"--dir_train {models.path(to)} --dir_val {models.path(to)}"
    models.student(student, teacher, models.ready, f"{trial.student} {latents}".strip())
    script, start = "train_missing_celltype_func", f"--pretrained_model_path {models.path(student)} --train_student"
    start += f" {fine_tune.ALONE}"
    first = f"{student}_{n}_{seed}_alone{key(trial.first)}"
    models.train(f"fine-tune {first}", script, first, f"{start} {fine_tune.alone(n)} {trial.first}", seed)
    second, parent = f"{first}_all{key(trial.second)}", fine_tune.on_all_cells(n, models.path(first))
    models.train(f"fine-tune {second}", script, second, f"{start} {parent} {PSEUDO_LABELS} {trial.second}", seed)
    evaluate = f"evaluate.py --data_path {models.ready} --model_path {models.path(second)} --model_alone"
    models.stages.run(f"evaluate {second}", evaluate)
    return scores_in(models.out / second, name, seed, n)


def key(flags: str) -> str:
    """Return flags as the end of a folder's name; nothing for none."""
    return "".join(f"_{part.lstrip('-')}" for part in flags.split())


def write_raw(name: str, folder: Path, out: Path, batch: str) -> None:
    """Write one of the raw files of `MAKE` with the cells of the four batches, unless it is there."""
    path = out / f"{name}.h5mu"
    if path.is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    with read_raw(folder / "snareseq2_mop.h5mu") as file:
        raw = file.content()
    MAKE[name](raw[raw["rna"].obs["batch"].isin(BATCHES).to_numpy()].copy(), batch).write(path)


def table(folder: Path) -> str:
    """Return mean scores of each trial, its differences to the default in points with interval, and their number."""
    paths = sorted(folder.glob("fold*.csv"))
    if not paths:
        raise UserError(f"{folder}: has no rows; run python -m benchmarks.trials first")
    rows = pd.concat([read_rows(path).assign(fold=int(path.stem[4:]), pretraining=0) for path in paths])
    heads = [f"{n} labels" for n in NUMBERS]
    lines = [f"| trial | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for method in dict.fromkeys(rows.method):
        cells, reference = [], NOT_SPREAD if method.endswith(f", {NOT_SPREAD}") else "default"
        for n in NUMBERS:
            found = []
            for measure in ("accuracy", "macro_f1"):
                own, plain = (values_of(rows, name, measure, n) for name in (method, reference))
                gain = ((own - plain) * 100).dropna()
                found.append("{:.3f}, {:+.1f} ({:+.1f} … {:+.1f})".format(own.mean(), gain.mean(), *interval(gain)))
            cells.append("; ".join(found) + f" [{len(gain)}]")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
