"""--calibrate_across: models without some of the batches, and what is fitted on the cells left out."""

import json
import shutil
from dataclasses import replace

import mudata
import numpy as np
import pytest

from tests.helpers import TRAINING, error_of, lacks, run, weights
from utils.cells.labels import encode_labels
from utils.errors import UserError
from utils.evaluate.across import LeftOut
from utils.evaluate.novelty import fit_novelty
from utils.files.write import write_whole
from utils.predict.left_out import folds_of
from utils.train.cell_types import CELL_TYPES
from utils.train.log import training_folder
from utils.train.model_folder import load_model

FLAGS = TRAINING | {"epochs": 3, "learning_rate": 0.01, "patience": 0}


@pytest.fixture(scope="module")
def ready(ready_file, tmp_path_factory):
    """The shared cells; two of the three types are of one lineage."""
    cells, path = mudata.read_h5mu(ready_file), tmp_path_factory.mktemp("lineages") / "ready.h5mu"
    types = cells.obs["cell_type"]
    cells.obs["lineage"] = np.where(types == sorted(set(types))[0], "one", "other")
    write_whole(cells, path)
    return path


@pytest.fixture(scope="module")
def flags(ready, runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("across")
    return {"data_path": ready, "pretrained_model_path": runs["student_atac"], "ckpt_dir": folder, **FLAGS}


@pytest.fixture(scope="module")
def folders(flags):
    """The same training twice: calibrated on validation cells, and across donors."""
    run("train_missing_celltype_func", **flags, model="plain")
    run("train_missing_celltype_func", **flags, model="across", calibrate_across="donor", label_hierarchy="lineage")
    return flags["ckpt_dir"]


def test_the_model_is_the_same_and_its_constants_are_not(folders):
    plain, across = (load_model(folders / name, "celltype") for name in ("plain", "across"))
    for name, weight in weights(folders / "plain").items():
        np.testing.assert_array_equal(weight, weights(folders / "across")[name])
    assert plain.fitted["sets"]["n_cells"] == 19 and across.fitted["sets"]["n_cells"] == 96
    assert plain.fitted["marker_genes"] == across.fitted["marker_genes"]
    assert "across" not in plain.fitted and not (training_folder(folders / "across") / "left_out").exists()
    measured = across.fitted["across"]
    assert measured["column"] == "donor" and measured["within"]["n_cells"] == 19
    assert sum(row["n_cells"] for row in measured["batches"]) == 96 and measured["across"]["n_cells"] == 96
    for found in (measured["within"], measured["across"], *measured["batches"]):
        assert 0 <= found["set_coverage"] <= 1 <= found["set_size"] <= 3
    assert across.fitted["calibration"]["across"] == "donor"
    assert "novelty" not in plain.fitted | across.fitted  # there are too few validation cells


def test_a_finished_run_is_calibrated_across_batches_later(folders, flags, tmp_path):
    """The same command with --resume and the flags trains the models without a donor, and nothing else."""
    for end in ("", ".training"):
        shutil.copytree(folders / f"plain{end}", tmp_path / f"plain{end}")
    more = {"ckpt_dir": tmp_path, "calibrate_across": "donor", "label_hierarchy": "lineage", "resume": True}
    run("train_missing_celltype_func", **flags | more, model="plain")
    plain, across = (load_model(path, "celltype") for path in (tmp_path / "plain", folders / "across"))
    assert plain.fitted == across.fitted
    for name, weight in weights(folders / "plain").items():
        np.testing.assert_array_equal(weight, weights(tmp_path / "plain")[name])


def test_card_file_and_evaluation_show_coverage_within_and_across(folders, ready, tmp_path, capsys):
    measured = load_model(folders / "across", "celltype").fitted["across"]
    shown = [f"{measured[name]['set_coverage']:.1%}" for name in ("within", "across")]
    assert lacks((folders / "across" / "README.md").read_text(), *shown, "donor", "Hierarchy") == []
    out = tmp_path / "out.h5mu"
    run("predict_cell_type", data_path=ready, model_path=folders / "across", out_path=out, device="cpu")
    entry = mudata.read_h5mu(out).uns["scmomer"]
    assert entry["across_batches"]["across"]["set_coverage"] == measured["across"]["set_coverage"]
    assert list(entry["across_batches"]["batches"]["batch"]) == ["D1", "D2"]
    capsys.readouterr()
    flags = {"model_path": folders / "across", "split": "val", "out_path": tmp_path, "device": "cpu"}
    run("evaluate", data_path=ready, **flags, model_alone=True)
    row = json.loads((tmp_path / "evaluation_val.json").read_text())["scmomer"]
    assert row["set_coverage_within"] == row["set_coverage"] and "set_coverage_across" not in row
    assert 0 <= row["parent_is_a_type"] <= 1 and row["parent_holds"] >= row["set_coverage"]
    assert f"{row['set_coverage_within']:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["nothing", "cell_type", "lineage"])
def test_bad_columns_are_refused_before_training(column, flags, capsys):
    """A missing one, one in which no batches share types, and one whose batch holds all types but one."""
    line = error_of(capsys, "train_missing_celltype_func", **flags, model="bad", calibrate_across=column)
    assert lacks(line, "--calibrate_across", column) == []
    assert not (flags["ckpt_dir"] / "bad").exists()


def test_folds_are_rows_to_leave_out_and_to_score(cells):
    """A type that one batch alone has is left out of its scored cells; missing batches are never left out."""
    codes, _ = encode_labels(cells, "cell_type")
    batch = np.where(codes == 0, "A", np.where(np.arange(len(codes)) % 2, "A", "B")).astype(object)
    batch[:4] = None
    found = dict(zip("AB", folds_of(replace(cells, obs=cells.obs.assign(batch=batch)), codes, "batch"), strict=True))
    for name, (without, scored) in found.items():
        assert list(without) == list(np.flatnonzero(batch == name))
        assert list(scored) == [row for row in without if codes[row] != 0]
    with pytest.raises(UserError, match="two are needed"):
        folds_of(replace(cells, obs=cells.obs.assign(batch="A")), codes, "batch")


def test_thresholds_follow_the_cells_left_out():
    """The model knows its own batch perfectly and is often wrong in others; sets then hold several types."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    sure = 8.0 * np.eye(3)[labels]
    wrong = rng.random(600) < 0.3
    unsure = 8.0 * np.eye(3)[np.where(wrong, (labels + 1) % 3, labels)]
    targets, types = {"cell_type": labels}, ["a", "b", "c"]
    fitted = CELL_TYPES.fit_after_training({"logits": sure}, targets, types)
    left_out = LeftOut("batch", np.repeat(["x", "y"], 300), np.repeat([0, 1], 300), unsure, labels, np.zeros(0))
    across = CELL_TYPES.fit_across(fitted, left_out, {"logits": sure}, targets, types)
    # Logits left out come divided by the temperature within; so the two are multiplied.
    change = CELL_TYPES.fit_after_training({"logits": unsure}, targets, types)["temperature"]
    assert across["temperature"] == pytest.approx(fitted["temperature"] * change) and change > 3
    assert across["across"]["within"]["set_coverage"] == 1 and across["across"]["across"]["set_coverage"] > 0.88
    assert across["across"]["across"]["set_size"] > 1.5
    novel = {"novelty": fit_novelty(rng.normal(size=(50, 4)), rng.normal(size=(50, 4)))}
    left_out.distances = np.linspace(0.5, 0.9, 2000)
    known = CELL_TYPES.fit_across(fitted | novel, left_out, {"logits": sure}, targets, types)["novelty"]
    assert known["n_cells"] == 1000 and known["reference"] == novel["novelty"]["reference"]
    assert 0.5 <= known["held_out"][0] < 0.51 and known["held_out"] == sorted(known["held_out"])
    CELL_TYPES.check(across)


def test_without_validation_cells_no_mixture_is_reported(raw_file, runs, tmp_path):
    run("preprocess", data_path=raw_file, out_path=tmp_path / "ready.h5mu", val_fraction=0)
    flags = FLAGS | {"data_path": tmp_path / "ready.h5mu", "pretrained_model_path": runs["student_atac"]}
    flags |= {"ckpt_dir": tmp_path, "model": "across", "calibrate_across": "donor", "mix_baselines": "auto"}
    run("train_missing_celltype_func", **flags)
    assert not {"mixture", "mixture_gain"} & load_model(tmp_path / "across", "celltype").fitted.keys()
