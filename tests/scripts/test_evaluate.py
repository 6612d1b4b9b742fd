"""evaluate.py: scores that can be recomputed from what other scripts write, and baselines beside them."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from models.shapes import other
from tests.helpers import TRAINING, error_of, lacks, records, run
from utils.cells.labels import label_codes, limit_labels
from utils.cells.minibatches import CellDataset, MicroBatch
from utils.cells.preprocessed import read_cells
from utils.evaluate import tuning
from utils.evaluate.metrics import cell_auroc, classification_scores
from utils.evaluate.type_baselines import majority_class
from utils.predict.score_types import fit_baselines
from utils.train.model_folder import load_model

TYPE_ROWS = {
    *("scmomer", "majority class", "nearest neighbours", "logistic regression", "PCA + logistic regression", "MLP")
}


@pytest.fixture(autouse=True)
def few_settings(monkeypatch):
    """Baselines try few settings, which is quick."""
    monkeypatch.setattr(tuning, "BUDGET", 3)


@pytest.fixture(params=["atac", "rna"])
def missing(request) -> str:
    return request.param


def evaluated(ready_file, model, folder, split="val") -> dict:
    run("evaluate", data_path=ready_file, model_path=model, split=split, out_path=folder, device="cpu")
    table = json.loads((folder / f"evaluation_{split}.json").read_text())
    with Image.open(folder / f"evaluation_{split}.png") as image:
        assert image.width > 500
    rows = [name for name, row in table.items() if isinstance(row, dict) and name != "embeddings"]
    assert list(pd.read_csv(folder / f"evaluation_{split}.csv", index_col=0).index) == rows
    return table


def minibatch(ready_file, model, modality, split="val"):
    """The model, all cells of a split, and their minibatch."""
    cells = read_cells(ready_file, ("rna", "atac"))
    rows = cells.rows(split)
    dataset = CellDataset({modality: cells.values[modality][rows]}, cells.obs.index[rows])
    n = len(rows)
    return (
        load_model(model, "celltype", "student").build().eval(),
        cells,
        rows,
        dataset[MicroBatch(np.arange(n), np.ones(n), 0, n)],
    )


def test_cell_types(ready_file, runs, missing, tmp_path, capsys):
    table = evaluated(ready_file, runs[f"celltype_{missing}"], tmp_path)
    assert table.keys() > TYPE_ROWS and "logistic regression, self-trained" not in table  # all cells have a label
    model, cells, rows, batch = minibatch(ready_file, runs[f"celltype_{missing}"], other(missing))
    truth, classes = (
        cells.labels().iloc[rows].to_numpy(),
        np.array(load_model(runs[f"celltype_{missing}"], "celltype").outputs),
    )
    with torch.no_grad():
        predicted = classes[model(batch)[1].argmax(1).numpy()]
    expected = classification_scores(truth, predicted)
    assert {name: table["scmomer"][name] for name in expected} == pytest.approx(expected)
    for name in TYPE_ROWS:
        low, high = table[name]["macro_f1_95%"]
        assert low <= table[name]["macro_f1"] <= high
        assert 0 <= table[name]["calibration_error"] <= 1
        assert name in ("scmomer", "majority class") or 0 < table[name]["settings_tried"] <= 3
    for row in table["differences"]:
        best = max(TYPE_ROWS - {"scmomer"}, key=lambda name: table[name][row["score"]])
        assert table[row["baseline"]][row["score"]] == table[best][row["score"]] == row["theirs"]
        assert row["difference_95%"][0] <= row["difference"] <= row["difference_95%"][1]
    assert len(table["verdict"]) == 2
    majority = pd.Series(cells.labels().iloc[cells.rows("train")]).mode()[0]
    assert table["majority class"]["accuracy"] == pytest.approx((truth == majority).mean())
    assert table["embeddings"].keys() == {"scmomer", "50 principal components"}
    per_type = pd.read_csv(tmp_path / "per_type_val.csv", index_col="cell_type")
    assert per_type["support"].sum() == len(truth)
    assert per_type["f1"][per_type["support"] > 0].mean() == pytest.approx(expected["macro_f1"])
    shown = capsys.readouterr().out
    best = max(TYPE_ROWS, key=lambda name: table[name]["accuracy"])
    winner = next(line for line in shown.splitlines() if line.startswith("best accuracy: ")).split(": ")[1]
    assert table[winner]["accuracy"] == table[best]["accuracy"]


def test_what_each_method_predicted_is_kept(ready_file, runs, tmp_path):
    table = evaluated(ready_file, runs["celltype_atac"], tmp_path)
    by_cell = pd.read_csv(tmp_path / "predicted_val.csv", index_col="barcode")
    cells = read_cells(ready_file, ("rna",))
    rows = cells.rows("val")
    assert list(by_cell.index) == list(cells.obs.index[rows]) and list(by_cell.label) == list(cells.labels().iloc[rows])
    for name in TYPE_ROWS:
        assert (by_cell[name] == by_cell.label).mean() == pytest.approx(table[name]["accuracy"])


def test_the_model_alone_has_the_same_scores(ready_file, runs, tmp_path):
    with_others = evaluated(ready_file, runs["celltype_atac"], tmp_path / "all")
    flags = {"data_path": ready_file, "model_path": runs["celltype_atac"], "split": "val", "device": "cpu"}
    run("evaluate", **flags, model_alone=True, out_path=tmp_path / "alone")
    alone = json.loads((tmp_path / "alone" / "evaluation_val.json").read_text())
    assert not TYPE_ROWS - {"scmomer"} & alone.keys()
    assert alone["scmomer"] == with_others["scmomer"]
    assert alone["embeddings"] == {"scmomer": with_others["embeddings"]["scmomer"]}


def test_baselines_learn_from_the_labels_that_the_model_learned_from(ready_file, runs, tmp_path, monkeypatch):
    """Three labels of a type, the same cells for all; and components from all training cells."""
    run(
        "train_missing_celltype_func",
        **TRAINING | {"data_path": ready_file, "ckpt_dir": tmp_path, "epochs": 1},
        pretrained_model_path=runs["student_atac"],
        model="few",
        labels_per_type=3,
        seed=5,
    )
    cells, seen = read_cells(ready_file, ("rna",)), {}

    def spy(x_train, y_train, *others, **options):
        seen.setdefault("labelled", (x_train, y_train))
        seen["all"] = options["unlabelled"].x
        return majority_class(x_train, y_train)

    monkeypatch.setattr("utils.evaluate.type_baselines.TYPE_BASELINES", {"spy": spy})
    table = evaluated(ready_file, tmp_path / "few", tmp_path)
    assert {"spy", "spy, self-trained", "denoiser + MLP", "denoiser + MLP, self-trained"} < table.keys()
    labels = cells.labels()
    codes = label_codes(labels, sorted(set(labels)))
    few = limit_labels(codes, cells, 3, 5)
    train = cells.rows("train")
    learned = train[few[train] >= 0]
    assert set(pd.Series(seen["labelled"][1]).value_counts()) == {3}
    assert (seen["labelled"][0] != cells.values["rna"][learned]).nnz == 0
    in_order = np.concatenate([learned, np.setdiff1d(train, learned)])
    assert (seen["all"] != cells.values["rna"][in_order]).nnz == 0
    curve = next(r for r in records(tmp_path / "few") if r["phase"] == "train")
    assert curve["step"] == -(-len(learned) // TRAINING["batch_size"] // TRAINING.get("grad_acc", 1))


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_fitted(ready_file, runs, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in ("file", "file/results"):
        flags = {"data_path": ready_file, "model_path": runs["celltype_atac"], "out_path": tmp_path / out}
        line = error_of(capsys, "evaluate", **flags)
        assert "--out_path" in line and "settings tried" not in capsys.readouterr().out


def test_baselines_see_no_test_cell_and_no_more_cells_than_allowed(ready_file, runs, monkeypatch):
    saved, cells = load_model(runs["celltype_atac"], "celltype"), read_cells(ready_file, ("rna",))
    cells.values["rna"] = cells.values["rna"][np.arange(len(cells.obs))]
    held = cells.rows("train")[::4]
    cells.obs["split"] = np.where(np.isin(np.arange(len(cells.obs)), held), "test", cells.obs["split"].astype(str))
    monkeypatch.setattr("utils.predict.score_types.MOST_TRAINING", 40)
    lines, val = [], cells.values["rna"][cells.rows("val")]
    fitted = lambda: fit_baselines(saved, cells, labels, lines.append)
    labels = cells.labels()
    one, unlabelled = fitted()
    n = len(cells.rows("train"))
    assert unlabelled.x.shape[0] == 40 < n and "40 " in lines[0] and f"{n:,}" in lines[0]
    noise = cells.values["rna"].tolil()
    noise[held] = np.random.default_rng(0).random((len(held), noise.shape[1])) * 9
    cells.values["rna"], labels = noise.tocsr(), labels.copy()
    labels.iloc[held] = labels.iloc[held].to_numpy()[::-1]
    other, _ = fitted()
    for name, (estimator, _) in one.items():
        assert (estimator.predict_proba(val) == other[name][0].predict_proba(val)).all(), name


def test_translation(ready_file, runs, missing, tmp_path):
    table = evaluated(ready_file, runs[f"student_{missing}"], tmp_path, "train")
    mean = {"atac": "mean accessibility", "rna": "mean expression"}[missing]
    assert {"scmomer", mean, "mean × depth", "type mean × depth", "nearest neighbours", "ridge on PCA"} < table.keys()
    model, cells, rows, batch = minibatch(ready_file, runs[f"student_{missing}"], other(missing), "train")
    truth = cells.values[missing][rows].toarray()
    with torch.no_grad():
        scores = model.decoders[missing](model.embed(batch)).numpy()
    train = cells.values[missing][cells.rows("train")].toarray()
    ours, mainly = {"atac": ("scmomer, calibrated", "peak_auroc"), "rna": ("scmomer", "rna_mse")}[missing]
    compared = {row["score"]: row for row in table["differences"]}
    low, high = compared[mainly]["difference_95%"]
    theirs = table[compared[mainly]["baseline"]][mainly]
    assert low <= compared[mainly]["difference"] == table[ours][mainly] - theirs <= high
    least, most = table[ours][f"{mainly}_95%"]
    assert least <= table[ours][mainly] <= most
    assert len(table["verdict"]) == len(compared) and "pseudobulk_correlation" in compared
    if missing == "atac":
        assert {"brier", "calibration_error", "peak_auroc_within_depth"} < compared.keys()
        assert table["scmomer"]["cell_auroc"] == pytest.approx(np.nanmean(cell_auroc(truth, scores)), abs=1e-4)
        constant = np.tile(train.mean(0), (len(rows), 1))
        assert table[mean]["cell_auroc"] == pytest.approx(np.nanmean(cell_auroc(truth, constant)), abs=1e-4)
        bulk = 1 / (1 + 5 * np.exp(-scores))
        assert f"{table['scmomer']['n_peaks']} of {train.shape[1]} peaks" in table["rule"]
        assert 0 < table["ridge on PCA"]["peak_auroc_within_depth"] < 1
    else:
        assert table["scmomer"]["rna_mse"] == pytest.approx(np.square(scores - truth).mean(), rel=1e-4)
        assert table[mean]["rna_mse"] == pytest.approx(np.square(train.mean(0) - truth).mean(), rel=1e-4)
        bulk = scores
    types = cells.labels().iloc[rows].to_numpy()
    large = [name for name in np.unique(types) if (types == name).sum() >= 10]
    errors = [np.square((bulk[types == name] - truth[types == name]).mean(0)).mean() for name in large]
    assert len(errors) == 3
    assert table["scmomer"]["pseudobulk_rmse"] == pytest.approx(np.sqrt(np.mean(errors)), rel=1e-3)


def test_translation_of_large_files_is_bounded(ready_file, runs, missing, tmp_path, monkeypatch, capsys):
    """Of more cells or features than allowed, some are drawn, and it says how many; fewer change little."""
    model = runs[f"student_{missing}"]
    every = evaluated(ready_file, model, tmp_path / "every", "train")
    capsys.readouterr()
    n_features = read_cells(ready_file, (missing,)).values[missing].shape[1]
    most = {"MOST_CELLS": 50, "MOST_FEATURES": n_features - 5, "MOST_TRAINING": 40, "MOST_VALIDATION": 9}
    for name, number in most.items():
        monkeypatch.setattr(f"utils.predict.score_translation.{name}", number)
    some = evaluated(ready_file, model, tmp_path / "some", "train")
    lines = [line for line in capsys.readouterr().out.splitlines() if "drawn at random" in line]
    assert [line.split()[0] for line in lines] == [str(number) for number in (50, 40, 9, n_features - 5)]
    assert some["n_cells"] == 50 < every["n_cells"]
    score = {"atac": "cell_auroc", "rna": "rna_mse"}[missing]
    assert some["scmomer"][score] == pytest.approx(every["scmomer"][score], rel=0.2)
    assert some["scmomer"][score] != every["scmomer"][score]
    if missing == "atac":
        assert f"of {n_features - 5} peaks" in some["rule"]


def test_cell_types_do_not_depend_on_the_block(ready_file, runs, tmp_path, monkeypatch):
    """Test cells are read a block at a time."""
    whole = evaluated(ready_file, runs["celltype_atac"], tmp_path / "whole")
    monkeypatch.setattr("utils.predict.score_types.BLOCK", 5)
    blocks = evaluated(ready_file, runs["celltype_atac"], tmp_path / "blocks")
    assert whole["n_cells"] > 5
    for name in TYPE_ROWS:
        assert blocks[name]["accuracy"] == whole[name]["accuracy"], name
        assert blocks[name]["calibration_error"] == pytest.approx(whole[name]["calibration_error"], abs=1e-6), name


def test_labels_of_another_vocabulary(ready_file, runs, tmp_path, capsys):
    flags = {"data_path": ready_file, "model_path": runs["celltype_atac"], "out_path": tmp_path}
    line = error_of(capsys, "evaluate", **flags, split="val", label_column="donor")
    assert lacks(line, "donor", "--label_column", load_model(runs["celltype_atac"], "celltype").outputs[0]) == []
    assert not (tmp_path / "evaluation_val.json").exists()


def test_cells_that_were_split_otherwise_are_noted(raw_file, ready_file, runs, tmp_path, capsys):
    flags = {"model_path": runs["celltype_atac"], "out_path": tmp_path, "split": "val", "model_alone": True}
    other = tmp_path / "other.h5mu"
    run("preprocess", data_path=raw_file, out_path=other, val_fraction=0.2, seed=9)
    for data, notes in ((ready_file, 0), (other, 1)):
        capsys.readouterr()
        run("evaluate", data_path=data, **flags)
        lines = [line for line in capsys.readouterr().out.splitlines() if data.name in line and "split" in line]
        assert len([line for line in lines if str(runs["celltype_atac"]) in line]) == notes


def test_no_cells_of_the_split(ready_file, runs, tmp_path, capsys):
    line = error_of(capsys, "evaluate", data_path=ready_file, model_path=runs["celltype_atac"], out_path=tmp_path)
    assert lacks(line, ready_file.name, "test", "--split") == []


def test_quick_leaves_out_the_networks_that_learn_from_unlabelled_cells(ready_file, runs, tmp_path):
    """The other rows keep their scores."""
    few = {"pretrained_model_path": runs["student_atac"], "ckpt_dir": tmp_path, "model": "few", "labels_per_type": 5}
    run("train_missing_celltype_func", data_path=ready_file, **few, **TRAINING)
    scores = {}
    for name, quick in (("all", {}), ("quick", {"quick": True})):
        out = {"out_path": tmp_path / name, "split": "val", "device": "cpu"}
        run("evaluate", data_path=ready_file, model_path=tmp_path / "few", **out, **quick)
        table = json.loads((tmp_path / name / "evaluation_val.json").read_text())
        scores[name] = {
            row: values for row, values in table.items() if isinstance(values, dict) and row != "embeddings"
        }
    left_out = scores["all"].keys() - scores["quick"].keys()
    assert left_out == {"denoiser + MLP", "MLP, self-trained", "denoiser + MLP, self-trained"}
    assert "logistic regression, self-trained" in scores["quick"]
    assert all(scores["quick"][name] == scores["all"][name] for name in scores["quick"])
