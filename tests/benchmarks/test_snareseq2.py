"""Runs of the study: rows are added to the results of one fold and seed; methods see the labels of training cells."""

import numpy as np
import pandas as pd
import pytest

from benchmarks import peers, rna_only, snareseq2
from benchmarks.lib.study import load_run, save_run
from benchmarks.study import types_table, which_types_table
from utils.cells.preprocessed import read_cells
from utils.errors import UserError
from utils.files.write import write_whole

ALL = "all labels"


@pytest.fixture
def new_study(simulation, tmp_path, monkeypatch):
    """Makes a study of the simulated cells, of which donor D2's (fold 0) or D1's (fold 1) are test cells."""
    monkeypatch.setattr(snareseq2, "FOLDS", ("D2", "D1"))
    mdata = simulation.mdata.copy()
    mdata.obs["batch"] = mdata.obs["donor"].astype(str)
    for part in mdata.mod.values():
        part.obs["batch"] = part.obs["donor"].astype(str)
    data = tmp_path / "cells.h5mu"
    write_whole(mdata, data)

    def make(fold: int = 0, seed: int = 0, name: str = "run"):
        return snareseq2.Study(data, tmp_path / f"fold{fold}", tmp_path / "results" / f"{name}.json", fold, seed)

    return make


@pytest.mark.slow
def test_rows_are_added_to_those_that_are_there(new_study, capfd, monkeypatch):
    """Models that are always right, always wrong, or answer with the cell's number, in an order of their own."""
    ran, types = [], ["CD4 naive", "CD4 memory", "B cell"]

    def ours(study):
        ran.append("scMomer")
        cells = study.labels.to_frame("scMomer").assign(label=study.labels, half="CD4 naive")
        study.keep(ALL, cells.sample(frac=1, random_state=0))

    def peer(study, method):
        ran.append(method)
        number = [types[i % 3] for i in range(len(study.labels))]
        cells = pd.DataFrame({method: number, "half": "CD4 memory"}, index=study.labels.index)
        study.keep(ALL, cells[::-1])
        study.keep("10 labels per type", cells[[method]])

    monkeypatch.setattr(snareseq2.Study, "ours", ours)
    monkeypatch.setattr(snareseq2.Study, "peer", peer)
    for rows in (["scMomer"], ["scMomer", "scANVI"], ["scANVI"]):
        study = new_study()
        for row in rows:
            study.add(row)
    assert ran == ["scMomer", "scANVI"]
    assert capfd.readouterr().out.count("--results_path") == 2
    run = load_run(study.results)
    assert list(run.metadata["rows"]) == ran and all(
        at["date"] and at["machine"] for at in run.metadata["rows"].values()
    )
    assert list(run.metadata["stages"]) == ["preprocess"] and "--test_groups D2" in str(run.metadata["stages"])
    tables, truth = run.names(), read_cells(study.out / "ready.h5mu", ("rna",))
    truth = truth.labels().iloc[truth.rows("test")].tolist()
    assert len(truth) > 20 and tables.keys() == {ALL, "10 labels per type"}
    for group, table in tables.items():
        assert table["label"].tolist() == truth
        assert table["scANVI"].tolist() == [types[i % 3] for i in range(len(truth))], group
    assert tables[ALL]["scMomer"].tolist() == truth
    assert set(tables[ALL]["half"]) == {"CD4 memory"}  # the later one counts


@pytest.mark.slow
def test_results_of_another_run_are_not_added_to(new_study):
    study = new_study()
    save_run(study.results, {ALL: pd.DataFrame({"label": ["CD4 naive"]})}, **study.metadata)
    with pytest.raises(UserError, match=r"fold 0, seed 0.*fold 1, seed 0.*--results_path"):
        new_study(fold=1)
    with pytest.raises(UserError, match=r"fold 0, seed 0.*fold 0, seed 1"):
        new_study(seed=1)
    with pytest.raises(UserError, match=r"all labels: .*test cells"):
        new_study().preprocess()


@pytest.mark.slow
def test_a_study_of_peers_alone_has_tables_too(new_study, monkeypatch):
    monkeypatch.setattr(snareseq2.Study, "peer", lambda study, method: study.keep(ALL, study.labels.to_frame(method)))
    study = new_study()
    study.add("scANVI")
    runs = [load_run(study.results)]
    assert "| scANVI | 1 | 1.000 (1.000–1.000) | 1.000 (1.000–1.000) |  |  |" in types_table(runs, ALL, 10)
    assert which_types_table(runs).count("\n") == 1  # no row


def test_peers_see_the_labels_of_training_cells_alone(ready_file):
    cells = read_cells(ready_file, ("rna",))
    flags = peers.Flags("scANVI", "", "", "", seed=3)
    train, labels = cells.rows("train"), cells.labels("cell_type").to_numpy()
    known = peers.known_labels(cells, flags, 0)
    assert (known[train] == labels[train]).all()
    assert set(np.delete(known, train)) == {peers.UNKNOWN}
    few = peers.known_labels(cells, flags, 4)
    names, counts = np.unique(few[few != peers.UNKNOWN], return_counts=True)
    assert set(names) == set(labels) and set(counts) == {4}
    assert (few[few != peers.UNKNOWN] == labels[few != peers.UNKNOWN]).all()
    assert set(np.flatnonzero(few != peers.UNKNOWN)) <= set(train)


def test_folds_leave_out_each_cell_once_and_a_fifth_of_each_type():
    types = np.repeat(["many", "few", "one"], [52, 7, 1])
    fold = rna_only.folds(types)
    assert fold[-1] == "-" and set(fold[:-1]) == set("01234")  # a type of one cell is never tested
    for name, least, most in (("many", 10, 11), ("few", 1, 2)):
        counts = [(fold[types == name] == str(i)).sum() for i in range(5)]
        assert min(counts) == least and max(counts) == most
    assert (rna_only.folds(types) == fold).all()
