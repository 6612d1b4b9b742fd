"""From raw counts to model-ready cells: the functions, and preprocess.py as a whole."""

import json
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from tests.helpers import error_of, lacks, run
from utils.cells.labels import encode_labels
from utils.cells.preprocessed import STAMP, read_cells
from utils.errors import UserError
from utils.features import normalise as prepare
from utils.features.peaks import format_peaks, genome_order, parse_peaks
from utils.train.folders import file_hash

COUNTS = np.array([[3, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 7]], dtype=np.float32)


def by_formula(counts: np.ndarray, target_sum: float) -> np.ndarray:
    """log2(1 + target · c / total), 0 for cells without counts."""
    return np.log2(1 + target_sum * counts / np.maximum(counts.sum(1, keepdims=True), 1))


# Functions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_sum", [1e4, 250.0])
def test_normalisation_is_the_formula(target_sum):
    counts = csr_matrix(COUNTS)
    normalised = prepare.log_normalise(counts, target_sum)
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(normalised.toarray(), by_formula(COUNTS, target_sum), rtol=1e-5)
    np.testing.assert_array_equal(counts.toarray(), COUNTS)  # the counts are not touched


def test_stored_zeros_are_closed():
    stored = csr_matrix((np.array([0.0, 2.0]), np.array([0, 1]), np.array([0, 2])), shape=(1, 3))
    assert prepare.binarise(stored).indices.tolist() == [1]


def test_binarised_is_one_where_anything_is():
    np.testing.assert_array_equal(prepare.binarise(csr_matrix(COUNTS)).toarray(), (COUNTS > 0).astype(np.float32))


@pytest.mark.parametrize(("text", "expected"), [("1e4", 1e4), ("250", 250.0), ("median", 5.0)])
def test_target_sum(text, expected):
    assert prepare.choose_target_sum(text, np.array([0.0, 4.0, 5.0, 100.0])) == expected


@pytest.mark.parametrize("text", ["mean", "0", "-3", "nan", "inf", ""])
def test_no_target_sum(text):
    with pytest.raises(UserError, match="--target_sum"):
        prepare.choose_target_sum(text, np.ones(3))


# preprocess.py -----------------------------------------------------------------------------------------------------

SPLIT = {"split_by": "donor", "test_groups": "D2"}


def preprocess(content: mudata.MuData | ad.AnnData, folder: Path, **flags) -> mudata.MuData | ad.AnnData:
    """Write, preprocess, read."""
    suffix = ".h5mu" if isinstance(content, mudata.MuData) else ".h5ad"
    content.write(folder / f"in{suffix}")
    run("preprocess", data_path=folder / f"in{suffix}", out_path=folder / f"out{suffix}", **flags)
    return (mudata.read_h5mu if suffix == ".h5mu" else ad.read_h5ad)(folder / f"out{suffix}")


@pytest.fixture
def mdata(simulation) -> mudata.MuData:
    return simulation.mdata.copy()


def test_values_counts_and_stamp(mdata, tmp_path):
    out = preprocess(mdata, tmp_path, **SPLIT, val_fraction=0.2, seed=3)
    counts = {name: mdata[name][:, out[name].var_names].X.toarray() for name in ("rna", "atac")}
    for name in ("rna", "atac"):
        assert list(out[name].obs_names) == list(mdata.obs_names)
        np.testing.assert_array_equal(out[name].layers["counts"].toarray(), counts[name])
        assert (out[name].obs["split"] == out.obs["split"]).all()
    np.testing.assert_allclose(out["rna"].X.toarray(), by_formula(counts["rna"], 1e4), rtol=1e-5)
    np.testing.assert_array_equal(out["atac"].X.toarray(), counts["atac"] > 0)
    stamp = json.loads(out.uns[STAMP])
    assert (stamp["target_sum"], stamp["log_base"], stamp["species"], stamp["label_column"]) == (
        1e4,
        2,
        "human",
        "cell_type",
    )
    assert stamp["split"] == {"split_by": "donor", "test_groups": "D2", "val_fraction": 0.2, "seed": 3}
    assert stamp["source"] == [{"name": "in.h5mu", "sha256": file_hash(tmp_path / "in.h5mu")}]
    assert (out.obs["cell_type"] == mdata.obs["cell_type"]).all()


def test_split_in_the_file(mdata, tmp_path):
    obs = preprocess(mdata, tmp_path, **SPLIT, val_fraction=0.2).obs
    assert ((obs["split"] == "test") == (obs["donor"] == "D2")).all()
    others = obs[obs["donor"] != "D2"]
    share = others.groupby("cell_type", observed=True)["split"].agg([lambda s: (s == "val").sum(), len])
    assert [tuple(row) for row in share.to_numpy()] == [(round(0.2 * n), n) for n in share.iloc[:, 1]]


def test_same_seed_same_file_other_seed_other_split(mdata, tmp_path):
    first, again, other = (preprocess(mdata, tmp_path, val_fraction=0.3, seed=seed).obs["split"] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_columns_of_any_order_give_the_same_peaks(mdata, tmp_path):
    expected = preprocess(mdata, tmp_path)["atac"]
    shuffled = mdata["atac"][:, np.random.default_rng(0).permutation(mdata["atac"].n_vars)].copy()
    assert list(shuffled.var_names) != list(expected.var_names)
    out = preprocess(shuffled, tmp_path)
    assert list(out.var_names) == list(expected.var_names)
    intervals = parse_peaks(out.var_names, None)
    assert (genome_order(intervals) == np.arange(len(intervals))).all()
    assert list(format_peaks(intervals)) == list(out.var_names)
    assert (out.layers["counts"] != expected.layers["counts"]).nnz == 0
    assert (out.X != expected.X).nnz == 0


def test_median_is_of_training_cells_alone(mdata, tmp_path):
    flags = SPLIT | {"target_sum": "median", "val_fraction": 0.3}
    before = preprocess(mdata, tmp_path, **flags)
    is_test, is_train = (before.obs["split"] == "test").to_numpy(), (before.obs["split"] == "train").to_numpy()
    totals = mdata["rna"].X.sum(1).A1
    expected = float(np.median(totals[is_train]))
    assert expected not in (float(np.median(totals)), float(np.median(totals[~is_test])))
    assert json.loads(before.uns[STAMP])["target_sum"] == expected
    changed = mdata["rna"].X.toarray()
    changed[~is_train] *= 7
    mdata["rna"].X = csr_matrix(changed)
    after = preprocess(mdata, tmp_path, **flags)
    assert json.loads(after.uns[STAMP])["target_sum"] == expected
    assert (before["rna"].X[is_train] != after["rna"].X[is_train]).nnz == 0


def test_simulated_cells_are_said_to_be(mdata, tmp_path):
    assert json.loads(preprocess(mdata, tmp_path).uns[STAMP])["simulated"] is True
    del mdata["rna"].uns["scmomer_simulated"]
    assert json.loads(preprocess(mdata["rna"].copy(), tmp_path).uns[STAMP])["simulated"] is False


def test_what_names_no_cell_type_is_missing(mdata, tmp_path, capsys):
    rna = mdata["rna"].copy()
    words = ["unassigned"] * 5 + [""] * 4 + [None] * 3 + ["NA"] * 2
    rna.obs["cell_type"] = pd.Categorical([*words, *rna.obs["cell_type"].astype(str)[14:]])
    types = sorted(set(rna.obs["cell_type"][14:]))
    out = preprocess(rna, tmp_path, val_fraction=0.3)
    text = capsys.readouterr().out
    assert lacks(text, f"{len(types)} cell types in cell_type", "14 cells") == []
    for word in ("5 'unassigned'", "4 ''", "2 'NA'"):
        assert word in text
    assert sorted(out.obs["cell_type"].cat.categories) == types
    assert out.obs["cell_type"].isna().tolist() == [True] * 14 + [False] * 82
    assert read_cells(tmp_path / "out.h5ad", ("rna",)).codes("cell_type", "--label_column")[:14].tolist() == [-1] * 14


@pytest.mark.parametrize("kind", ["measured", "many numbers", "names of cells", "fractions of a category"])
def test_columns_that_are_hardly_cell_types_are_refused(kind, mdata, tmp_path, capsys):
    rna, rng = mdata["rna"].copy(), np.random.default_rng(0)
    values = {
        "measured": rng.normal(size=96),
        "many numbers": rng.permutation(96),
        "names of cells": [f"cell {i}" for i in range(96)],
        "fractions of a category": pd.Categorical(np.arange(96) % 8 / 3),
    }[kind]
    rna.obs["age"] = values
    rna.write(tmp_path / "in.h5ad")
    flags = {"data_path": tmp_path / "in.h5ad", "out_path": tmp_path / "out.h5ad", "label_column": "age"}
    line = error_of(capsys, "preprocess", **flags)
    assert lacks(line, f"{tmp_path / 'in.h5ad'}: ", "obs['age']", "--any_labels") == []
    with pytest.raises(SystemExit):
        run("preprocess", **flags, check=True)
    assert "--any_labels" in capsys.readouterr().out
    run("preprocess", **flags, any_labels=True)
    assert json.loads(ad.read_h5ad(tmp_path / "out.h5ad").uns[STAMP])["label_column"] == "age"


def test_a_column_that_preprocessing_did_not_see_is_looked_at_in_training(mdata, tmp_path):
    mdata["rna"].obs["age"] = np.arange(96) / 3
    preprocess(mdata["rna"].copy(), tmp_path)
    with pytest.raises(UserError, match="--any_labels"):
        encode_labels(read_cells(tmp_path / "out.h5ad", ("rna",)), "age")


@pytest.mark.parametrize("number", [int, float, str])
def test_numbers_of_clusters_are_cell_types(number, mdata, tmp_path, capsys):
    rna = mdata["rna"].copy()
    rna.obs["leiden"] = [number(i % 8) for i in range(96)]
    out = preprocess(rna, tmp_path, label_column="leiden")
    assert "8 cell types in leiden" in capsys.readouterr().out
    assert (out.obs["leiden"].astype(str) == rna.obs["leiden"].astype(str)).all()


def test_types_that_a_split_leaves_without_cells_are_named(mdata, tmp_path, capsys):
    """B is in the test donor alone; of NK two cells are left, too few for validation."""
    rna = mdata["rna"].copy()
    is_test = (rna.obs["donor"] == "D2").to_numpy()
    kinds = np.where(np.arange(96) % 2, "T", "M").astype(object)
    kinds[np.flatnonzero(is_test)[:5]], kinds[np.flatnonzero(~is_test)[:2]] = "B", "NK"
    rna.obs["cell_type"] = pd.Categorical(kinds)
    preprocess(rna, tmp_path, **SPLIT)
    text = capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("preprocess", data_path=tmp_path / "in.h5ad", **SPLIT, json=True)
    for lines in (text, "\n".join(json.loads(capsys.readouterr().out)["notes"])):
        assert lacks(lines, "1 of 4 cell types", "training cell", "B (5)", "validation cell", "NK (2)") == []


@pytest.mark.parametrize("modality", ["rna", "atac"])
def test_a_file_of_one_modality(mdata, tmp_path, modality):
    out = preprocess(mdata[modality], tmp_path)
    assert isinstance(out, ad.AnnData)
    np.testing.assert_array_equal(out.layers["counts"].toarray(), mdata[modality][:, out.var_names].X.toarray())
    cells = read_cells(tmp_path / "out.h5ad", (modality,))
    assert list(cells.values) == [modality]
    assert set(cells.obs["split"]) == {"train", "val"}


def test_counts_beside_a_normalised_x_are_used(mdata, tmp_path):
    rna = mdata["rna"]
    expected = preprocess(rna, tmp_path)
    rna.layers["counts"] = rna.X.copy()
    rna.X = prepare.log_normalise(rna.X, 1e4)
    out = preprocess(rna, tmp_path)
    assert (out.X != expected.X).nnz == 0


def test_cells_without_counts_are_left_out_of_their_modality(mdata, tmp_path):
    values = mdata["rna"].X.toarray()
    values[[0, 5]] = 0
    mdata["rna"].X = csr_matrix(values)
    out = preprocess(mdata, tmp_path)
    kept = np.delete(mdata.obs_names.to_numpy(), [0, 5])
    assert list(out["rna"].obs_names) == list(kept)
    assert list(out["atac"].obs_names) == list(mdata.obs_names)
    assert list(read_cells(tmp_path / "out.h5mu", ("rna", "atac")).obs.index) == list(kept)
    assert len(read_cells(tmp_path / "out.h5mu", ("atac",)).obs) == 96


def test_cells_measured_in_one_modality_only(mdata, tmp_path):
    part = mudata.MuData({"rna": mdata["rna"][:60].copy(), "atac": mdata["atac"][40:].copy()})
    out = preprocess(part, tmp_path, **SPLIT)
    assert len(out.obs) == 96
    assert list(read_cells(tmp_path / "out.h5mu", ("rna", "atac")).obs.index) == list(mdata.obs_names[40:60])
    for name, rows in (("rna", slice(60)), ("atac", slice(40, None))):
        cells = read_cells(tmp_path / "out.h5mu", (name,))
        assert list(cells.obs.index) == list(mdata.obs_names[rows])
        assert ((cells.obs["split"] == "test") == (mdata.obs["donor"] == "D2").to_numpy()[rows]).all()


def test_files_without_labels(mdata, tmp_path):
    del mdata["rna"].obs["cell_type"]
    cells_of = preprocess(mdata["rna"], tmp_path)
    assert json.loads(cells_of.uns[STAMP])["label_column"] is None
    cells = read_cells(tmp_path / "out.h5ad", ("rna",))
    assert cells.labels() is None
    with pytest.raises(UserError, match=r"--pair_labels kind: .*out\.h5ad"):
        cells.codes("kind", "--pair_labels")


def test_a_finished_file_is_not_preprocessed_again(ready_file, tmp_path, capsys):
    line = error_of(capsys, "preprocess", data_path=ready_file, out_path=tmp_path / "out.h5mu")
    assert f"{ready_file}: " in line and "preprocessed" in line
    assert not list(tmp_path.iterdir())


def test_a_target_sum_that_leaves_few_bins_is_advised_against(raw_file, tmp_path, capsys):
    """Also by preprocess.py itself, not by its doctor alone."""
    for target_sum, is_coarse in ((1e5, True), (100, False)):
        flags = {"data_path": raw_file, "target_sum": target_sum}
        run("preprocess", **flags, out_path=tmp_path / f"{target_sum}.h5mu")
        assert ("consider --target_sum" in capsys.readouterr().out) == is_coarse
