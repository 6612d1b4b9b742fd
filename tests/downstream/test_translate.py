"""downstream.translate: the modality that cells lack, as the model predicts it, streamed to a file."""

from dataclasses import replace

import anndata as ad
import mudata
import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import Ridge

from models.shapes import other
from tests.helpers import CPU, error_of, lacks, run
from utils.cells.minibatches import CellDataset, MicroBatch
from utils.cells.preprocessed import read_cells
from utils.predict.translation import fit_calibration
from utils.train.config import InferConfig
from utils.train.folders import write_folder
from utils.train.model_folder import load_model

SCRIPT = "downstream.translate"


@pytest.fixture(params=["atac", "rna"])
def missing(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def alone(raw_file, tmp_path_factory) -> dict:
    """Modality → file with that modality of the raw cells alone."""
    whole, folder = mudata.read_h5mu(raw_file), tmp_path_factory.mktemp("alone")
    for name, part in whole.mod.items():
        part.obs["cell_type"] = whole.obs["cell_type"]
        part.write(folder / f"{name}.h5ad")
    return {name: folder / f"{name}.h5ad" for name in whole.mod}


def embedded(saved, cells) -> np.ndarray:
    """[cells, latent_dim] embeddings by the measured modality, all at once."""
    n, measured = len(cells.obs), other(saved.options["missing"])
    dataset = CellDataset({measured: cells.values[measured][np.arange(n)]}, cells.obs.index)
    with torch.no_grad():
        return saved.build().eval().embed(dataset[MicroBatch(np.arange(n), np.ones(n), 0, n)]).numpy()


def dense(saved, ready_file) -> tuple[np.ndarray, np.ndarray, "ad.AnnData"]:
    """The decoder's outputs for all cells, their detected features, and the cells; all at once."""
    cells, missing = read_cells(ready_file, ("rna", "atac")), saved.options["missing"]
    with torch.no_grad():
        outputs = saved.build().decoders[missing](torch.from_numpy(embedded(saved, cells))).numpy()
    return outputs, np.diff(cells.values[other(missing)][np.arange(len(outputs))].indptr), cells


def test_a_file_of_one_modality(alone, ready_file, runs, missing, tmp_path):
    saved = load_model(runs[f"student_{missing}"], "student")
    flags = {"data_path": alone[other(missing)], "model_path": saved.path, "device": "cpu"}
    run(SCRIPT, **flags, out_path=tmp_path / "all.h5ad", to=missing)
    outputs, _, cells = dense(saved, ready_file)
    expected = expit(outputs - np.log(5)) if missing == "atac" else np.maximum(outputs, 0)
    found = ad.read_h5ad(tmp_path / "all.h5ad")
    assert list(found.obs_names) == list(ad.read_h5ad(alone[other(missing)]).obs_names)
    assert list(found.var_names) == list(saved.features[missing]) and found.obs["translated"].all()
    ours = found[cells.obs.index].X.toarray()
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert ours.min() >= 0 and (missing == "rna" or ours.max() <= 1)
    assert found.uns["scmomer"]["model_hash"] == saved.hash

    run(SCRIPT, **flags, out_path=tmp_path / "types.h5ad", format="types")
    means = ad.read_h5ad(tmp_path / "types.h5ad")
    types = found.obs["cell_type"].astype(str)
    assert list(means.obs_names) == sorted(set(types)) and means.obs["n_cells"].sum() == len(types)
    for name in means.obs_names:
        np.testing.assert_allclose(
            means[name].X.ravel(), found.X.toarray()[(types == name).to_numpy()].mean(0), atol=1e-5
        )

    least, values = float(np.median(found.X.data)), found.X.toarray()
    run(SCRIPT, **flags, out_path=tmp_path / "large.h5ad", min_value=least)
    large = ad.read_h5ad(tmp_path / "large.h5ad").X
    assert 0 < large.nnz < found.X.nnz
    np.testing.assert_array_equal(large.toarray(), np.where(values >= least, values, 0))


def test_calibrated_peaks(alone, ready_file, runs, tmp_path):
    saved = load_model(runs["student_atac"], "student")
    flags = {"data_path": alone["rna"], "model_path": saved.path, "ready_path": ready_file, "device": "cpu"}
    run(SCRIPT, **flags, out_path=tmp_path / "out.h5ad")
    outputs, detected, cells = dense(saved, ready_file)
    fitted = fit_calibration(saved, cells, InferConfig(device="cpu"), CPU)
    logits = fitted.slope * (outputs - np.log(5)) + fitted.offset + fitted.depth * np.log1p(detected)[:, None]
    logits = logits if fitted.peaks is None else logits + fitted.peaks
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    assert written.uns["scmomer"]["calibration"].keys() == fitted.fitted.keys()
    found = written[cells.obs.index].X.toarray()
    np.testing.assert_allclose(found, expit(logits), atol=1e-5)
    val = cells.rows("val")
    truth = cells.values["atac"][val].toarray()
    assert found[val].mean() == pytest.approx(truth.mean(), rel=1e-3)  # the plain decoder is off by more
    assert abs(expit(outputs[val] - np.log(5)).mean() / truth.mean() - 1) > 0.01


@pytest.mark.parametrize("permuted", [False, True])
def test_peaks_planted_in_types_are_found(alone, ready_file, runs, permuted, tmp_path):
    """A decoder that has learned the peaks of each type predicts them; one that has learned permuted types does not."""
    saved, cells = load_model(runs["student_atac"], "student"), read_cells(ready_file, ("rna", "atac"))
    types, train = cells.labels().to_numpy(), cells.rows("train")
    names, n_peaks = np.unique(types), len(saved.features["atac"])
    planted = np.where(np.arange(n_peaks) % len(names) == np.arange(len(names))[:, None], 0.8, 0.1)
    learned = np.random.default_rng(0).permutation(types[train]) if permuted else types[train]
    share = planted[np.searchsorted(names, learned)]
    fit = Ridge(1e-3).fit(embedded(saved, cells)[train], np.log(5 * share / (1 - share)))
    decoder = {"decoders.atac.weight": fit.coef_, "decoders.atac.bias": fit.intercept_}
    state = saved.state | {name: torch.from_numpy(np.float32(value)) for name, value in decoder.items()}
    write_folder(tmp_path / "model", replace(saved, state=state).write)
    out = tmp_path / "types.h5ad"
    run(SCRIPT, data_path=alone["rna"], model_path=tmp_path / "model", out_path=out, format="types", device="cpu")
    found = ad.read_h5ad(out)
    assert list(found.obs_names) == list(names)
    found_own = np.mean([found.X[i, planted[i] > 0.5].mean() for i in range(len(names))])
    found_others = np.mean([found.X[i, planted[i] < 0.5].mean() for i in range(len(names))])
    if permuted:
        assert abs(found_own - found_others) < 0.1
    else:
        assert found_own > found_others + 0.2


def test_a_preprocessed_file_and_a_cell_without_counts(alone, ready_file, runs, tmp_path):
    flags = {"model_path": runs["student_atac"], "device": "cpu"}
    blank = ad.read_h5ad(alone["rna"])
    blank.X = blank.X.toarray()
    blank.X[3] = 0
    blank.write(tmp_path / "blank.h5ad")
    for name, data in (("raw", alone["rna"]), ("ready", ready_file), ("blank", tmp_path / "blank.h5ad")):
        run(SCRIPT, **flags, data_path=data, out_path=tmp_path / f"{name}.out.h5ad")
    raw, ready, out = (ad.read_h5ad(tmp_path / f"{name}.out.h5ad") for name in ("raw", "ready", "blank"))
    np.testing.assert_array_equal(ready[raw.obs_names].X.toarray(), raw.X.toarray())
    measured = np.arange(len(raw.obs)) != 3
    np.testing.assert_array_equal(out.obs["translated"], measured)
    np.testing.assert_array_equal(out.X.toarray(), raw.X.toarray() * measured[:, None])


def test_bad_input(alone, ready_file, runs, tmp_path, capsys):
    flags = {"data_path": alone["rna"], "model_path": runs["student_atac"], "device": "cpu"}
    flags |= {"out_path": tmp_path / "out.h5ad"}
    for wrong, words in (
        ({"model_path": runs["multimodal"]}, (runs["multimodal"], "student")),
        ({"model_path": runs["celltype_atac"]}, (runs["celltype_atac"], "student")),
        ({"to": "rna"}, ("--to", runs["student_atac"], "--missing rna")),
        ({"data_path": alone["atac"]}, (alone["atac"], "rna")),
        ({"format": "types", "label_column": "nothing"}, ("--label_column", "nothing", alone["rna"])),
        ({"ready_path": alone["rna"]}, (alone["rna"], "preprocess.py")),
        ({"min_value": -1}, ("--min_value",)),
        ({"out_path": tmp_path / "out.csv"}, ("--out_path", ".h5ad")),
    ):
        assert lacks(error_of(capsys, SCRIPT, **flags | wrong), *words) == []
    assert not list(tmp_path.iterdir())
