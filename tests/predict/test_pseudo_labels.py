"""A second fine-tuning learns from all training cells: those without a label take the first model's."""

import shutil

import numpy as np
import pytest

from models.heads import LEAST_DEVIATION
from tests.helpers import CPU, TRAINING, error_of, lacks, records, run, weights
from utils.cells.labels import encode_labels, limit_labels
from utils.cells.minibatches import CellDataset
from utils.errors import UserError
from utils.evaluate.calibration import share_ratios
from utils.evaluate.label_spreading import spread_labels
from utils.predict.infer import InferConfig, Prediction, predict
from utils.predict.pseudo_labels import pseudo_labels
from utils.train.model_folder import load_model

HOW = InferConfig(device="cpu")


@pytest.fixture
def codes(cells):
    """All labels, those of two training cells of a type, and the classes."""
    codes, classes = encode_labels(cells, "cell_type")
    return codes, limit_labels(codes, cells, 2, 0), classes


@pytest.mark.parametrize("missing", ["atac", "rna"])
def test_unlabelled_training_cells_take_what_the_teacher_predicts(cells, codes, runs, missing):
    every, few, classes = codes
    teacher = load_model(runs[f"celltype_{missing}"], "celltype")
    found = pseudo_labels(few, classes, cells, teacher, HOW, CPU)
    train, (name,) = cells.rows("train"), teacher.model_config.inputs
    dataset = CellDataset({name: cells.values[name][train]}, cells.obs.index[train])
    prediction = predict(teacher, dataset, HOW, CPU)
    assert teacher.outputs == classes
    ratios = share_ratios(few[train][few[train] >= 0], every[cells.rows("val")], len(classes))
    corrected = prediction["probability"].astype(float) * ratios
    points = (prediction.embedding - prediction.embedding.mean(0)) / (prediction.embedding.std(0) + LEAST_DEVIATION)
    expected = spread_labels(corrected / corrected.sum(1, keepdims=True), points, few[train]).argmax(1)
    unlabelled = few[train] < 0
    np.testing.assert_array_equal(found[train][unlabelled], expected[unlabelled])
    np.testing.assert_array_equal(found[train][~unlabelled], every[train][~unlabelled])
    others = np.setdiff1d(np.arange(len(every)), train)
    np.testing.assert_array_equal(found[others], few[others])
    assert (few[train] >= 0).sum() == 2 * len(classes) < len(train)


def test_a_type_that_validation_cells_lack_gets_fewer_labels(cells, codes, runs, monkeypatch):
    """Bayes' rule: the types of the validation cells decide what a teacher that knows nothing calls a cell."""
    _, few, classes = codes
    teacher = load_model(runs["celltype_atac"], "celltype")
    points = np.random.default_rng(0).normal(size=(len(cells.rows("train")), 8))
    points[few[cells.rows("train")] >= 0] += 100  # labelled cells are nobody's neighbours
    even = {"probability": np.full((len(points), len(classes)), 1 / len(classes))}
    unsure = lambda *_: Prediction(even, points)
    monkeypatch.setattr("utils.predict.pseudo_labels.predict", unsure)
    for kind in range(len(classes)):
        only = few.copy()
        only[cells.rows("val")] = kind
        found = pseudo_labels(only, classes, cells, teacher, HOW, CPU)
        assert (found[cells.rows("train")][few[cells.rows("train")] < 0] == kind).all()


@pytest.mark.parametrize("n_sure", [1, 3])
def test_types_that_get_no_label_are_named(n_sure, cells, codes, runs, monkeypatch, capsys):
    """A first model that knows one type leaves the others of the validation cells without any label."""
    _, few, classes = codes
    kind = np.arange(len(cells.rows("train"))) % n_sure
    points = np.eye(len(classes))[kind] + 100 * (few[cells.rows("train")] >= 0)[:, None]
    sure = Prediction({"probability": np.eye(len(classes))[kind]}, points)
    monkeypatch.setattr("utils.predict.pseudo_labels.predict", lambda *_: sure)
    pseudo_labels(few, classes, cells, load_model(runs["celltype_atac"], "celltype"), HOW, CPU)
    warning = capsys.readouterr().out.partition("warning: ")[2]
    assert bool(warning) == (n_sure < len(classes)) and lacks(warning, *classes[n_sure:]) == []


def test_where_all_cells_have_a_label_nothing_happens(cells, codes, runs):
    every, _, classes = codes
    teacher = load_model(runs["celltype_atac"], "celltype")
    assert pseudo_labels(every, classes, cells, teacher, HOW, CPU) is every


def test_a_teacher_of_other_cell_types_is_refused(cells, codes, runs):
    _, few, classes = codes
    teacher = load_model(runs["celltype_atac"], "celltype")
    with pytest.raises(UserError, match=classes[0]):
        pseudo_labels(few - 1, classes[1:], cells, teacher, HOW, CPU)


def test_the_pupil_learns_from_all_training_cells(ready_file, runs, cells, tmp_path):
    flags = TRAINING | {"data_path": ready_file, "ckpt_dir": tmp_path, "pretrained_model_path": runs["student_atac"]}
    flags |= {"labels_per_type": 2, "epochs": 1}
    run("train_missing_celltype_func", **flags, model="alone")
    run("train_missing_celltype_func", **flags, model="pupil", pseudo_labels_from=runs["celltype_atac"])
    shutil.copytree(runs["celltype_atac"], tmp_path / "moved")  # a resumed run finds the first model elsewhere
    moved = {"pseudo_labels_from": tmp_path / "moved", "resume": True}
    run("train_missing_celltype_func", **flags, **moved, model="pupil")
    for name, n_cells in (("alone", 6), ("pupil", len(cells.rows("train")))):
        steps = max(record["step"] for record in records(tmp_path / name) if record["phase"] == "train")
        assert steps == -(-n_cells // TRAINING["batch_size"])
    pupil = load_model(tmp_path / "pupil", "celltype")
    assert pupil.parents["pseudo_labels"] == load_model(runs["celltype_atac"], "celltype").hash
    alone = weights(tmp_path / "alone")
    assert any((tensor != alone[name]).any() for name, tensor in weights(tmp_path / "pupil").items())


def test_a_teacher_that_reads_the_other_modality_is_refused(ready_file, runs, tmp_path, capsys):
    flags = TRAINING | {"data_path": ready_file, "ckpt_dir": tmp_path, "pretrained_model_path": runs["student_atac"]}
    flags |= {"model": "pupil", "labels_per_type": 2, "pseudo_labels_from": runs["celltype_rna"]}
    error = error_of(capsys, "train_missing_celltype_func", **flags)
    assert "celltype_rna" in error and "ATAC" in error
    assert not (tmp_path / "pupil").exists()
