"""benchmarks.novelty: scores of a hidden type, from a model folder and its cells."""

import shutil

import anndata as ad
import mudata
import numpy as np
import pytest

from benchmarks.novelty import scores


@pytest.fixture
def folder(ready_file, runs, tmp_path):
    """The cells of the shared simulation, one of whose types is hidden, beside a model."""
    cells = mudata.read_h5mu(ready_file)
    rna, types = cells.mod["rna"], cells.obs["cell_type"].astype(object)
    obs = cells.obs.assign(without_0=types.where(types != sorted(set(types))[0]))
    out = ad.AnnData(rna.X, obs=obs, var=rna.var, layers=dict(rna.layers), uns={"scmomer": cells.uns["scmomer"]})
    # More validation cells, since half of them are compared with the other half.
    train = np.flatnonzero(out.obs["split"] == "train")
    out.obs["split"] = out.obs["split"].astype(str)
    out.obs.iloc[train[::2], out.obs.columns.get_loc("split")] = "val"
    out.write(tmp_path / "ready.h5ad")
    shutil.copytree(runs["celltype_atac"], tmp_path / "without_0")
    return tmp_path


def test_every_score_of_a_hidden_type(folder):
    found = scores(folder, 0)
    assert {"neighbours", "mahalanobis", "max probability", "energy", "found", "false alarms"} <= found.keys()
    assert all(0 <= value <= 1 for value in found.values())
    assert found == scores(folder, 0)
