"""Collect the results of the tasks in downstream/ and evaluate.py: from their JSON files to rows of one table."""

import json
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd

from utils.as_json import to_json
from utils.errors import UserError

START, END = "<!-- tasks -->", "<!-- /tasks -->"
"""Lines between which the table stands on its page."""
PACKAGES = ("torch", "numpy", "scikit-learn", "anndata", "rdkit")


@dataclass(frozen=True)
class Goal:
    """What a task should reach on one split.

    Attributes
    ----------
    score : name of the score in the task's JSON
    words : the target, as the table shows it; empty if the score is only shown
    level : whether it is enough not to lose; otherwise the model must win
    against : the baseline to beat; None for the best one of the task
    """

    score: str
    words: str
    level: bool = False
    against: str | None = None


@dataclass(frozen=True)
class Comparison:
    """One score of a model beside a baseline, on the same split.

    Attributes
    ----------
    ours, theirs : values of the model and of the baseline; None where the JSON has the difference alone
    interval : 95% interval of the difference ours - theirs; None where the task gives none
    lower_is_better : whether the score is an error
    """

    score: str
    ours: float | None
    baseline: str
    theirs: float | None
    difference: float
    interval: tuple[float, float] | None
    lower_is_better: bool = False

    def reached(self, level: bool = False) -> str:
        """Return yes or no: whether the model wins. If the interval holds zero: level where that is asked, or unclear."""
        low, high = self.interval or (self.difference, self.difference)
        if self.lower_is_better:
            low, high = -high, -low
        undecided = "level" if level else "unclear"
        word = "yes" if low > 0 else undecided if high >= 0 else "no"
        return word if self.interval else f"{word}, without an interval"


def comparisons(result: dict) -> list[Comparison]:
    """Return the comparisons of a model with baselines that a task's JSON holds under `differences`."""
    return [
        Comparison(
            *(row[key] for key in ("score", "ours", "baseline", "theirs", "difference")),
            _pair(row.get("difference_95%")),
            row.get("lower_is_better", False),
        )
        for row in result.get("differences", ())
    ]


def _pair(values) -> tuple[float, float] | None:
    """Return an interval as a tuple; None if a value is missing."""
    return tuple(values) if values and None not in values else None


def collect(step: str, folder: Path, name: str, results: Path, about: dict, hidden: list[tuple[str, str]]) -> dict:
    """Copy a task's JSON, with the command and the machine, and its figure into the folder of results.

    Parameters
    ----------
    step : name of the results: <step>.json and <step>.png
    folder : where the task wrote <name>.json and <name>.png
    name : as above
    results : folder of results
    about : command, seed, seconds and machine
    hidden : (folder, what stands for it), so that no folder of one machine is kept

    Returns
    -------
    dict
        What was written.

    Raises
    ------
    UserError
        If the task has written no JSON.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise UserError(f"{path}: does not exist, so {step} has no results; its message stands above")
    text = to_json({"run": about | {"versions": versions()}} | json.loads(path.read_text()))
    for real, shown in hidden:
        text = text.replace(real, shown)
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{step}.json").write_text(text)
    if path.with_suffix(".png").is_file():
        shutil.copyfile(path.with_suffix(".png"), results / f"{step}.png")
    return json.loads(text)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def rows_of(task: str, split: str, page: str, goals: tuple[Goal, ...], result: dict) -> list[dict]:
    """Return a row of the table for each goal of a task.

    Parameters
    ----------
    task, split, page : shown in the table; page is the how-to page of the task
    goals : what should be reached
    result : content of the task's JSON
    """
    rows, found = [], comparisons(result)
    for goal in goals:
        chosen = [c for c in found if c.score == goal.score and goal.against in (None, c.baseline)]
        row = {"task": task, "split": split, "page": page, "score": goal.score, "target": goal.words}
        if chosen:
            values = asdict(chosen[0])
            low, high = values.pop("interval") or (None, None)
            row |= values | {"low": low, "high": high, "reached": chosen[0].reached(goal.level) if goal.words else ""}
        else:
            row |= {"reached": "not measured"}
        rows.append(row | {"seconds": result.get("run", {}).get("seconds")})
    return rows


def markdown(rows: list[dict]) -> str:
    """Return the rows as a Markdown table: one for each task, split and score."""
    lines = [
        "| task | split | score | ours | best beside it | difference (95%) | target | reached? |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row.get("low"), row.get("high")
        between = "" if low is None else f" ({_signed(low)} to {_signed(high)})"
        theirs = f"{_short(row.get('theirs'))} {row.get('baseline') or ''}".strip()
        difference = "" if row.get("difference") is None else _signed(row["difference"]) + between
        reached = {"yes": "**yes**", "no": "**no**"}.get(row["reached"], row["reached"])
        cells = [f"[{row['task']}]({row['page']})", row["split"], row["score"].replace("_", " ")]
        cells += [_short(row.get("ours")), theirs, difference, row["target"], reached]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.5f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:+.5f}"


def write_table(rows: list[dict], results: Path, page: Path) -> None:
    """Write the rows to tasks.csv, and as a table between the two marks of a page.

    Raises
    ------
    UserError
        If the page lacks the marks.
    """
    results.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).drop(columns="page", errors="ignore").to_csv(results / "tasks.csv", index=False)
    text = page.read_text()
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise UserError(f"{page}: lacks the lines {START} and {END}, between which the table is written; add them")
    before, after = text.split(START)[0], text.split(END)[1]
    page.write_text(f"{before}{START}\n\n{markdown(rows)}\n\n{END}{after}")
