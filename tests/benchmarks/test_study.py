"""Rows of the study: kept without loss, averaged over folds, and intervals that hold what varies."""

import json
from statistics import fmean

import numpy as np
import pandas as pd
import pytest

from benchmarks import study as tables
from benchmarks.lib.bench import RESULTS
from benchmarks.lib.study import (
    RUN,
    add_rows,
    done_in,
    interval,
    mean,
    read_parts,
    read_rows,
    run_name,
    scores_in,
    values_of,
)
from utils.errors import UserError


def rows(seed: int, labels: int = 0, **values: float) -> list[tuple]:
    """Rows of all labels, or of so many: method → accuracy, and macro-F1 a tenth lower."""
    return [
        (seed, labels, name, measure, value - (measure == "macro_f1") * 0.1)
        for name, value in values.items()
        for measure in ("accuracy", "macro_f1")
    ]


def series(by_fold: dict[int, list]) -> pd.Series:
    """Values of one pretraining per fold, or of several where a fold has lists of values."""
    runs = {fold: values if isinstance(values[0], list) else [values] for fold, values in by_fold.items()}
    found = {
        (fold, pretraining, seed): value
        for fold, pretrainings in runs.items()
        for pretraining, values in enumerate(pretrainings)
        for seed, value in enumerate(values)
    }
    return pd.Series(list(found.values()), pd.MultiIndex.from_tuples(found, names=RUN))


def test_rows_are_added_and_the_later_ones_replace_the_earlier(tmp_path):
    path = tmp_path / "cortex_fold1_types.csv"
    assert done_in(path) == set()
    add_rows(path, rows(0, ours=0.8, MLP=0.7))
    add_rows(path, rows(2, ours=0.9) + rows(0, MLP=0.75))
    assert done_in(path) == {(0, 0), (2, 0)}
    table = read_parts(tmp_path, "cortex", "types")
    assert len(table) == 6 and set(table.fold) == {1}
    assert values_of(table, "MLP", "accuracy").tolist() == [0.75]
    assert values_of(table, "ours", "macro_f1").to_dict() == {(1, 0, 0): 0.7, (1, 0, 2): 0.8}
    add_rows(tmp_path / f"cortex_{run_name(1, 3)}_types.csv", rows(0, ours=0.5))
    again = values_of(read_parts(tmp_path, "cortex", "types"), "ours", "accuracy")
    assert again.to_dict() == {(1, 0, 0): 0.8, (1, 0, 2): 0.9, (1, 3, 0): 0.5}
    with pytest.raises(UserError, match=r"--data cortex"):
        read_parts(tmp_path, "cortex", "shuffled")


def test_the_mean_counts_each_fold_alike():
    values = series({0: [1.0, 1.0, 1.0], 1: [0.0]})
    assert mean(values) == 0.5
    assert mean(series({0: [[1.0, 1.0, 1.0], [0.0]], 1: [0.0]})) == 0.25  # and each pretraining of a fold
    assert np.isnan(mean(values[:0])) and np.isnan(interval(values[:0])).all()


def test_the_interval_holds_folds_pretrainings_and_seeds():
    """Folds that differ, 0 and 1: a mean of two drawn folds is 0, 1/2 or 1. Seeds that differ within one: likewise."""
    assert interval(series({0: [0.0], 1: [1.0]})) == (0.0, 1.0)
    assert interval(series({0: [0.0, 1.0]})) == (0.0, 1.0)
    assert interval(series({0: [[0.0, 0.0], [1.0]]})) == (0.0, 1.0)
    assert interval(series({0: [0.3, 0.3], 1: [0.3]})) == pytest.approx((0.3, 0.3))
    rng = np.random.default_rng(0)
    low, high = interval(series({fold: list(rng.normal(fold, 0.1, 5)) for fold in range(3)}))
    # All three drawn folds are the lowest in 1 of 27 draws, which is more than 2.5%.
    assert (low, high) == pytest.approx((0.0, 2.0), abs=0.12)


def test_kept_means_and_intervals_by_other_code():
    """Every method and number of labels of the kept rows: by loops over lines, and by another bootstrap."""
    table = read_parts(f"{RESULTS}/study", "snareseq2", "embeddings")
    draw = np.random.default_rng(7)
    for method, n in [("student", 30), ("student, shuffled pairs", 10), ("stage II", 0)]:
        by_run: dict[int, dict[int, list[float]]] = {}
        for line in table.itertuples():
            if (line.method, line.labels, line.measure) == (method, n, "macro_f1"):
                by_run.setdefault(line.fold, {}).setdefault(line.pretraining, []).append(line.value)
        values = values_of(table, method, "macro_f1", n)
        by_hand = fmean(fmean(map(fmean, runs.values())) for runs in by_run.values())
        assert mean(values) == pytest.approx(by_hand, abs=1e-9)
        drawn = lambda found: draw.choice(found, len(found)).mean()
        means = []
        for _ in range(3000):
            folds = [list(by_run[fold].values()) for fold in draw.choice(sorted(by_run), len(by_run))]
            means.append(fmean(fmean(drawn(runs[draw.integers(len(runs))]) for _ in runs) for runs in folds))
        assert interval(values) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.004)


def test_differences_are_paired_by_fold_and_seed():
    ours = series({0: [0.5, 0.9], 1: [0.2]})
    assert tables.difference(ours, ours - 0.01) == "**+1.0 (+1.0 … +1.0)**"
    assert tables.difference(ours, ours[::-1]) == "+0.0 (+0.0 … +0.0)"  # aligned by index, not by place
    assert tables.difference(ours, ours[:0]) == ""
    alone = tables.difference(ours[:2], pd.Series([0.6], ours.index[1:2]))
    assert alone == "+30.0 (one run)"  # which has no interval


def test_scores_of_a_folder_become_rows(tmp_path):
    (tmp_path / "evaluation").mkdir()
    scores = {"accuracy": 0.8, "macro_f1": 0.7, "calibration_error": 0.1}
    table = {"scmomer": scores, "MLP": scores, "n_cells": 5, "embeddings": {"scmomer": {"silhouette": 0.1}}}
    (tmp_path / "evaluation" / "evaluation_test.json").write_text(json.dumps(table))
    expected = [(3, 10, name, measure, scores[measure]) for name in ("ours", "MLP") for measure in tables.SCORES]
    assert scores_in(tmp_path, "ours", 3, 10) == expected


def test_the_page_gets_the_tables_and_keeps_its_words(tmp_path, monkeypatch):
    """Two folds by hand: 0.8 and 0.6 of ours, the best baseline 0.7 in both; real pairs 10 points above shuffled."""
    folder = tmp_path / "study"
    translated = [(0, 0, "student", measure, 0.625) for measure in tables.TRANSLATION]
    for fold, ours in enumerate((0.8, 0.6)):
        parts = {
            "types": rows(0, **{tables.OURS: ours, "MLP": 0.7, "majority class": 0.1}),
            "shuffled": rows(0, **{tables.SHUFFLED: ours - 0.05}),
            "subclasses": rows(0, 30, **{tables.OURS: ours - 0.2, "MLP": 0.3}),
            "embeddings": rows(0, **{"student": ours, "student, shuffled pairs": ours - 0.1, "stage II": 0.5}),
            "translation": translated,
            "controls_translation": [(0, 0, "RNA + ATAC denoiser", "peak_auroc", 0.5)],
        }
        for part, found in parts.items():
            add_rows(folder / f"snareseq2_fold{fold}_{part}.csv", found)
        add_rows(folder / f"snareseq2_fold{fold}_controls.csv", rows(0, **{"RNA denoiser": 0.4}))
        add_rows(folder / f"snareseq2_fold{fold}_scANVI.csv", rows(0, scANVI=0.2))
        for name in (*tables.RNA_ONLY, "bmmc"):
            add_rows(folder / f"{name}_fold{fold}_types.csv", rows(0, **{tables.OURS: ours, "MLP": ours + 0.01}))
            add_rows(folder / f"{name}_fold{fold}_mixed.csv", rows(0, **{tables.PARTS["mixed"]: ours + 0.02}))
        add_rows(folder / f"bmmc_fold{fold}_embeddings.csv", parts["embeddings"])
    add_rows(folder / "snareseq2_fold2_scANVI.csv", rows(0, scANVI=0.9))  # a fold that ours lacks does not count
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{tables.MARKS[0]}\nstale\n{tables.MARKS[1]}\n\nafter\n")
    monkeypatch.setattr("sys.argv", ["study.py", "--results_path", str(folder), "--page", str(page)])
    for _ in range(2):  # the second time it replaces its own tables
        tables.main()
        text = page.read_text()
        assert "denoiser" not in "".join(line for line in text.splitlines() if "help" in line)  # one of two was run
        assert text.startswith("before\n\n") and text.endswith("\n\nafter\n") and "stale" not in text
        assert "| scANVI | 0.200 / 0.100 |" in text
        assert f"| {tables.OURS} | 0.700 / 0.600 |" in text
        assert "| all labels | accuracy | MLP | -0.0 (-10.0 … +10.0) | +10.0, -10.0 |" in text.replace("+0.0", "-0.0")
        assert "| **+10.0 (+10.0 … +10.0)**; **+10.0 (+10.0 … +10.0)** |" in text
        assert "| **+5.0 (+5.0 … +5.0)**; **+5.0 (+5.0 … +5.0)** |" in text
        better = ["**-1.0 (-1.0 … -1.0)**; **-1.0 (-1.0 … -1.0)**", "**+1.0 (+1.0 … +1.0)**; **+1.0 (+1.0 … +1.0)**"]
        assert (
            f"| MLP | 0.710 / 0.610 | {' | '.join(better)} | 0.710" in text
        )  # of ours, and of ours with baselines mixed in
        assert "| all labels | accuracy | MLP | **+1.0 (+1.0 … +1.0)** | +1.0, +1.0 |" in text
        assert "| 30 per type | accuracy | MLP | **+20.0 (+10.0 … +30.0)** | +30.0, +10.0 |" in text
        assert "| student | 0.6250 | 0.6250 |" in text
    assert (tmp_path / "study.png").stat().st_size > 10_000
    page.write_text("no marks")
    with pytest.raises(UserError, match="lacks the lines"):
        tables.main()


def test_a_repeated_run_is_compared_row_by_row(tmp_path):
    kept, again = tmp_path / "kept", tmp_path / "again"
    add_rows(kept / "cortex_fold0_types.csv", rows(0, ours=0.8, MLP=0.7))
    add_rows(again / "cortex_fold0_types.csv", rows(0, ours=0.82) + rows(1, MLP=0.1))
    assert "| cortex_fold0_types | 2 | 0.0200 | 0.0200 | 0 |" in tables.compared(kept, again)
    # Part quick stands beside the two parts of its run; another pretraining widens the range that counts as near.
    add_rows(kept / "cortex_fold0_embeddings.csv", rows(0, student=0.8))
    add_rows(kept / "cortex_fold0_pretraining1_embeddings.csv", rows(0, student=0.9))
    add_rows(kept / "cortex_fold0_translation.csv", rows(0, ridge=0.6))
    add_rows(again / "cortex_fold0_quick.csv", rows(0, student=0.86, ridge=0.64))
    assert "| cortex_fold0_quick | 4 | 0.0600 | 0.0500 | 2 |" in tables.compared(kept, again)
    with pytest.raises(UserError, match="--compare"):
        tables.compared(kept, tmp_path / "nothing")


def test_the_kept_rows_are_complete():
    """Each file has each of its methods once per seed, number of labels and measure, and nothing that is no number."""
    for path in sorted((tables.Path(RESULTS) / "study").glob("*.csv")):
        table = read_rows(path)
        assert not table.duplicated(["seed", "labels", "method", "measure"]).any(), path
        assert np.isfinite(table.value).all(), path
