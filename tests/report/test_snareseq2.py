"""Rows of the study are added to the results of one fold and seed, cell by cell."""

import pandas as pd
import pytest

from benchmarks import snareseq2
from utils.data.write import write_whole
from utils.errors import UserError
from utils.report.study import load_run, save_run

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


def test_rows_are_added_to_those_that_are_there(new_study, capfd):
    first = new_study()
    first.preprocess()
    assert len(first.labels) == (first.labels.index.str.startswith("D2")).sum() > 20
    says = first.labels.to_frame("scMomer").assign(**{"majority class": "CD4 naive"}).sample(frac=1, random_state=0)
    first.keep(ALL, says)
    first.told["rows"].append("scMomer")
    save_run(first.results, first.cells, **first.told)

    second = new_study()
    capfd.readouterr()
    second.add("scMomer")
    assert "scMomer: stands in" in capfd.readouterr().out  # and nothing is run
    second.preprocess()
    wrong = pd.DataFrame({"scANVI": "CD4 memory", "scMomer": "is there already"}, index=first.labels.index[::-1])
    second.keep(ALL, wrong.assign(barcode_of=wrong.index))
    second.keep("10 labels per type", wrong[["scANVI"]])
    table = second.cells[ALL]
    assert table["scMomer"].tolist() == table["label"].tolist() == first.labels.tolist()
    assert table["barcode_of"].tolist() == first.labels.index.tolist()
    second.cells[ALL] = table.drop(columns="barcode_of")
    save_run(second.results, second.cells, **second.told)

    run = load_run(second.results)
    assert run.told["rows"] == ["scMomer"] and (run.fold, run.told["seed"]) == (0, 0)
    names = run.names()
    assert list(names[ALL]) == ["label", "scMomer", "majority class", "scANVI"]
    assert names["10 labels per type"]["label"].tolist() == first.labels.tolist()
    assert set(names[ALL]["scANVI"]) == {"CD4 memory"}


def test_results_of_another_run_are_not_added_to(new_study):
    study = new_study()
    save_run(study.results, {ALL: pd.DataFrame({"label": ["CD4 naive"]})}, **study.told)
    with pytest.raises(UserError, match="is of fold 0, seed 0, not of fold 1, seed 0; name another --results_path"):
        new_study(fold=1)
    with pytest.raises(UserError, match="seed 0, not of fold 0, seed 1"):
        new_study(seed=1)
    with pytest.raises(UserError, match="all labels: is about other test cells"):
        new_study().preprocess()
