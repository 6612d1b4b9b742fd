"""Test cells enter nothing: whatever is put in their place, every stage ends with the same weights."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from tests.conftest import Runs, make_runs
from tests.helpers import TRAINING, assert_same_tensors, run, weights
from utils.data.read import read_cells
from utils.data.write import write_whole
from utils.train.checkpoint import load_model

MODELS = ("rna", "atac", "multimodal", "student_atac", "student_rna", "celltype_atac", "celltype_rna")
# With the settings that look at cells in ways of their own:
OF_THE_STUDY = ("student_blank", "celltype_few", "celltype_pupil")


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
        found[name] = runs = make_runs(folder / "ready.h5mu", folder)
        paths, latents = {"data_path": folder / "ready.h5mu", "ckpt_dir": folder}, runs["latents"]
        settings = {"dir_train": latents, "dir_val": latents, "blank_decoders": True, "alone_weight": 20} | TRAINING
        run("pretrain_missing_mod", **paths, model_path=runs["multimodal"], model_name="student_blank", **settings)
        settings = {"labels_per_type": 3, "feature_dropout": 0.5, "train_student": True, "keep": "last"} | TRAINING
        few = {"pretrained_model_path": runs["student_blank"], "model": "celltype_few"}
        run("train_missing_celltype_func", **paths, **few, **settings)
        pupil = few | {"model": "celltype_pupil", "pseudo_labels_from": runs["celltype_few"]}
        run("train_missing_celltype_func", **paths, **pupil, **settings)
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
    assert clean.temperature == poisoned.temperature
    assert clean.stamp.get("target_sum") == poisoned.stamp.get("target_sum")
