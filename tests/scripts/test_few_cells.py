"""Fine-tuning where some types have hardly any cells, and prediction by what came of it."""

import json

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest

from tests.helpers import TRAINING, run
from utils.files.write import write_whole


def keep(cells: mudata.MuData, split: str, per_type: dict[str, int]) -> np.ndarray:
    """[cells] bool: at most so many cells of each type in a split, all cells of other splits."""
    obs, kept = cells.obs, np.ones(cells.n_obs, dtype=bool)
    for name, n in per_type.items():
        rows = np.flatnonzero((obs["cell_type"] == name) & (obs["split"] == split))
        kept[rows[n:]] = False
    return kept


@pytest.mark.parametrize("case", ["a type of one cell", "fewer validation cells than types", "no validation cell"])
def test_few_cells(case, ready_file, runs, simulation, tmp_path, capsys):
    cells = mudata.read_h5mu(ready_file)
    types = sorted(cells.obs["cell_type"].dropna().unique())
    limits = {
        "a type of one cell": keep(cells, "train", {types[0]: 1}) & keep(cells, "val", {types[0]: 0}),
        "fewer validation cells than types": keep(cells, "val", dict.fromkeys(types, 0) | {types[0]: 1}),
        "no validation cell": keep(cells, "val", dict.fromkeys(types, 0)),
    }
    write_whole(cells[limits[case]].copy(), tmp_path / "few.h5mu")
    how = {"pretrained_model_path": runs["student_atac"], "ckpt_dir": tmp_path, "model": "few"}
    run("train_missing_celltype_func", data_path=tmp_path / "few.h5mu", **how, **TRAINING)
    saved = json.loads((tmp_path / "few" / "config.json").read_text())
    assert saved["outputs"] == types
    fitted = saved["fitted"]
    assert fitted["temperature"] >= 1 if case != "a type of one cell" else fitted["temperature"] > 0
    assert ("sets" in fitted) == (case == "a type of one cell")

    write_whole(simulation.mdata["rna"][:12].copy(), tmp_path / "query.h5ad")
    capsys.readouterr()
    out = {"out_path": tmp_path / "out.h5ad", "device": "cpu"}
    run("predict_cell_type", data_path=tmp_path / "query.h5ad", model_path=tmp_path / "few", **out)
    obs = ad.read_h5ad(tmp_path / "out.h5ad").obs
    assert set(obs["predicted_cell_type"]) <= set(types)
    assert obs["confidence"].between(0, 1).all()
    assert ("prediction_set" in obs) == ("sets" in fitted)
    if "sets" not in fitted:
        assert "prediction_set" in capsys.readouterr().out  # says that it is left out
    assert pd.read_csv(tmp_path / "out.predicted.csv", comment="#")["barcode"].tolist() == list(obs.index)
