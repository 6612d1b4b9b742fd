"""A study as CSV: a row per seed, number of labels, method and measure; means and intervals over folds and seeds."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import UserError

COLUMNS = ("seed", "labels", "method", "measure", "value")
N_RESAMPLES = 4000
OURS, MIXED, SHUFFLED = "scMomer", "scMomer, mixed", "scMomer, shuffled pairs"
"""What rows call our model: alone, with simple classifiers mixed in where that helps, and of shuffled pairs."""
ACROSS = "scMomer, mixed across batches"
"""The same, with simple classifiers mixed in where that helps on batches left out."""


def run_name(fold: int, pretraining_seed: int = 0) -> str:
    """Return what the files of one pretraining of a fold are called, e.g. fold0 or fold0_pretraining1."""
    return f"fold{fold}" + (f"_pretraining{pretraining_seed}" if pretraining_seed else "")


def add_rows(path: Path, rows: list[tuple]) -> None:
    """Add rows to a CSV file, which is made if needed.

    Parameters
    ----------
    path : <data>_fold<f>_<part>.csv
    rows : of `COLUMNS`; labels is the number per type, 0 for all
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    if path.is_file():
        table = pd.concat([read_rows(path), table]).drop_duplicates(list(COLUMNS[:-1]), keep="last")
    part = path.with_suffix(".part")
    table.to_csv(part, index=False, float_format="%.5f")
    part.replace(path)  # so that a run that is killed here leaves the old file or the new one


def read_rows(path: Path) -> pd.DataFrame:
    """Return the rows of a CSV file."""
    return pd.read_csv(path)


def done_in(path: Path) -> set[tuple[int, int]]:
    """Return the seeds and numbers of labels that a CSV file has; none if there is no file."""
    return (
        set(zip(*read_rows(path)[["seed", "labels"]].to_numpy().T.tolist(), strict=True)) if path.is_file() else set()
    )


def scores_in(folder: Path, method: str, seed: int, n: int) -> list[tuple]:
    """Return the rows of a cell type model that evaluate.py has scored, and of the baselines beside it.

    Parameters
    ----------
    folder : the model folder
    method : what the rows call the model
    seed, n : the rows' seed and labels per type
    """
    return [
        (seed, n, method if name == "scmomer" else name, measure, scores[measure])
        for name, scores in evaluated(folder, "accuracy").items()
        for measure in ("accuracy", "macro_f1")
    ]


def evaluated(folder: Path, measure: str) -> dict[str, dict]:
    """Return method → scores of those methods that evaluate.py has given a measure, from a model folder."""
    table = json.loads((folder / "evaluation" / "evaluation_test.json").read_text())
    return {name: scores for name, scores in table.items() if isinstance(scores, dict) and measure in scores}


def read_parts(folder: str | Path, data: str, *parts: str) -> pd.DataFrame:
    """Return the rows of some parts, of all runs, with columns `fold` and `pretraining` (its seed).

    Raises
    ------
    UserError
        If the folder has none.
    """
    tables = []
    for part in parts:
        for path in sorted(Path(folder).glob(f"{data}_fold*_{part}.csv")):
            *found, fold, pretraining = parsed(path)
            if found == [data, part]:  # not controls_translation for translation
                tables.append(read_rows(path).assign(fold=fold, pretraining=pretraining))
    if not tables:
        raise UserError(f"{folder}: has no rows of {parts[0]} of {data}; run python -m benchmarks.paired --data {data}")
    return pd.concat(tables, ignore_index=True)


def parsed(path: Path) -> tuple[str, str, int, int]:
    """Return data set, part, fold and seed of the pretraining, as the name of a CSV file says."""
    data, fold, pretraining, part = re.fullmatch(r"(.+)_fold(\d+)(?:_pretraining(\d+))?_(.+)", path.stem).groups()
    return data, part, int(fold), int(pretraining or 0)


RUN = ["fold", "pretraining", "seed"]
"""What varies, from the outermost: test batches, pretraining, draws of labels with fine-tuning."""


def values_of(table: pd.DataFrame, method: str, measure: str, labels: int = 0) -> pd.Series:
    """Return a method's values, indexed by `RUN`."""
    rows = table[(table.method == method) & (table.measure == measure) & (table.labels == labels)]
    return rows.set_index(RUN)["value"].sort_index()


def of_folds(values: pd.Series) -> pd.Series:
    """Return for each fold the mean over pretrainings of the means over seeds."""
    return values.groupby(RUN[:2]).mean().groupby("fold").mean()


def mean(values: pd.Series) -> float:
    """Return the mean over folds of `of_folds`; NaN without values."""
    return float(of_folds(values).mean())


def interval(values: pd.Series, n: int = N_RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Return the 95% percentile interval of `mean`, with folds drawn, pretrainings within them, and seeds within these.

    Cells are not drawn: a fold's test cells are part of what differs between folds. Three folds are few, so that such
    an interval is rather too narrow than too wide.

    Parameters
    ----------
    values : indexed by `RUN`; of a difference, paired by it
    n, seed : number of resamples, and their seed
    """
    if values.empty:
        return float("nan"), float("nan")
    draw = np.random.default_rng(seed)
    n_folds = values.index.unique("fold").size
    means = []  # of each fold [n, places], since each place among the drawn folds gets draws of its own
    for _, fold in values.groupby("fold"):
        runs = [run.to_numpy() for _, run in fold.groupby("pretraining")]
        shape = (n, n_folds, len(runs))
        drawn = np.stack([run[draw.integers(len(run), size=(*shape, len(run)))].mean(3) for run in runs], 3)
        means.append(np.take_along_axis(drawn, draw.integers(len(runs), size=shape)[..., None], 3)[..., 0].mean(2))
    folds = draw.integers(n_folds, size=(n, n_folds))
    low, high = np.quantile(np.take_along_axis(np.stack(means, 2), folds[..., None], 2)[..., 0].mean(1), (0.025, 0.975))
    return float(low), float(high)
