"""preprocess.py --shuffle_pairs: pairs lose what is of the cell, and keep batch, split and depth."""

import json

import mudata
import numpy as np
import pandas as pd
import pytest

from tests.helpers import error_of, run
from utils.cells.preprocessed import STAMP, read_cells
from utils.cells.shuffled import partners


@pytest.fixture
def annotated():
    """200 cells in two batches and three splits, with depths that differ twentyfold."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {"batch": rng.choice(["a", "b"], 200), "split": rng.choice(["train", "val", "test"], 200, p=(0.7, 0.2, 0.1))},
        index=[f"cell{i}" for i in range(200)],
    )
    return obs, rng.integers(50, 1000, 200)


def test_partners_share_batch_split_and_depth_and_serve_once(annotated):
    obs, depth = annotated
    found = partners(obs, "batch", depth)
    assert sorted(found) == list(range(200))
    for column in ("batch", "split"):
        assert (obs[column].to_numpy() == obs[column].to_numpy()[found]).all()
    moved, is_test = found != np.arange(200), (obs.split == "test").to_numpy()
    assert not moved[is_test].any() and moved[(obs.split == "train").to_numpy()].all()
    train = obs[obs.split == "train"]
    for _, cells in train.groupby("batch"):
        rows = obs.index.get_indexer(cells.index)
        decile = np.ceil(pd.Series(depth[rows]).rank(pct=True).to_numpy() * 10)
        theirs = dict(zip(rows, decile, strict=True))
        assert [theirs[i] for i in found[rows]] == decile.tolist()


def test_partners_depend_on_barcodes_and_seed_but_not_on_the_order(annotated):
    obs, depth = annotated
    by_name = dict(zip(obs.index, obs.index[partners(obs, "batch", depth)], strict=True))
    order = np.random.default_rng(1).permutation(200)
    turned = obs.iloc[order]
    assert by_name == dict(zip(turned.index, turned.index[partners(turned, "batch", depth[order])], strict=True))
    assert (partners(obs, "batch", depth, seed=1) != partners(obs, "batch", depth)).any()


def test_the_file_holds_rna_as_it_was_and_the_atac_of_partners(raw_file, tmp_path):
    split = {"split_by": "donor", "test_groups": "D2", "val_fraction": 0.2}
    run("preprocess", data_path=raw_file, out_path=tmp_path / "plain.h5mu", **split)
    run("preprocess", data_path=raw_file, out_path=tmp_path / "control.h5mu", shuffle_pairs="donor", **split)
    plain, control = (read_cells(tmp_path / f"{name}.h5mu", ("rna", "atac")) for name in ("plain", "control"))
    everything = np.arange(len(plain.obs))
    for name in ("rna", "atac"):
        assert plain.features[name].tolist() == control.features[name].tolist()
    assert (plain.values["rna"][everything] != control.values["rna"][everything]).nnz == 0
    before, after = plain.values["atac"][everything], control.values["atac"][everything]
    is_same = np.asarray((before != after).sum(1)).ravel() == 0
    train, test = plain.rows("train"), plain.rows("test")
    assert is_same[test].all() and is_same[train].mean() < 0.2
    open_peaks = lambda matrix, rows: sorted(matrix[row].indices.tolist() for row in rows)
    assert open_peaks(before, train) == open_peaks(after, train)  # each cell's ATAC is there once
    np.testing.assert_array_equal(plain.train_mean("atac"), control.train_mean("atac"))
    assert control.stamp["shuffled_pairs"] == "donor" and "shuffled_pairs" not in plain.stamp
    mdata = mudata.read_h5mu(tmp_path / "control.h5mu")
    counts = mdata["atac"].layers["counts"]
    assert ((counts > 0) != (mdata["atac"].X > 0)).nnz == 0
    assert json.loads(mdata.uns[STAMP])["shuffled_pairs"] == "donor"


def test_what_cannot_be_shuffled_is_refused(raw_file, simulation, tmp_path, capsys):
    assert "--shuffle_pairs nobody" in error_of(
        capsys, "preprocess", data_path=raw_file, out_path=tmp_path / "out.h5mu", shuffle_pairs="nobody"
    )
    alone = tmp_path / "rna.h5ad"
    simulation.mdata["rna"].copy().write_h5ad(alone)
    assert "--shuffle_pairs donor" in error_of(
        capsys, "preprocess", data_path=alone, out_path=tmp_path / "out.h5ad", shuffle_pairs="donor"
    )
