"""The runner of the tasks: its steps, what it collects, and the table that it writes."""

import json
import shlex
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from benchmarks import tasks
from benchmarks.lib.tasks import END, START, Goal, collect, comparisons, markdown, rows_of, write_table
from tests.helpers import ROOT, error_of, lacks
from tests.test_docs import flags_of
from utils.errors import UserError

TRANSLATED = {
    "scmomer, calibrated": {"peak_auroc": 0.647, "peak_auroc_95%": [0.64, 0.65]},
    "differences": [
        {
            **{"score": "peak_auroc", "ours": 0.647, "baseline": "ridge on PCA", "theirs": 0.637, "difference": 0.01},
            **{"difference_95%": [0.009, 0.012], "lower_is_better": False},
        },
        {
            **{"score": "pseudobulk_rmse", "ours": 0.01051, "baseline": "ridge on PCA", "theirs": 0.01073},
            **{"difference": -0.00022, "difference_95%": [-0.0003, 0.0001], "lower_is_better": True},
        },
    ],
}
PAIRS = {
    "scores": {"co-expression SVD": {"auroc": 0.6, "val_auroc": 0.58}, "genes.h5ad": {"auroc": 0.59}},
    "differences": [
        {
            **{"score": "auroc", "method": "genes.h5ad", "ours": 0.59, "baseline": "co-expression SVD", "theirs": 0.6},
            **{"difference": -0.01, "difference_95%": [-0.04, 0.02]},
        }
    ],
}
PERTURBED = {
    "differences": [
        {
            **{"score": "pearson", "ours": 0.4, "baseline": "forest", "theirs": 0.5, "difference": -0.1},
            **{"difference_95%": [-0.2, -0.05], "lower_is_better": False},
        },
        {
            **{"score": "mse_20", "ours": 0.1, "baseline": "no change", "theirs": 0.4, "difference": -0.3},
            **{"difference_95%": [-0.4, -0.1], "lower_is_better": True},
        },
        {
            **{"score": "pearson", "ours": 0.4, "baseline": "the mean", "theirs": 0.3, "difference": 0.1},
            **{"difference_95%": [0.05, 0.2], "lower_is_better": False},
        },
    ]
}


def test_comparisons_are_read_from_each_kind_of_result():
    auroc, rmse = comparisons(TRANSLATED)
    assert auroc.reached() == "yes" and rmse.reached() == "unclear" and rmse.reached(level=True) == "level"
    (pairs,) = comparisons(PAIRS)
    assert (pairs.ours, pairs.baseline, pairs.theirs, pairs.difference) == (0.59, "co-expression SVD", 0.6, -0.01)
    assert pairs.reached() == "unclear"
    pearson, mse, _ = comparisons(PERTURBED)
    assert (pearson.ours, pearson.theirs) == (0.4, 0.5) and pearson.reached(level=True) == "no"
    assert mse.lower_is_better and mse.reached() == "yes"
    assert comparisons({"verdict": []}) == []


def test_results_are_collected_with_their_command_and_without_the_machines_folders(tmp_path):
    folder, results = tmp_path / "runs" / "ggi", tmp_path / "results"
    folder.mkdir(parents=True)
    about = {"command": f"python -m downstream.gene_pairs --pairs_path {tmp_path}/data/x", "seed": 0, "seconds": 3.5}
    with pytest.raises(UserError, match=r"gene_pairs\.json"):
        collect("ggi", folder, "gene_pairs", results, about, [])
    (folder / "gene_pairs.json").write_text(json.dumps(PAIRS | {"flags": {"pairs_path": f"{tmp_path}/data/x"}}))
    Image.new("RGB", (20, 10)).save(folder / "gene_pairs.png")
    collect("ggi", folder, "gene_pairs", results, about, [(f"{tmp_path}/", "")])
    text = (results / "ggi.json").read_text()
    kept = json.loads(text)
    assert str(tmp_path) not in text and kept["flags"]["pairs_path"] == "data/x"
    assert kept["scores"] == PAIRS["scores"] and kept["run"]["seconds"] == 3.5 and "torch" in kept["run"]["versions"]
    assert Image.open(results / "ggi.png").width == 20


def test_the_table_stands_between_its_marks_and_in_a_file(tmp_path):
    rows = rows_of("translation", "two batches", "translate.md", (Goal("peak_auroc", "above ridge"),), TRANSLATED)
    goals = Goal("pearson", "above all"), Goal("rank", "above it"), Goal("mse_20", "")
    goals += (Goal("pearson", "above the mean", against="the mean"),)
    rows += rows_of("perturbation", "singles", "p.md", goals, PERTURBED)
    assert [row["reached"] for row in rows] == ["yes", "no", "not measured", "", "yes"]
    page = tmp_path / "tasks.md"
    page.write_text(f"# Tasks\n\n{START}\nold\n{END}\n\nAfter.\n")
    for _ in range(2):  # written again, it is the same
        write_table(rows, tmp_path / "results", page)
        text = page.read_text()
        assert text == f"# Tasks\n\n{START}\n\n{markdown(rows)}\n\n{END}\n\nAfter.\n"
    line = next(line for line in text.splitlines() if "two batches" in line)
    assert (
        line.count("|") == 9
        and lacks(line, "0.647", "0.637 ridge on PCA", "+0.010 (+0.009 to +0.012)", "**yes**") == []
    )
    table = pd.read_csv(tmp_path / "results" / "tasks.csv")
    assert list(table["reached"][:3]) == ["yes", "no", "not measured"] and table["low"][0] == 0.009
    page.write_text("no marks")
    with pytest.raises(UserError, match=r"tasks\.md"):
        write_table(rows, tmp_path / "results", page)


def test_every_command_has_flags_that_exist_and_a_place_in_the_table():
    assert len({step.name for step in tasks.STEPS}) == len(tasks.STEPS)
    groups = {step.group for step in tasks.STEPS}
    for step in tasks.STEPS:
        assert set(step.needs) <= groups and bool(step.result) == bool(step.goals), step.name
        words = shlex.split(tasks.command_of(step, Path("data"), Path("out"), 0, quick=True))
        name = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
        assert "{" not in " ".join(words)
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), name
        assert {word for word in words if word.startswith("--")} <= flags_of(name), step.name
    only = [step.group for step in tasks.chosen_steps("gene_pairs")]
    assert set(only) == {"human", "gene_pairs"} and only.index("gene_pairs") > only.index("human")


def test_a_step_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    page, made = tmp_path / "tasks.md", tmp_path / "x.json"
    page.write_text(f"{START}\n{END}\n")
    made.write_text(json.dumps(TRANSLATED))
    save = "import os, shutil, sys; os.mkdir(sys.argv[1]); shutil.copy(sys.argv[2], sys.argv[1])"
    shown = {"result": "x", "title": "t", "split": "s", "page": "p.md", "goals": (Goal("peak_auroc", "above"),)}
    good = tasks.Step("good", "b", f"-c {shlex.quote(save)} {{o}}/good {made}", **shown)
    bad = tasks.Step("bad", "a", "-c 'raise SystemExit(3)'", **shown)
    monkeypatch.setattr(tasks, "STEPS", (bad, good))
    monkeypatch.setattr(tasks, "TASKS", ("a", "b"))
    monkeypatch.setattr(tasks, "PAGE", page)
    flags = ["--data_path", str(tmp_path), "--out_path", str(tmp_path / "o"), "--results_path", str(tmp_path / "r")]
    for _ in range(2):  # the second time, the good one is not run again
        monkeypatch.setattr("sys.argv", ["tasks", *flags])
        with pytest.raises(SystemExit) as stopped:
            tasks.main()
        assert stopped.value.code == 1
        assert "failed: bad" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "r" / "tasks.csv")) == 1 and "0.647" in page.read_text()
    assert list(json.loads((tmp_path / "o" / "stages.json").read_text())) == ["good"]


def test_bad_input(tmp_path, capsys):
    wrong = error_of(capsys, "benchmarks.tasks", data_path=tmp_path, only="nothing")
    assert lacks(wrong, "--only", "nothing", "gene_pairs") == []
    absent = error_of(capsys, "benchmarks.tasks", data_path=tmp_path / "absent")
    assert lacks(absent, "--data_path", "absent") == []
