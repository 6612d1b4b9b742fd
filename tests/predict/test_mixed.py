"""Cells with RNA, ATAC or both in one file: the first folder that can read a cell labels it, as it would alone."""

import json

import mudata
import numpy as np
import pandas as pd
import pytest

from tests.evaluate.test_label_report import flat_umap  # noqa: F401
from tests.helpers import TRAINING, error_of, lacks, run
from tests.scripts.test_predict import COLUMNS, MATRICES, MEASURED, forge
from utils.files.write import write_whole
from utils.predict.label import annotate


@pytest.fixture(scope="module")
def models(ready_file, runs, tmp_path_factory) -> dict:
    """Folders that read both modalities, RNA and ATAC."""
    where = tmp_path_factory.mktemp("models")
    run(
        "train_missing_celltype_func",
        data_path=ready_file,
        ckpt_dir=where,
        pretrained_model_path=runs["multimodal"],
        other_modality="measured",
        model="both",
        **TRAINING,
    )
    return {"both": where / "both", "rna": runs["celltype_atac"], "atac": runs["celltype_rna"]}


@pytest.fixture(scope="module")
def mixed(simulation, tmp_path_factory):
    """30 cells with both modalities, 20 with RNA alone, 25 with ATAC alone; two without counts in their RNA."""
    rna, atac = simulation.mdata["rna"][:50].copy(), simulation.mdata["atac"][20:75].copy()
    counts = rna.X.tolil()
    counts[[3, 25]] = 0  # one has RNA alone, the other both
    rna.X = counts.tocsr()
    path = tmp_path_factory.mktemp("mixed") / "mixed.h5mu"
    write_whole(mudata.MuData({"rna": rna, "atac": atac}), path)
    return path


def label(data, out, *models, **flags) -> mudata.MuData:
    paths = ",".join(map(str, models))
    run("predict_cell_type", data_path=data, model_path=paths, out_path=out, device="cpu", **flags)
    return mudata.read_h5mu(out)


def test_every_cell_is_labelled_by_what_it_has(mixed, models, tmp_path, capsys):
    out = label(mixed, tmp_path / "out.h5mu", *models.values())
    by = out.obs["labelled_by"].astype(str)
    names = {"both": "both", "rna": "celltype_atac", "atac": "celltype_rna"}
    odd = list(out["rna"].obs_names[[3, 25]])
    assert (out.obs.loc[odd, "predicted_cell_type"].astype(str) == ["unassigned", "x"]).tolist() == [True, False]
    assert by[odd].tolist() == [names["rna"], names["atac"]]  # without counts in RNA, its ATAC is read
    expected = {names["both"]: 29, names["rna"]: 20, names["atac"]: 26}
    assert by.value_counts().to_dict() == expected
    shown = capsys.readouterr().out
    assert lacks(shown, "75 of 75 cells are labelled", *(f"{n} by {name}" for name, n in expected.items())) == []
    for kind, model in models.items():
        alone = label(mixed, tmp_path / f"{kind}.h5mu", model)
        mine = (by == names[kind]).to_numpy()
        assert "labelled_by" not in alone.obs
        a, b = (
            x.obs.loc[mine, [*COLUMNS[:2], *COLUMNS[3:4], *MEASURED]].astype({COLUMNS[0]: str}) for x in (out, alone)
        )
        pd.testing.assert_frame_equal(a, b)
        for key in set(MATRICES) & set(alone.obsm):
            np.testing.assert_array_equal(np.asarray(out.obsm[key])[mine], np.asarray(alone.obsm[key])[mine])
        entry = out.uns["scmomer"]["folders"][names[kind]]
        assert entry["model_hash"] == alone.uns["scmomer"]["model_hash"]
        assert entry["n_labelled"] + entry["n_unassigned"] == mine.sum()
    assert out.obs["rna_measured"].sum() == 29 + 19 and out.obs["atac_measured"].sum() == 29 + 26
    assert list(out["atac"].obs["labelled_by"]) == list(out.obs.loc[out["atac"].obs_names, "labelled_by"])
    assert np.isfinite(out.obsm["X_scmomer"]).all()


def test_from_python_and_over_an_earlier_run(mixed, models, tmp_path):
    first = label(mixed, tmp_path / "first.h5mu", *models.values())
    again = label(tmp_path / "first.h5mu", tmp_path / "again.h5mu", *models.values())
    ours = annotate(mudata.read_h5mu(mixed), list(models.values()))
    for other in (again, ours):
        pd.testing.assert_frame_equal(first.obs, other.obs)
        np.testing.assert_array_equal(first.obsm["X_scmomer"], other.obsm["X_scmomer"])
    alone = label(tmp_path / "first.h5mu", tmp_path / "alone.h5mu", models["rna"])
    assert "labelled_by" not in alone.obs and "labelled_by" not in alone["rna"].obs


def test_cells_that_no_folder_reads_are_counted_and_the_flag_is_named(mixed, models, tmp_path, capsys):
    out = label(mixed, tmp_path / "out.h5mu", models["rna"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "no prediction" in line)
    assert lacks(line, "25 of 75 cells", "rna", "--model_path") == []
    assert out.obs["predicted_cell_type"].isna().sum() == 25
    two = label(mixed, tmp_path / "out.h5mu", models["both"], models["rna"])
    assert two.obs["labelled_by"].isna().sum() == 25 == two.obs["predicted_cell_type"].isna().sum()
    assert not two.obs.loc[two.obs["labelled_by"].isna(), MEASURED].to_numpy().any()


def test_a_folder_without_cells_is_passed_over(simulation, models, tmp_path, capsys):
    write_whole(mudata.MuData({"atac": simulation.mdata["atac"][:12].copy()}), tmp_path / "atac.h5mu")
    out = label(tmp_path / "atac.h5mu", tmp_path / "out.h5mu", models["rna"], models["both"], models["atac"])
    assert set(out.obs["labelled_by"]) == {"celltype_rna"}
    write_whole(simulation.mdata[:12].copy(), tmp_path / "pairs.h5mu")
    out = label(tmp_path / "pairs.h5mu", tmp_path / "out.h5mu", models["rna"], models["both"])
    assert set(out.obs["labelled_by"]) == {"celltype_atac"} and out.uns["scmomer"]["folders"]["both"]["n_labelled"] == 0
    flags = {"data_path": tmp_path / "atac.h5mu", "model_path": f"{models['rna']},{models['both']}", "device": "cpu"}
    assert lacks(error_of(capsys, "predict_cell_type", **flags), "atac.h5mu", "--model_path") == []


def test_a_folder_that_is_named_twice_is_refused(mixed, models, capsys):
    flags = {"data_path": mixed, "model_path": f"{models['rna']},{models['rna']}", "device": "cpu"}
    assert "twice" in error_of(capsys, "predict_cell_type", **flags)


def test_folders_with_other_types_are_refused(mixed, models, tmp_path, capsys):
    def rename(folder):
        config = json.loads((folder / "config.json").read_text())
        config["outputs"][0] = "another type"
        (folder / "config.json").write_text(json.dumps(config))

    forge(models["rna"], tmp_path / "other", rename)
    flags = {"data_path": mixed, "model_path": f"{models['both']}, {tmp_path / 'other'}", "device": "cpu"}
    assert lacks(error_of(capsys, "predict_cell_type", **flags), "--model_path", "another type") == []
    assert not list(mixed.parent.glob("*predicted*"))


def test_the_page_names_the_folders(mixed, models, tmp_path):
    paths = ",".join(map(str, models.values()))
    out = tmp_path / "out.predicted.h5mu"
    run("predict_cell_type", data_path=mixed, model_path=paths, out_path=out, device="cpu", report=True)
    page = (tmp_path / "out.report.html").read_text(encoding="utf-8")
    assert lacks(page, "labelled_by", "both, celltype_atac, celltype_rna") == []
