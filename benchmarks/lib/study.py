"""Results of a study over folds and seeds: kept small, read again, averaged, with intervals.

A run is one fold with one seed. It keeps what each method said of each test cell, so that differences between methods
can be bootstrapped in pairs, and tables be made anew without training anything.
"""

import json
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from utils.as_json import to_json
from utils.errors import UserError
from utils.evaluate.metrics import scores_of_counts

LETTERS = string.ascii_letters  # one for each cell type


@dataclass
class Run:
    """One fold with one seed.

    Attributes
    ----------
    told : all that the file holds
    cells : group ("all labels", "30 labels per type", …) → [test cells, "label" and methods], the types as numbers
    n_classes : numbers of all groups are below this
    """

    told: dict
    cells: dict[str, pd.DataFrame]
    n_classes: int

    @property
    def fold(self) -> int:
        return self.told["fold"]

    def names(self) -> dict[str, pd.DataFrame]:
        """`cells` with names of types in place of numbers, as `save_run` takes them."""
        classes = np.array(self.told["classes"])
        return {group: pd.DataFrame(classes[cells], columns=cells.columns) for group, cells in self.cells.items()}


def save_run(path: str | Path, groups: dict[str, pd.DataFrame], **told) -> None:
    """Write one run as JSON: a cell's type is a letter, a method's predictions are a word of them.

    Parameters
    ----------
    groups : group → [test cells, "label" and methods] of type names
    told : fold, seed, rows (name → `when_and_where`), and what else is to be kept

    Raises
    ------
    UserError
        If there are more types than letters.
    """
    classes = sorted({str(name) for cells in groups.values() for name in np.unique(cells.to_numpy().astype(str))})
    if len(classes) > len(LETTERS):
        raise UserError(f"{len(classes)} cell types; a study can keep {len(LETTERS)}")
    letter = dict(zip(classes, LETTERS, strict=False))
    words = {
        group: {name: "".join(letter[str(kind)] for kind in column) for name, column in cells.items()}
        for group, cells in groups.items()
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part")
    whole.write_text(to_json(told | {"classes": classes, "cells": words}))
    whole.replace(path)


def load_runs(folder: str | Path) -> list[Run]:
    """All runs of a folder, by name.

    Raises
    ------
    UserError
        If there is none.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise UserError(f"{folder}: holds no results; run the study first")
    return [load_run(path) for path in paths]


def load_run(path: str | Path) -> Run:
    """What `save_run` has written."""
    told = json.loads(Path(path).read_text())
    numbers = {letter: i for i, letter in enumerate(LETTERS)}
    cells = {
        group: pd.DataFrame({name: [numbers[letter] for letter in word] for name, word in words.items()})
        for group, words in told.pop("cells").items()
    }
    return Run(told, cells, len(told["classes"]))


def scores_of(truth: np.ndarray, predicted: np.ndarray, n_classes: int, score: str) -> np.ndarray:
    """One score of `classification_scores` for each row of class numbers [rows, cells]."""
    pairs = truth * n_classes + predicted + n_classes**2 * np.arange(len(truth))[:, None]
    counts = np.bincount(pairs.ravel(), minlength=len(truth) * n_classes**2)
    return scores_of_counts(counts.reshape(-1, n_classes, n_classes))[score]


def mean_score(runs: list[Run], group: str, method: str, score: str) -> float:
    """Mean over the runs that have this method; NaN where none has."""
    values = [
        scores_of(*run.cells[group][["label", method]].to_numpy().T[:, None], run.n_classes, score).item()
        for run in runs
        if method in run.cells.get(group, ())
    ]
    return float(np.mean(values)) if values else float("nan")


def f1_of_types(runs: list[Run], group: str, method: str) -> pd.DataFrame:
    """F1 of each type.

    Returns
    -------
    DataFrame [types] with `f1` and `test_cells`, by name: means over the runs that have both
    """
    tables = []
    for run in runs:
        if method in run.cells.get(group, ()):
            truth, predicted = run.cells[group][["label", method]].to_numpy().T
            hit, size, called = (
                np.bincount(numbers, minlength=run.n_classes)
                for numbers in (truth[truth == predicted], truth, predicted)
            )
            table = pd.DataFrame({"f1": 2 * hit / np.maximum(size + called, 1), "test_cells": size})
            tables.append(table.set_axis(run.told["classes"]).loc[size > 0])
    return pd.concat(tables).groupby(level=0).mean()


def interval(
    runs: list[Run], group: str, method: str, score: str, against: str | None = None, n: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean score, or of the difference to another method's.

    A resample draws seeds with replacement within each fold, and test cells with replacement within each fold and true
    type: the same cells for all seeds and for both methods, which makes the difference a paired one. Folds are not
    drawn: the interval is about these batches.

    Parameters
    ----------
    runs : of which those with both methods are used
    group, method, score : as in `mean_score`
    against : the other method
    n, seed : resamples, and of their draw

    Returns
    -------
    low, high : NaN where no run has the method

    Raises
    ------
    UserError
        If the runs of one fold are about other test cells.
    """
    methods = [method] if against is None else [method, against]
    runs = [run for run in runs if all(name in run.cells.get(group, ()) for name in methods)]
    if not runs:
        return float("nan"), float("nan")
    folds = {fold: [run for run in runs if run.fold == fold] for fold in {run.fold for run in runs}}
    rng, sums = np.random.default_rng(seed), np.zeros(n)
    for of in folds.values():
        label = of[0].cells[group].label
        if any((run.cells[group].label != label).any() for run in of):
            raise UserError(f"{group}: the runs of a fold have different test cells; run them again")
        by_type = label.reset_index(drop=True).groupby(label.to_numpy()).indices.values()
        drawn = np.concatenate([rng.choice(rows, (n, len(rows))) for rows in by_type], axis=1)  # [n, cells]
        values = []
        for run in of:
            truth, *predicted = run.cells[group][["label", *methods]].to_numpy().T
            scores = [scores_of(truth[drawn], column[drawn], run.n_classes, score) for column in predicted]
            values.append(scores[0] - (scores[1] if against else 0.0))
        seeds = rng.integers(len(of), size=(len(of), n))
        sums += np.take_along_axis(np.stack(values), seeds, axis=0).sum(axis=0)
    means = sums / len(runs)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
