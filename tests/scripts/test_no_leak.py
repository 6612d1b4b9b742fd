"""Test cells and hidden labels enter nothing: with anything in their place, every stage ends with the same weights."""

from pathlib import Path

import mudata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from tests.builders import Runs, make_runs, make_teacher
from tests.helpers import TRAINING, assert_same_tensors, run, weights
from utils.cells.labels import label_codes, limit_labels
from utils.cells.preprocessed import read_cells
from utils.files.write import write_whole
from utils.train.model_folder import load_model

MODELS = ("rna", "atac", "multimodal", "student_atac", "student_rna", "celltype_atac", "celltype_rna")
# With the settings that look at cells in ways of their own:
OF_THE_STUDY = ("student_blank", "celltype_few", "celltype_pupil")
LABELS_PER_TYPE = 3
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("no_leak")]  # all stages are trained three times, once for all


def train_study(ready: Path, runs: Runs) -> Runs:
    """Few labels, then pseudo-labels, on a student with the study's settings."""
    folder = runs.folder
    paths, latents = {"data_path": ready, "ckpt_dir": folder}, runs["latents"]
    settings = {"dir_train": latents, "dir_val": latents, "blank_decoders": True, "alone_weight": 20} | TRAINING
    run("pretrain_missing_mod", **paths, model_path=runs["multimodal"], model_name="student_blank", **settings)
    settings = {"labels_per_type": LABELS_PER_TYPE, "feature_dropout": 0.5, "train_student": True, "keep": "last"}
    few = {"pretrained_model_path": runs["student_blank"], "model": "celltype_few"} | settings | TRAINING
    run("train_missing_celltype_func", **paths, **few)
    pupil = few | {"model": "celltype_pupil", "pseudo_labels_from": runs["celltype_few"]}
    run("train_missing_celltype_func", **paths, **pupil)
    return runs


@pytest.fixture(scope="module")
def both(simulation, tmp_path_factory) -> dict[str, Runs]:
    """All stages, once on the simulated cells, once with the test donor's counts and types replaced by noise."""
    found = {}
    for name in ("clean", "poisoned"):
        mdata, folder, rng = simulation.mdata.copy(), tmp_path_factory.mktemp(name), np.random.default_rng(0)
        rows = np.flatnonzero(mdata.obs["donor"] == mdata.obs["donor"].unique()[-1])
        if name == "poisoned":
            for part in mdata.mod.values():
                counts = part.X.toarray()
                counts[rows] = rng.poisson(20, (len(rows), counts.shape[1]))
                part.X = csr_matrix(counts)
            for obs in (mdata.obs, *(part.obs for part in mdata.mod.values())):
                if "cell_type" in obs:
                    kinds = obs["cell_type"].to_numpy().copy()
                    kinds[rows] = np.roll(kinds[rows], 1)
                    obs["cell_type"] = kinds
        write_whole(mdata, folder / "raw.h5mu")
        donor = str(mdata.obs["donor"].iloc[rows[0]])
        split = {"split_by": "donor", "test_groups": donor, "val_fraction": 0.2, "target_sum": "median"}
        run("preprocess", data_path=folder / "raw.h5mu", out_path=folder / "ready.h5mu", **split)
        found[name] = train_study(folder / "ready.h5mu", make_runs(folder / "ready.h5mu", folder))
    return found


def test_the_test_cells_are_poisoned_and_no_others(both):
    clean, poisoned = (read_cells(runs.folder / "ready.h5mu", ("rna", "atac")) for runs in both.values())
    for name in ("rna", "atac"):
        changed = np.asarray((clean.values[name][:] != poisoned.values[name][:]).sum(1)).ravel() > 0
        np.testing.assert_array_equal(changed, clean.obs["split"] == "test")
    assert (clean.labels() != poisoned.labels()).any()
    np.testing.assert_array_equal(clean.obs["split"], poisoned.obs["split"])


@pytest.mark.parametrize("model", MODELS + OF_THE_STUDY)
def test_poisoned_test_cells_change_no_weight(both, model):
    clean, poisoned = (load_model(runs[model], model.split("_")[0]) for runs in both.values())
    assert_same_tensors(weights(clean.path), weights(poisoned.path))
    assert clean.fitted == poisoned.fitted
    assert clean.stamp.get("target_sum") == poisoned.stamp.get("target_sum")


@pytest.fixture(scope="module")
def hidden(both, tmp_path_factory) -> Runs:
    """The teacher and the study again, on the same cells with other labels where --labels_per_type hides them.

    A hidden label that no draw could reach is permuted with the others of its kind; the rest is removed, since it could
    enter the draw as another type.
    """
    folder = tmp_path_factory.mktemp("hidden")
    ready = both["clean"].folder / "ready.h5mu"
    cells, mdata = read_cells(ready, ("rna", "atac")), mudata.read_h5mu(ready)
    labels = cells.labels()
    codes = label_codes(labels, sorted(set(labels)))
    train = cells.rows("train")
    shown = train[limit_labels(codes, cells, LABELS_PER_TYPE, seed=0)[train] >= 0]
    unseen = np.setdiff1d(train, shown)
    draw = pd.util.hash_array(np.asarray([f"0 {barcode}" for barcode in cells.obs.index], dtype=object))
    free = unseen[draw[unseen] > draw[shown].max()]
    changed = labels.astype(object).copy()
    changed.iloc[np.setdiff1d(unseen, free)] = np.nan
    changed.iloc[free] = np.random.default_rng(1).permutation(labels.iloc[free])
    assert (changed.iloc[free] != labels.iloc[free]).sum() >= 5
    for part in (mdata, *mdata.mod.values()):
        if "cell_type" in part.obs:
            part.obs["cell_type"] = pd.Categorical(changed.reindex(part.obs_names))
    write_whole(mdata, folder / "ready.h5mu")
    return train_study(folder / "ready.h5mu", make_teacher(folder / "ready.h5mu", folder))


@pytest.mark.parametrize("model", ["rna", "atac", "multimodal", *OF_THE_STUDY])
def test_hidden_labels_change_no_weight_and_no_threshold(both, hidden, model):
    clean, other = (load_model(runs[model], model.split("_")[0]) for runs in (both["clean"], hidden))
    assert_same_tensors(weights(clean.path), weights(other.path))
    assert clean.fitted == other.fitted


def test_hidden_labels_change_no_prediction(both, hidden, tmp_path):
    tables = []
    for name, runs in (("clean", both["clean"]), ("hidden", hidden)):
        data = {"data_path": runs.folder / "ready.h5mu", "model_path": runs["celltype_pupil"]}
        run("evaluate", **data, out_path=tmp_path / name, device="cpu")
        tables.append(pd.read_csv(tmp_path / name / "predicted_test.csv", index_col="barcode"))
    pd.testing.assert_frame_equal(*tables)
    assert {"scmomer", "logistic regression", "logistic regression, self-trained"} <= set(tables[0])


def test_labels_of_false_pairs_are_used_when_asked_for(both, hidden):
    """What the tests above would show if stage II read labels: with --pair_labels, hidden ones change its weights."""
    found = []
    for runs in (both["clean"], hidden):
        flags = {"data_path": runs.folder / "ready.h5mu", "ckpt_dir": runs.folder, "model_name": "asked"}
        encoders = {"rna_model_path": runs["rna"], "atac_model_path": runs["atac"], "pair_labels": "cell_type"}
        run("pretrain_multimodal", **flags, **encoders, **TRAINING)
        found.append(weights(runs["asked"]))
    assert any((found[0][name] != found[1][name]).any() for name in found[0])


def test_a_model_of_another_split_is_noted(ready_file, raw_file, runs, tmp_path, capsys):
    """Cells that are set aside here may have trained a model that is started from, labels for us, or is evaluated."""
    other = tmp_path / "other.h5mu"
    run("preprocess", data_path=raw_file, out_path=other, val_fraction=0.3)
    flags = TRAINING | {"ckpt_dir": tmp_path, "pretrained_model_path": runs["student_atac"], "epochs": 1}
    flags |= {"labels_per_type": 2, "pseudo_labels_from": runs["celltype_atac"]}
    for path, noted in ((ready_file, 0), (other, 1)):
        capsys.readouterr()
        run("train_missing_celltype_func", **flags, data_path=path, model=f"types_{noted}")
        assert capsys.readouterr().out.count(f"note: {path} has another split") == 2 * noted
        flags_of_evaluation = {"data_path": path, "model_path": runs["celltype_atac"], "split": "val"}
        run("evaluate", **flags_of_evaluation, out_path=tmp_path / "out", model_alone=True)
        assert capsys.readouterr().out.count(f"note: {path} has another split") == noted
