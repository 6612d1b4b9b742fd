"""Save and load the results of a study over folds and seeds, and compute mean scores with bootstrap intervals.

A run is one fold with one seed. Its file keeps the prediction of each method for each test cell. From these, paired
differences between methods can be bootstrapped, and all tables can be made again without any training.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from utils.as_json import to_json
from utils.errors import UserError
from utils.evaluate.metrics import scores_of_counts


@dataclass
class Run:
    """One fold with one seed.

    Attributes
    ----------
    metadata : everything in the file except `cells`
    cells : group ("all labels", "30 labels per type", …) → DataFrame [test cells, "label" and methods] of class
        numbers, which index metadata["classes"]
    n_classes : number of cell types
    """

    metadata: dict
    cells: dict[str, pd.DataFrame]
    n_classes: int

    @property
    def fold(self) -> int:
        return self.metadata["fold"]

    def names(self) -> dict[str, pd.DataFrame]:
        """Return `cells` with type names in place of class numbers, as `save_run` takes them."""
        classes = np.array(self.metadata["classes"])
        return {group: pd.DataFrame(classes[cells], columns=cells.columns) for group, cells in self.cells.items()}


def save_run(path: str | Path, groups: dict[str, pd.DataFrame], **metadata) -> None:
    """Write one run as JSON.

    The key `classes` lists the type names; under `cells`, each method has a list with one class number per test cell.
    (With names in place of numbers, the files would be three times as large.)

    Parameters
    ----------
    path : the file to write; its folder is made
    groups : group → DataFrame [test cells, "label" and methods] of type names
    metadata : fold, seed, rows (name → `when_and_where`), and anything else to keep
    """
    classes = sorted({str(name) for cells in groups.values() for name in np.unique(cells.to_numpy().astype(str))})
    numbers = {
        group: {
            name: np.searchsorted(classes, column.to_numpy().astype(str)).tolist() for name, column in cells.items()
        }
        for group, cells in groups.items()
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(to_json(metadata | {"classes": classes, "cells": numbers}, compact=True))
    part.replace(path)  # so that a run that is killed here leaves the old file or the new one


def load_runs(folder: str | Path) -> list[Run]:
    """Return all runs in a folder, sorted by file name.

    Raises
    ------
    UserError
        If the folder holds no run.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise UserError(f"{folder}: holds no results; run the study first")
    return [load_run(path) for path in paths]


def load_run(path: str | Path) -> Run:
    """Return the run in a file that `save_run` has written."""
    metadata = json.loads(Path(path).read_text())
    cells = {group: pd.DataFrame(numbers) for group, numbers in metadata.pop("cells").items()}
    return Run(metadata, cells, len(metadata["classes"]))


def scores_of(truth: np.ndarray, predicted: np.ndarray, n_classes: int, score: str) -> np.ndarray:
    """Return one score of `classification_scores` for each row of class numbers.

    Parameters
    ----------
    truth, predicted : class numbers [rows, cells]
    n_classes : number of classes
    score : name of the score

    Returns
    -------
    ndarray [rows]
    """
    # One bincount makes the confusion matrices of all rows: each (row, true, predicted) has a number of its own.
    pairs = truth * n_classes + predicted + n_classes**2 * np.arange(len(truth))[:, None]
    counts = np.bincount(pairs.ravel(), minlength=len(truth) * n_classes**2)
    return scores_of_counts(counts.reshape(-1, n_classes, n_classes))[score]


def mean_score(runs: list[Run], group: str, method: str, score: str) -> float:
    """Return a method's mean score over the runs that have it; NaN if no run has it."""
    values = [
        scores_of(*run.cells[group][["label", method]].to_numpy().T[:, None], run.n_classes, score).item()
        for run in runs
        if method in run.cells.get(group, ())
    ]
    return float(np.mean(values)) if values else float("nan")


def f1_of_types(runs: list[Run], group: str, method: str) -> pd.DataFrame:
    """Return the F1 of each cell type.

    Returns
    -------
    DataFrame [types] with columns `f1` and `test_cells`, indexed by type: means over the runs that have the method and
    test cells of the type
    """
    tables = []
    for run in runs:
        if method in run.cells.get(group, ()):
            truth, predicted = run.cells[group][["label", method]].to_numpy().T
            n_correct, n_true, n_predicted = (
                np.bincount(numbers, minlength=run.n_classes)
                for numbers in (truth[truth == predicted], truth, predicted)
            )
            table = pd.DataFrame({"f1": 2 * n_correct / np.maximum(n_true + n_predicted, 1), "test_cells": n_true})
            tables.append(table.set_axis(run.metadata["classes"]).loc[n_true > 0])
    return pd.concat(tables).groupby(level=0).mean()


def interval(
    runs: list[Run], group: str, method: str, score: str, against: str | None = None, n: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean score, or of its difference to another method's.

    Each resample draws seeds with replacement within a fold, and test cells with replacement within a fold and true
    type. All seeds and both methods get the same cells, so the difference is paired. Folds are not resampled: the
    interval holds for these test batches.

    Parameters
    ----------
    runs : only those that have the methods are used
    group, method, score : as in `mean_score`
    against : the other method, if the interval of a difference is wanted
    n : number of resamples
    seed : random seed of the resamples

    Returns
    -------
    low, high : NaN if no run has the methods

    Raises
    ------
    UserError
        If the runs of a fold have different test cells.
    """
    methods = [method] if against is None else [method, against]
    runs = [run for run in runs if all(name in run.cells.get(group, ()) for name in methods)]
    if not runs:
        return float("nan"), float("nan")
    folds = {fold: [run for run in runs if run.fold == fold] for fold in {run.fold for run in runs}}
    rng, sums = np.random.default_rng(seed), np.zeros(n)
    for fold_runs in folds.values():
        label = fold_runs[0].cells[group].label
        if any((run.cells[group].label != label).any() for run in fold_runs):
            raise UserError(f"{group}: the runs of a fold have different test cells; run them again")
        by_type = label.reset_index(drop=True).groupby(label.to_numpy()).indices.values()
        drawn = np.concatenate([rng.choice(rows, (n, len(rows))) for rows in by_type], axis=1)  # [n, cells]
        values = []
        for run in fold_runs:
            truth, *predicted = run.cells[group][["label", *methods]].to_numpy().T
            scores = [scores_of(truth[drawn], column[drawn], run.n_classes, score) for column in predicted]
            values.append(scores[0] - (scores[1] if against else 0.0))
        seeds = rng.integers(len(fold_runs), size=(len(fold_runs), n))
        sums += np.take_along_axis(np.stack(values), seeds, axis=0).sum(axis=0)
    means = sums / len(runs)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
