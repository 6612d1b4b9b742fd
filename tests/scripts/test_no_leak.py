"""Test cells enter nothing: whatever is put in their place, every stage ends with the same weights."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from tests.conftest import Runs, make_runs
from tests.helpers import assert_same_tensors, run, weights
from utils.data.read import read_cells
from utils.data.write import write_whole
from utils.train.checkpoint import load_model

MODELS = ("rna", "atac", "multimodal", "student_atac", "student_rna", "celltype_atac", "celltype_rna")


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
        found[name] = make_runs(folder / "ready.h5mu", folder)
    return found


def test_the_test_cells_are_poisoned_and_no_others(both):
    clean, poisoned = (read_cells(runs.folder / "ready.h5mu", ("rna", "atac")) for runs in both.values())
    for name in ("rna", "atac"):
        changed = np.asarray((clean.values[name][:] != poisoned.values[name][:]).sum(1)).ravel() > 0
        np.testing.assert_array_equal(changed, clean.obs["split"] == "test")
    assert (clean.labels() != poisoned.labels()).any()
    np.testing.assert_array_equal(clean.obs["split"], poisoned.obs["split"])


@pytest.mark.parametrize("model", MODELS)
def test_poisoned_test_cells_change_no_weight(both, model):
    clean, poisoned = (load_model(runs[model], model.split("_")[0]) for runs in both.values())
    assert_same_tensors(weights(clean.path), weights(poisoned.path))
    assert clean.temperature == poisoned.temperature
    assert clean.stamp.get("target_sum") == poisoned.stamp.get("target_sum")
