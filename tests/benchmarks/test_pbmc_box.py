"""What the benchmark of the bundled model trains on, and how it chooses."""

import anndata as ad
import numpy as np
import pytest

from benchmarks.lib.box import TARGETS, add_panels, chosen, split_of
from benchmarks.pbmc_box import missed
from tests.builders import make_cells
from tests.helpers import error_of, lacks, run


@pytest.fixture
def ready(tmp_path):
    """60 preprocessed cells of two types, a third without a label."""
    cells = make_cells(n_cells=60)
    cells.obs["cell_type"] = np.tile(["A", "B", np.nan], 20).astype(object)
    cells.obs["cell_type"] = cells.obs["cell_type"].where(cells.obs["cell_type"] != "nan")
    cells.write(tmp_path / "raw.h5ad")
    run("preprocess", data_path=tmp_path / "raw.h5ad", out_path=tmp_path / "ready.h5ad", val_fraction=0.2)
    return tmp_path / "ready.h5ad"


def test_panels_are_copies_of_labelled_training_cells_alone(ready):
    out = ready.with_name("panels.h5ad")
    add_panels(ready, out, seed=0)
    before, after = ad.read_h5ad(ready), ad.read_h5ad(out)
    added = after[before.n_obs :]
    originals = before[[name.removeprefix("panel_") for name in added.obs_names]]
    assert added.n_obs > 20
    assert set(originals.obs["split"]) == {"train"}
    assert originals.obs["cell_type"].notna().all()
    assert list(added.obs["cell_type"]) == list(originals.obs["cell_type"])
    counts, whole = added.layers["counts"].toarray(), originals.layers["counts"].toarray()
    assert ((counts == whole) | (counts == 0)).all()
    assert 0.1 < (counts > 0).sum() / (whole > 0).sum() < 0.6
    totals = (np.exp2(added.X.toarray()) - 1).sum(1)
    np.testing.assert_allclose(totals, 1e4, rtol=1e-3)  # scaled by the sum of the genes that are left
    for part in ("val", "test"):
        assert split_of(out)[part][0].shape == split_of(ready)[part][0].shape


def test_the_better_validation_score_is_chosen_and_missed_targets_are_named():
    rows = {"one": {"accuracy": 0.9, "macro_f1": 0.6}, "other": {"accuracy": 0.85, "macro_f1": 0.8}}
    assert chosen(rows) == "other"
    scores = {"scMomer": {"accuracy": 0.972, "macro_f1": 0.8296}}
    assert missed({"5p": {"scores": scores, "targets": TARGETS["5p"]}}) == []
    scores = {"scMomer": {"accuracy": 0.96, "macro_f1": 0.9}}
    assert missed({"5p": {"scores": scores, "targets": TARGETS["5p"]}}) == ["5p, accuracy: 0.960, LR 0.972"]


def test_a_folder_without_the_data_is_refused(tmp_path, capsys):
    error = error_of(capsys, "benchmarks.pbmc_box", data_path=tmp_path)
    assert not lacks(error, "--data_path", tmp_path, "pbmc_3tech.h5ad")
