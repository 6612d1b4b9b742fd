"""Results of a study: kept without loss, averaged, and differences between methods bootstrapped in pairs."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score

from benchmarks import study as tables
from benchmarks.lib.bench import when_and_where
from benchmarks.lib.study import f1_of_types, interval, load_runs, mean_score, save_run
from utils.as_json import to_json
from utils.errors import UserError

TYPES = np.array(["Astro", "L2/3", "NA", "T cell"])
ALL = "all labels"


def answers(rng, truth, right: float) -> np.ndarray:
    """True types, but for a share of the cells, which get any."""
    return np.where(rng.random(len(truth)) < right, truth, rng.choice(TYPES, len(truth)))


@pytest.fixture
def study(tmp_path):
    """Two folds with two seeds; "twin" says what "good" says, and "rare" is in one run alone."""
    rng, tables = np.random.default_rng(0), {}
    for fold in (0, 1):
        truth = rng.choice(TYPES, 300, p=(0.5, 0.3, 0.15, 0.05))
        for seed in (0, 1):
            good = answers(rng, truth, 0.7)
            cells = {"label": truth, "good": good, "twin": good, "bad": answers(rng, truth, 0.3)}
            if (fold, seed) == (0, 1):
                cells["rare"] = answers(rng, truth, 0.5)
            tables[fold, seed] = pd.DataFrame(cells)
            save_run(
                tmp_path / f"fold{fold}_seed{seed}.json", {ALL: tables[fold, seed]}, fold=fold, seed=seed, x={"a": 1}
            )
    return load_runs(tmp_path), tables


def test_what_is_saved_is_read(study):
    runs, tables = study
    assert [(run.fold, run.metadata["seed"]) for run in runs] == list(tables)
    for run, table in zip(runs, tables.values(), strict=True):
        assert run.metadata["x"] == {"a": 1}
        assert np.array(run.metadata["classes"])[run.cells[ALL]].tolist() == table.to_numpy().tolist()


def test_means_are_those_of_sklearn(study):
    runs, tables = study
    accuracy = np.mean([accuracy_score(table["label"], table["good"]) for table in tables.values()])
    macro_f1 = np.mean([f1_score(table["label"], table["good"], average="macro") for table in tables.values()])
    assert mean_score(runs, ALL, "good", "accuracy") == pytest.approx(accuracy)
    assert mean_score(runs, ALL, "good", "macro_f1") == pytest.approx(macro_f1)
    table = tables[0, 1]
    assert mean_score(runs, ALL, "rare", "accuracy") == pytest.approx(accuracy_score(table["label"], table["rare"]))
    assert np.isnan(mean_score(runs, ALL, "nobody", "accuracy")) and np.isnan(
        mean_score(runs, "none", "good", "accuracy")
    )
    assert all(np.isnan(interval(runs, ALL, "good", "accuracy", against="nobody")))


def test_f1_of_types_is_that_of_sklearn(study):
    runs, tables = study
    found = f1_of_types(runs, ALL, "bad")
    each = [f1_score(table["label"], table["bad"], average=None, labels=TYPES) for table in tables.values()]
    sizes = [(table["label"] == name).sum() for table in tables.values() for name in TYPES]
    assert found["f1"][TYPES].tolist() == pytest.approx(np.mean(each, axis=0).tolist())
    assert found["test_cells"][TYPES].tolist() == pytest.approx(np.reshape(sizes, (4, 4)).mean(axis=0).tolist())
    assert found["f1"].mean() == pytest.approx(mean_score(runs, ALL, "bad", "macro_f1"))


def test_the_methods_are_listed_with_ours_first(tmp_path):
    names = ["label", "scMomer, labelled cells alone", "nearest neighbours", "scMomer"]
    cells = pd.DataFrame({name: ["A", "B"] for name in names})
    save_run(tmp_path / "one.json", {ALL: cells}, fold=0, seed=0)
    runs = load_runs(tmp_path)
    assert tables.methods_of(runs, ALL) == ["scMomer", "scMomer, labelled cells alone", "nearest neighbours"]
    assert "| scMomer is better by, accuracy |" in tables.types_table(runs, ALL, 10)


def test_interval_of_one_method_is_the_binomials(tmp_path):
    """One run, one type: the accuracy of 400 cells, of which 300 are right."""
    cells = pd.DataFrame({"label": np.repeat("A", 400), "good": np.repeat(["A", "B"], [300, 100])})
    save_run(tmp_path / "one.json", {ALL: cells}, fold=0, seed=0)
    low, high = interval(load_runs(tmp_path), ALL, "good", "accuracy", n=2000)
    deviation = np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - 1.96 * deviation, abs=0.004)
    assert high == pytest.approx(0.75 + 1.96 * deviation, abs=0.004)


def test_differences_are_paired(study):
    runs, _ = study
    assert interval(runs, ALL, "good", "macro_f1", against="twin", n=50) == (0.0, 0.0)
    low, high = interval(runs, ALL, "good", "macro_f1", against="bad", n=200)
    mean = mean_score(runs, ALL, "good", "macro_f1") - mean_score(runs, ALL, "bad", "macro_f1")
    assert 0.2 < low < mean < high
    assert interval(runs, ALL, "bad", "macro_f1", against="good", n=200) == pytest.approx((-high, -low))


def test_seeds_that_differ_widen_the_interval(tmp_path):
    """Two seeds, right and wrong in all cells: drawn twice each, the mean is 0, 1/2 or 1."""
    for seed, answer in enumerate("AB"):
        cells = pd.DataFrame({"label": np.repeat("A", 50), "lucky": np.repeat(answer, 50)})
        save_run(tmp_path / f"{seed}.json", {ALL: cells}, fold=0, seed=seed)
    runs = load_runs(tmp_path)
    assert mean_score(runs, ALL, "lucky", "accuracy") == 0.5
    assert interval(runs, ALL, "lucky", "accuracy", n=200) == (0.0, 1.0)


def test_the_page_gets_the_tables_and_keeps_its_words(tmp_path, monkeypatch):
    """Rows by hand: 3 of 4 and 2 of 4 right, and two runs of which one has no student."""
    truth = np.array(["A", "A", "B", "B"])
    both = {tables.OURS: ["A", "A", "B", "A"], tables.PLAIN: ["A", "B", "A", "B"]}
    stages = (
        {"stage I": {"seconds": 10.0, "peak_memory_gb": 1.0}},
        {"stage I": {"seconds": 20.0, "peak_memory_gb": 1.5}},
    )
    ranked = dict.fromkeys(("peak_auroc", "cell_auroc", "peak_ap", "cell_ap"), 0.625)
    for fold, methods in enumerate((both, {tables.OURS: both[tables.OURS]})):
        groups = {
            ALL: pd.DataFrame({"label": truth} | methods),
            "30 labels per type": pd.DataFrame({"label": truth} | methods),
        }
        metadata = {"stages": stages[fold], "translation": {"scmomer": ranked}}
        metadata["rows"] = {"scMomer": {"date": "2026-11-01", "machine": "a laptop"}, "scANVI": when_and_where()}
        save_run(tmp_path / "runs" / f"{fold}.json", groups, fold=fold, seed=0, **metadata)
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{tables.MARKS[0]}\nstale\n{tables.MARKS[1]}\n\nafter\n")
    flags = [
        "--results_path",
        tmp_path / "runs",
        "--rna_only_path",
        tmp_path / "no",
        "--page",
        page,
        "--n_bootstrap",
        20,
    ]
    monkeypatch.setattr("sys.argv", ["study.py", *map(str, flags)])
    for _ in range(2):  # the second time it replaces its own tables
        tables.main()
        text = page.read_text()
        assert text.startswith("before\n\n") and text.endswith("\n\nafter\n") and "stale" not in text
        assert "2 runs (fold 0 seed 0, fold 1 seed 0); a laptop, 2026-11-01; " in text.replace("\n", " ")
        assert "| fold 1 seed 0 | 4 | 0.750 (" in text
        assert text.count("| scMomer | 2 | 0.750 (") == 2  # for all labels and for few
        assert text.count("| scMomer without the student | 1 | 0.500 (") == 2
        assert "| all labels | 1 | +25.0 (" in text
        assert "| | test cells | scMomer, all labels | scMomer, 30 labels per type |" in text
        assert "| A | 2 | 0.80 | 0.80 |" in text and "| B | 2 | 0.67 | 0.67 |" in text
        assert "| scMomer | 2 | 0.6250 (0.6250–0.6250) |" in text
        assert "| stage I | 10 | 1.50 |" in text
    assert (tmp_path / "runs.png").stat().st_size > 10_000
    page.write_text("no marks")
    with pytest.raises(UserError, match="lacks the lines"):
        tables.main()


def test_any_number_of_types_is_kept(tmp_path):
    many = pd.DataFrame({"label": [f"type {i % 300}" for i in range(600)], "ours": "type 7"})
    save_run(tmp_path / "many.json", {ALL: many}, fold=0, seed=0)
    (run,) = load_runs(tmp_path)
    pd.testing.assert_frame_equal(run.names()[ALL].astype(str), many.astype(str))


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no results"):
        load_runs(tmp_path)


def test_json_knows_no_nan():
    value = {"a": [float("nan"), 1.5, ("x", None)], "b": {"c": float("nan"), "d": np.float64("nan")}, "e": True}
    for compact in (False, True):
        text = to_json(value, compact=compact)
        assert json.loads(text) == {"a": [None, 1.5, ["x", None]], "b": {"c": None, "d": None}, "e": True}
        assert "NaN" not in text


def test_groups_stand_in_one_order():
    """Whatever order a set has: by the number of labels, then by name."""

    class Fake:
        def __init__(self, cells):
            self.cells = cells

    names = [ALL, "10 labels per type", "100 labels per type", "ATAC alone", "RNA and ATAC"]
    for order in (names, names[::-1]):
        assert tables.groups_of([Fake(dict.fromkeys(order))]) == names
