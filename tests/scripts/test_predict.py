"""What predict_cell_type.py writes, and what it leaves alone."""

import json
import shutil
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from tests.formats import FORMATS
from tests.helpers import error_of, lacks, run
from utils import __version__
from utils.cells.preprocessed import read_cells
from utils.evaluate.calibration import ENOUGH_CELLS
from utils.files.write import write_whole
from utils.train.folders import MANIFEST, file_hash
from utils.train.model_folder import load_model

COLUMNS = ["predicted_cell_type", "confidence", "second_cell_type", "margin", "prediction_set", "agreement"]
MEASURED = ["rna_measured", "atac_measured"]
MATRICES = ["X_scmomer", "X_scmomer_rna", "X_scmomer_atac", "cell_type_probability"]
PLACES = [f"obs['{name}']" for name in COLUMNS + MEASURED] + [f"obsm['{name}']" for name in MATRICES]


def forge(model, folder, change) -> None:
    """A copy of a model folder after `change(copy)`, with a manifest that fits."""
    shutil.copytree(model, folder)
    change(folder)
    names = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({name: file_hash(folder / name) for name in names}))


def test_the_file_says_what_made_it(query, runs, capsys):
    model = runs["celltype_atac"]
    run("predict_cell_type", data_path=query, model_path=model, device="cpu")
    saved, entry = load_model(model, "celltype"), ad.read_h5ad(query.with_name("query.predicted.h5ad")).uns["scmomer"]
    assert (entry["model"], entry["model_hash"], entry["scmomer_version"]) == (model.name, saved.hash, __version__)
    assert entry["command"].startswith("predict_cell_type.py --data_path ")
    assert entry["temperature"] == saved.fitted["temperature"] > 0
    assert entry["rna_coverage"] == entry["rna_count_coverage"] == 1
    assert (entry["n_labelled"], entry["n_unassigned"]) == (40, 0)
    assert list(entry["written"]) == PLACES
    n_cells = saved.fitted["calibration"]["n_cells"]
    assert n_cells < ENOUGH_CELLS  # a fifth of 96 cells: so few are not called calibrated
    shown = capsys.readouterr().out
    for text in (shown, entry["calibration"], (model / "README.md").read_text()):
        assert "not calibrated" in text and f"{n_cells} labelled" in text


def test_predictions_of_an_earlier_run_are_replaced_and_nothing_else_is(query, runs, capsys):
    first, second = query.with_name("first.h5ad"), query.with_name("second.h5ad")
    run("predict_cell_type", data_path=query, model_path=runs["celltype_atac"], out_path=first, device="cpu")
    capsys.readouterr()
    run("predict_cell_type", data_path=first, model_path=runs["celltype_atac"], out_path=second, device="cpu")
    assert lacks(capsys.readouterr().out, "earlier predictions", "model celltype_atac") == []
    once, twice = ad.read_h5ad(first), ad.read_h5ad(second)
    pd.testing.assert_frame_equal(once.obs, twice.obs)
    np.testing.assert_array_equal(once.obsm["X_scmomer"], twice.obsm["X_scmomer"])
    run(
        "predict_cell_type",
        data_path=first,
        model_path=runs["celltype_atac"],
        out_path=second,
        prefix="b_",
        device="cpu",
    )
    both = ad.read_h5ad(second)
    columns = COLUMNS + MEASURED
    assert set(both.obs) == {"donor", *columns, *(f"b_{name}" for name in columns)}
    others = {"X_b_scmomer", "X_b_scmomer_rna", "X_b_scmomer_atac", "b_cell_type_probability"}
    assert set(both.obsm) == {*MATRICES, *others}
    assert {"scmomer", "b_scmomer"} <= set(both.uns)


@pytest.mark.parametrize("place", PLACES)
def test_a_users_own_columns_are_never_replaced(place, query, runs, capsys):
    cells = ad.read_h5ad(query)
    kind, name = place[:-2].split("['")
    getattr(cells, kind)[name] = np.arange(40.0).reshape((40,) if kind == "obs" else (40, 1))
    cells.write(query)
    flags = {"data_path": query, "model_path": runs["celltype_atac"], "device": "cpu"}
    line = error_of(capsys, "predict_cell_type", **flags)
    assert place in line and "--prefix" in line and "query.h5ad" in line
    assert not query.with_name("query.predicted.h5ad").exists()
    run("predict_cell_type", **flags, prefix="new_")
    out = ad.read_h5ad(query.with_name("query.predicted.h5ad"))
    np.testing.assert_array_equal(np.ravel(getattr(out, kind)[name]), np.arange(40.0))
    assert out.obs["new_confidence"].notna().all() and "X_new_scmomer" in out.obsm


def test_a_users_own_uns_entry_is_kept(query, runs):
    cells = ad.read_h5ad(query)
    cells.uns["scmomer"] = "foo"
    cells.write(query)
    run("predict_cell_type", data_path=query, model_path=runs["celltype_atac"], device="cpu")
    out = ad.read_h5ad(query.with_name("query.predicted.h5ad"))
    assert out.uns["scmomer_before"] == "foo" and out.uns["scmomer"]["model"] == "celltype_atac"


def test_a_preprocessed_file_stays_one_after_prediction(ready_file, runs, tmp_path):
    out = tmp_path / "out.h5mu"
    for data in (ready_file, out):  # also over its own predictions
        run("predict_cell_type", data_path=data, model_path=runs["celltype_atac"], out_path=tmp_path / "new.h5mu")
        shutil.move(tmp_path / "new.h5mu", out)
    before, after = read_cells(ready_file, ("rna", "atac")), read_cells(out, ("rna", "atac"))
    assert before.stamp == after.stamp
    assert mudata.read_h5mu(out).uns["scmomer"]["model"] == "celltype_atac"


def test_types_stand_in_each_modality_of_paired_cells(simulation, runs, tmp_path):
    write_whole(simulation.mdata, tmp_path / "pairs.h5mu")
    run("predict_cell_type", data_path=tmp_path / "pairs.h5mu", model_path=runs["celltype_atac"], device="cpu")
    out = mudata.read_h5mu(tmp_path / "pairs.predicted.h5mu")
    for part in out.mod.values():
        expected = out.obs.loc[part.obs_names, "predicted_cell_type"]
        assert list(part.obs["predicted_cell_type"]) == list(expected)
        assert np.isfinite(part.obsm["X_scmomer"]).all()


def test_tables_of_one_name_do_not_share_an_output(simulation, runs, tmp_path):
    rna = simulation.mdata["rna"][:12].copy()
    rna.write(tmp_path / "a.h5ad")
    pd.DataFrame(rna.X.toarray(), rna.obs_names, rna.var_names).to_csv(tmp_path / "a.csv")
    for name in ("a.h5ad", "a.csv"):
        run("predict_cell_type", data_path=tmp_path / name, model_path=runs["celltype_atac"], device="cpu")
    assert {path.name for path in tmp_path.glob("*.predicted.h5ad")} == {"a.predicted.h5ad", "a.csv.predicted.h5ad"}


def test_the_folder_that_one_is_in_can_be_labelled(simulation, runs, tmp_path, monkeypatch):
    """The output lies beside the folder, under its name."""
    folder = FORMATS["10x folder v3"](simulation.mdata["rna"][:12].copy(), tmp_path)
    monkeypatch.chdir(folder)
    run("predict_cell_type", data_path=".", model_path=Path(runs["celltype_atac"]).resolve(), device="cpu")
    assert (tmp_path / f"{folder.name}.predicted.h5ad").is_file()


@pytest.mark.parametrize("prefix", ["a/b", "new line\n", "x" * 51])
def test_a_prefix_is_part_of_a_name(prefix, query, runs, capsys):
    line = error_of(capsys, "predict_cell_type", data_path=query, model_path=runs["celltype_atac"], prefix=prefix)
    assert "--prefix" in line


def test_a_model_of_simulated_cells_says_so(query, runs, tmp_path, capsys):
    def simulated(folder):
        config = json.loads((folder / "config.json").read_text())
        config["preprocessing"]["simulated"] = True
        (folder / "config.json").write_text(json.dumps(config))

    forge(runs["celltype_atac"], tmp_path / "model", simulated)
    run("predict_cell_type", data_path=query, model_path=tmp_path / "model", device="cpu")
    assert "simulated cells" in capsys.readouterr().out
    assert ad.read_h5ad(query.with_name("query.predicted.h5ad")).uns["scmomer"]["trained_on_simulated_cells"]


def test_no_label_comes_from_values_that_are_not_finite(query, runs, tmp_path, capsys):
    """Finite weights whose product is not: every cell would get the first type."""

    def huge(folder):
        state = load_file(folder / "model.safetensors")
        state["head.layers.1.weight"] = state["head.layers.1.weight"] * 1e38
        state["head.layers.4.weight"] = state["head.layers.4.weight"] * 1e38
        save_file(state, folder / "model.safetensors")

    forge(runs["celltype_atac"], tmp_path / "model", huge)
    line = error_of(capsys, "predict_cell_type", data_path=query, model_path=tmp_path / "model", device="cpu")
    assert "not finite" in line and ad.read_h5ad(query).obs_names[0] in line
    assert not query.with_name("query.predicted.h5ad").exists()
