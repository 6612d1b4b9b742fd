"""Explanations: attributions are what removal would change, a planted gene is found, and the check can fail."""

import tracemalloc
from functools import partial

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix, vstack

from tests.builders import gene_names
from tests.helpers import CPU, ENCODER, TRAINING, error_of, run
from tests.scripts.test_trust import trusted  # noqa: F401
from utils.cells.config import IngestConfig
from utils.cells.minibatches import CellDataset
from utils.cells.preprocessed import open_cells
from utils.files.write import write_whole
from utils.predict import explain as module
from utils.predict.explain import (
    ALL,
    CELLS,
    attribute,
    choose_cells,
    explain,
    log_odds,
    random_match,
    self_check,
    take,
    without,
)
from utils.predict.infer import decode
from utils.predict.query import read_query
from utils.train.config import InferConfig
from utils.train.model_folder import load_model

N_TYPES, PER_TYPE = 3, 60
CONFIG = InferConfig(device="cpu")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Path of raw cells in which each type has two loud genes of its own, beside loud genes of all; and their model."""
    folder, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    types = np.arange(N_TYPES * PER_TYPE) % N_TYPES
    counts = rng.poisson(0.3, (len(types), 40))
    counts[:, 20:30] = rng.poisson(30, (len(types), 10))
    for code in range(N_TYPES):
        counts[types == code, 2 * code : 2 * code + 2] = rng.poisson(30, ((types == code).sum(), 2))
    obs = pd.DataFrame({"cell_type": [f"type {i}" for i in types]}, index=[f"cell{i}" for i in range(len(types))])
    cells = ad.AnnData(csr_matrix(counts.astype(np.float32)), obs, pd.DataFrame(index=gene_names()[:40]))
    write_whole(cells, folder / "cells.h5ad")
    ready = {"data_path": folder / "ready.h5ad", "ckpt_dir": folder}
    run("preprocess", data_path=folder / "cells.h5ad", out_path=folder / "ready.h5ad", val_fraction=0.3)
    run("pretrain_rna", **ready, model_name="rna", tokens="expressed", **TRAINING, **ENCODER)
    how = TRAINING | {"epochs": 25, "learning_rate": 0.01, "patience": 0, "trainable_blocks": -1}
    run(
        "train_missing_celltype_func",
        **ready,
        pretrained_model_path=folder / "rna",
        model="celltype",
        other_modality="zeros",
        **how,
    )
    return folder


def read(path, folder):
    """The model, the cells as it reads them, and the number of each cell's predicted type."""
    saved = load_model(folder, "celltype")
    with open_cells(str(path), None, None) as file:
        dataset = read_query(file, saved, IngestConfig()).dataset()
    _, decoded = decode(saved, dataset, CONFIG, CPU, "test")
    return saved, dataset, decoded["logits"].argmax(1)


def own_genes(name: str) -> set[str]:
    """The planted genes of a type."""
    code = int(name.removeprefix("type "))
    return set(gene_names()[2 * code : 2 * code + 2])


def test_planted_genes_are_found_and_the_check_holds(planted):
    saved, dataset, codes = read(planted / "cells.h5ad", planted / "celltype")
    found = explain(saved, partial(take, dataset), codes, 2, CONFIG)
    right = [row.feature in own_genes(row.type) for row in found.table.itertuples()]
    assert len(right) == 6 and sum(right) >= 5  # a type may also be known by genes that all types have
    for name, mine in found.table.groupby("type"):
        assert list(mine["rank"]) == [1, 2] and set(mine["cells"]) == {
            -(-(codes == saved.outputs.index(name)).sum() // 2)
        }
        assert mine["attribution"].is_monotonic_decreasing and (mine["attribution"] > 0).all()
    assert found.checks["holds"].all() and set(found.checks["type"]) == {*saved.outputs, ALL}
    overall = found.checks.set_index("type").loc[ALL]
    assert overall["top"] > 0.3 and abs(overall["random"]) < 0.1
    assert overall["low"] <= overall["difference"] <= overall["high"]
    assert overall["difference"] == pytest.approx(overall["top"] - overall["random"])
    assert overall["random_value"] == pytest.approx(overall["top_value"], rel=0.1)
    (line,) = found.lines
    assert f"{overall['top']:.3f}" in line and "the check holds" in line


def test_the_check_fails_for_shuffled_attributions(planted, monkeypatch):
    saved, dataset, codes = read(planted / "cells.h5ad", planted / "celltype")
    rng = np.random.default_rng(0)
    right = module.attribute

    def shuffled(*args):
        sums = right(*args)
        return {name: rng.permuted(np.abs(total), axis=1) for name, total in sums.items()}

    monkeypatch.setattr(module, "attribute", shuffled)
    found = explain(saved, partial(take, dataset), codes, 2, CONFIG)
    overall = found.checks.set_index("type").loc[ALL]
    assert not overall["holds"] and "THE CHECK FAILS" in found.lines[0]


def test_the_same_numbers_again_for_any_minibatch_size_and_another_draw_for_another_seed(planted):
    saved, dataset, codes = read(planted / "cells.h5ad", planted / "celltype")
    first = explain(saved, partial(take, dataset), codes, 3, CONFIG)
    again = explain(saved, partial(take, dataset), codes, 3, InferConfig(7, "cpu"))
    assert first.table.drop(columns="attribution").equals(again.table.drop(columns="attribution"))
    np.testing.assert_allclose(first.table["attribution"], again.table["attribution"], rtol=1e-5)
    np.testing.assert_allclose(first.checks["difference"], again.checks["difference"], rtol=1e-5)
    assert explain(saved, partial(take, dataset), codes, 3, CONFIG).checks.equals(first.checks)
    other = explain(saved, partial(take, dataset), codes, 3, CONFIG, seed=1)
    assert not np.allclose(other.checks["difference"], first.checks["difference"])


@pytest.mark.parametrize("name", ["celltype_atac", "celltype_rna", "planted"])
def test_attributions_are_what_removal_changes(name, runs, raw_file, planted):
    """All genes as tokens and a student; peaks and a student; expressed genes alone."""
    path, folder = (planted / "cells.h5ad", planted / "celltype") if name == "planted" else (raw_file, runs[name])
    saved, dataset, codes = read(path, folder)
    (modality,) = saved.model_config.inputs
    temperature, agreement = saved.fitted["temperature"], []
    for row in range(6):
        one = take(dataset, np.array([row]))
        found = attribute(saved, one, codes[[row]], CONFIG, CPU)[modality][codes[row]]
        values = one.values[modality]
        features = values.indices.copy()
        matrices = [values, *(without(values, [feature]) for feature in features)]
        names = pd.Index([str(i) for i in range(len(matrices))])
        _, decoded = decode(saved, CellDataset({modality: vstack(matrices, "csr")}, names), CONFIG, CPU, "test")
        logits = torch.from_numpy(decoded["logits"]) / temperature
        odds = log_odds(logits, torch.full((len(logits),), int(codes[row]))).numpy()
        fall = odds[0] - odds[1:]
        assert (found[np.setdiff1d(np.arange(len(found)), features)] == 0).all()
        agreement.append(np.corrcoef(found[features], fall)[0, 1])
    assert np.mean(agreement) > 0.9, agreement


def test_at_most_so_many_cells_of_a_type_are_read(planted):
    codes = np.repeat([0, 1, -1, 2], [5_000, 130, 20, 1])
    chosen = choose_cells(codes, np.random.default_rng(0))
    assert [(len(t.rank), len(t.check)) for t in chosen] == [(CELLS, CELLS), (CELLS, CELLS), (1, 0)]
    for t in chosen:
        assert not set(t.rank) & set(t.check) and (codes[[*t.rank, *t.check]] == t.code).all()
    saved, dataset, codes = read(planted / "cells.h5ad", planted / "celltype")
    peaks = []
    for times in (4, 40):  # the model and a bounded number of cells are in memory, however large the file
        many = take(dataset, np.tile(np.arange(len(codes)), times))
        tracemalloc.start()
        explain(saved, partial(take, many), np.tile(codes, times), 2, CONFIG)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_random_features_are_matched_by_their_mean_value():
    rng = np.random.default_rng(0)
    mean = np.concatenate([np.zeros(50), rng.uniform(0.1, 1, 200), rng.uniform(4, 5, 60)])
    top = np.array([260, 300, 60])
    drawn = random_match(mean, top, rng)
    assert len(set(drawn)) == 3 and not set(drawn) & set(top) and (mean[drawn] > 0).all()
    assert (mean[drawn[:2]] > 4).all() and mean[drawn[2]] < 1
    assert len(random_match(np.array([1.0, 2.0, 0.0]), np.array([0, 1]), rng)) == 0


def test_removing_features_removes_them():
    matrix = csr_matrix(np.array([[1.0, 2, 0], [0, 0, 3]], dtype=np.float32))
    assert without(matrix, np.array([0, 2])).toarray().tolist() == [[0, 2, 0], [0, 0, 0]]
    assert matrix.nnz == 3


def test_few_cells_are_not_checked(planted):
    saved, dataset, codes = read(planted / "cells.h5ad", planted / "celltype")
    some = np.concatenate([np.flatnonzero(codes == 0), np.flatnonzero(codes == 1)[:3]])
    found = explain(saved, partial(take, take(dataset, some)), codes[some], 2, CONFIG)
    assert set(found.checks["type"]) == {saved.outputs[0], ALL} and saved.outputs[1] in found.lines[-1]
    one = explain(saved, partial(take, take(dataset, some[:1])), codes[some[:1]], 2, CONFIG)
    assert one.checks.empty and len(one.table) == 2
    none = explain(saved, partial(take, take(dataset, some[:1])), np.array([-1]), 2, CONFIG)
    assert none.table.empty and none.checks.empty
    assert len(self_check(saved, partial(take, dataset), [], CONFIG, CPU, np.random.default_rng(0))) == 0


# The script ----------------------------------------------------------------------------------------------------------


def test_what_the_script_writes(planted, tmp_path, capsys):
    out = tmp_path / "out.predicted.h5ad"
    run(
        "predict_cell_type",
        data_path=planted / "cells.h5ad",
        model_path=planted / "celltype",
        out_path=out,
        explain=2,
        device="cpu",
        prefix="new_",
    )
    said = capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out.explained.csv", comment="#")
    assert list(table) == ["type", "modality", "rank", "feature", "attribution", "cells"] and len(table) == 6
    entry = ad.read_h5ad(out).uns["new_scmomer"]["explanation"]
    assert entry["features"]["feature"].tolist() == table["feature"].tolist() and entry["n"] == 2
    np.testing.assert_allclose(entry["features"]["attribution"], table["attribution"])
    head = [line for line in (tmp_path / "out.explained.csv").read_text().splitlines() if line.startswith("#")]
    for line in entry["lines"]:
        assert line in said and f"# {line}" in head
    assert any(load_model(planted / "celltype", "celltype").hash in line for line in head)


def test_without_the_flag_nothing_is_explained(planted, tmp_path, capsys):
    flags = {"data_path": planted / "cells.h5ad", "model_path": planted / "celltype", "device": "cpu"}
    run("predict_cell_type", **flags, out_path=tmp_path / "out.h5ad")
    assert "explanation" not in ad.read_h5ad(tmp_path / "out.h5ad").uns["scmomer"]
    assert not list(tmp_path.glob("*.explained.csv"))
    assert "--explain -1" in error_of(capsys, "predict_cell_type", **flags, explain=-1)


def test_paired_cells_and_none_that_can_be_explained(runs, trusted, simulation, tmp_path):  # noqa: F811
    """The tables are small or empty, and can be read again."""
    rna, atac = simulation.mdata["rna"][:4].copy(), simulation.mdata["atac"][:6].copy()
    write_whole(mudata.MuData({"rna": rna, "atac": atac}), tmp_path / "both.h5mu")
    flags = {"data_path": tmp_path / "both.h5mu", "device": "cpu", "explain": 3}
    run("predict_cell_type", **flags, model_path=runs["celltype_rna"], out_path=tmp_path / "atac.h5mu")
    entry = mudata.read_h5mu(tmp_path / "atac.h5mu").uns["scmomer"]["explanation"]
    assert set(entry["features"]["modality"]) == {"atac"} and len(entry["checks"]) == 0
    how = {"novel_below": 1.0, "reject": True}  # every cell is unassigned
    run("predict_cell_type", **flags, model_path=trusted, out_path=tmp_path / "rna.h5mu", **how)
    entry = mudata.read_h5mu(tmp_path / "rna.h5mu").uns["scmomer"]["explanation"]
    assert len(entry["features"]) == len(entry["checks"]) == 0
