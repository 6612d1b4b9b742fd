"""Prediction sets, novelty and embeddings per modality: what the files hold, and what stays as it was without them."""

import json
import shutil

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import CPU, error_of, lacks, run
from tests.scripts.test_predict import COLUMNS, MATRICES, MEASURED, forge
from utils.cells.labels import encode_labels
from utils.cells.minibatches import train_and_val
from utils.evaluate.boxed import NAMES, boxed_types
from utils.evaluate.conformal import types_of
from utils.files.write import write_whole
from utils.predict.calibrate import calibrate
from utils.predict.label import label_cells
from utils.train.config import InferConfig, LabelConfig
from utils.train.folders import MANIFEST
from utils.train.model_folder import ARRAYS, load_model

AWKWARD = ["B; memory #2\nof donor, 3", "NK/T", "x" * 200]
NOVELTY = ["novelty", "is_novel"]


@pytest.fixture(scope="module")
def trusted(cells, runs, tmp_path_factory):
    """A cell type model that was calibrated on enough cells for everything."""
    folder = tmp_path_factory.mktemp("trusted") / "model"
    shutil.copytree(runs["celltype_atac"], folder)
    codes, _ = encode_labels(cells, "cell_type")
    some, _ = train_and_val(cells, 0, keep=codes >= 0, targets={"cell_type": codes})
    calibrate(folder, "celltype", some, InferConfig(device="cpu"), CPU, some)
    return folder


@pytest.fixture
def query(simulation, tmp_path):
    """Raw RNA of 40 cells, with # in the barcodes, in a file."""
    rna = simulation.mdata["rna"][:40].copy()
    rna.obs = rna.obs[["donor"]].copy()
    rna.obs_names = [f"sample#{name}" for name in rna.obs_names]
    write_whole(rna, tmp_path / "query.h5ad")
    return tmp_path / "query.h5ad"


def predict(query, model, **flags) -> ad.AnnData:
    out = query.with_name("out.h5ad")
    run("predict_cell_type", data_path=query, model_path=model, out_path=out, device="cpu", **flags)
    return ad.read_h5ad(out)


def renamed(names):
    """A change of a model folder: other names of the types."""

    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"outputs": names}))

    return change


def forget(folder) -> None:
    """A folder from before there were sets, novelty and baselines."""
    config = json.loads((folder / "config.json").read_text())
    for name in ("sets", "novelty", "baselines", "marker_genes"):
        del config["fitted"][name]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / ARRAYS).unlink()
    names = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({name: digest for name, digest in names.items() if name != ARRAYS}))


def test_the_columns_agree_with_the_probabilities(query, trusted):
    out, types = predict(query, trusted), load_model(trusted, "celltype").outputs
    assert set(out.obs) == {"donor", *COLUMNS, *NOVELTY, *MEASURED} and set(out.obsm) == set(MATRICES)
    table = out.obsm["cell_type_probability"]
    assert list(table.columns) == types and list(table.index) == list(out.obs_names)
    order = np.argsort(-table.to_numpy(), axis=1)
    ranked = np.take_along_axis(table.to_numpy(), order, 1)
    assert list(out.obs["predicted_cell_type"]) == [types[i] for i in order[:, 0]]
    assert list(out.obs["second_cell_type"]) == [types[i] for i in order[:, 1]]
    np.testing.assert_array_equal(out.obs["confidence"], ranked[:, 0])
    np.testing.assert_array_equal(out.obs["margin"], ranked[:, 0] - ranked[:, 1])
    for text, best, number in zip(out.obs["prediction_set"], out.obs["predicted_cell_type"], order, strict=True):
        held = types_of(text)
        assert held[0] == best and held == [types[i] for i in number[: len(held)]]
    assert out.obs["rna_measured"].all() and not out.obs["atac_measured"].any()
    assert out.obs["novelty"].between(0, 1).all()
    entry = out.uns["scmomer"]
    assert entry["prediction_sets"]["coverage"] == 0.9 and entry["novelty"]["novel_below"] == 0.05
    assert list(entry["outputs"]) == types and entry["versions"].keys() >= {"scmomer", "torch"}


def test_latents_are_those_that_the_fusion_reads(query, trusted):
    """Fused again, the two latents give the cell embedding: RNA measured, ATAC the student's."""
    import torch

    out, model = predict(query, trusted), load_model(trusted, "celltype").build()
    latents = {name: torch.from_numpy(out.obsm[f"X_scmomer_{name}"]) for name in ("rna", "atac")}
    with torch.no_grad():
        np.testing.assert_allclose(model.fusion(latents).numpy(), out.obsm["X_scmomer"], rtol=1e-4, atol=1e-5)


def test_the_choices_change_the_sets_and_nothing_else(query, trusted):
    plain = predict(query, trusted)
    wide = predict(query, trusted, coverage=0.99, novel_below=0.6)
    sizes = [out.obs["prediction_set"].map(lambda text: len(types_of(text))).astype(int) for out in (plain, wide)]
    assert (sizes[0] <= sizes[1]).all() and (sizes[1] > sizes[0]).any()
    same = [name for name in plain.obs if name not in ("prediction_set", "is_novel")]
    pd.testing.assert_frame_equal(plain.obs[same], wide.obs[same])
    np.testing.assert_array_equal(wide.obs["is_novel"], wide.obs["novelty"].to_numpy() > 0.4)
    assert wide.obs["is_novel"].any() and not wide.obs["is_novel"].all()
    reject = predict(query, trusted, novel_below=0.6, reject=True)
    is_novel = reject.obs["is_novel"].to_numpy()
    assert (reject.obs["predicted_cell_type"][is_novel] == "unassigned").all()
    same = list(plain.obs["predicted_cell_type"][~is_novel])
    assert list(reject.obs["predicted_cell_type"][~is_novel]) == same
    np.testing.assert_array_equal(reject.obs["confidence"], plain.obs["confidence"])
    own = predict(query, trusted, coverage_per_type=True)
    assert own.uns["scmomer"]["prediction_sets"]["per_type"]


def test_a_folder_without_calibration_predicts_the_same(query, trusted, tmp_path, capsys):
    """Labels, confidence and embedding are equal to the bit; columns of an earlier run do not stay behind."""
    forge(trusted, tmp_path / "old", forget)
    first = predict(query, trusted)
    shutil.move(query.with_name("out.h5ad"), query)
    capsys.readouterr()
    second = predict(query, tmp_path / "old")
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(lines) == 1 and lacks(lines[0], "prediction_set", "agreement", "is_novel") == []
    assert set(second.obs) == {"donor", *COLUMNS, *MEASURED} - {"prediction_set", "agreement"}
    pd.testing.assert_frame_equal(first.obs[list(second.obs)], second.obs)
    for name in MATRICES[:3]:
        np.testing.assert_array_equal(first.obsm[name], second.obsm[name])
    line = error_of(capsys, "predict_cell_type", data_path=query, model_path=tmp_path / "old", reject=True)
    assert "--reject" in line


def test_awkward_names_of_types_and_barcodes_are_read_back(query, trusted, tmp_path):
    forge(trusted, tmp_path / "model", renamed(AWKWARD))
    out = predict(query, tmp_path / "model", coverage=0.99)
    assert set(out.obs["predicted_cell_type"]) <= set(AWKWARD)
    for text, best in zip(out.obs["prediction_set"], out.obs["predicted_cell_type"], strict=True):
        assert types_of(text)[0] == best and set(types_of(text)) <= set(AWKWARD)
    assert list(out.obsm["cell_type_probability"].columns) == [name.replace("/", "|") for name in AWKWARD]
    path = query.with_name("out.predicted.csv")
    table = pd.read_csv(path, comment="#", index_col="barcode")
    assert list(table.index) == list(out.obs_names)
    assert list(table) == [*COLUMNS, *NOVELTY, *MEASURED]
    for name in table:
        if table[name].dtype == float:
            np.testing.assert_allclose(table[name], out.obs[name], rtol=1e-6)
        else:
            assert list(table[name]) == list(out.obs[name])
    head = [line for line in path.read_text().splitlines()[:3] if line.startswith("# ")]
    assert len(head) == 3 and load_model(tmp_path / "model", "celltype").hash in head[1]


def test_the_table_never_replaces_an_input(simulation, trusted, tmp_path, capsys):
    rna = simulation.mdata["rna"][:12].copy()
    data = tmp_path / "a.predicted.csv"
    pd.DataFrame(rna.X.toarray(), rna.obs_names, rna.var_names).to_csv(data)
    before = data.read_bytes()
    flags = {"data_path": data, "model_path": trusted, "out_path": tmp_path / "a.h5ad", "device": "cpu"}
    assert "a.predicted.csv" in error_of(capsys, "predict_cell_type", **flags)
    assert data.read_bytes() == before


def test_cells_without_counts_or_without_the_modality_are_marked(simulation, trusted, tmp_path):
    mdata = simulation.mdata.copy()
    rna = mdata["rna"][:30].copy()
    counts = rna.X.tolil()
    counts[4] = 0
    rna.X = counts.tocsr()
    write_whole(mudata.MuData({"rna": rna, "atac": mdata["atac"][10:50].copy()}), tmp_path / "some.h5mu")
    out = label_cells(tmp_path / "some.h5mu", trusted)
    write_whole(out, tmp_path / "out.h5mu")
    out = mudata.read_h5mu(tmp_path / "out.h5mu")
    empty, unread = rna.obs_names[4], mdata.obs_names[40]
    assert not out.obs.loc[[empty, unread], [*MEASURED, "is_novel"]].to_numpy().any()
    assert out.obs.loc[empty, "predicted_cell_type"] == "unassigned" and out.obs.loc[empty, "prediction_set"] == ""
    assert out.obs.loc[[unread], ["predicted_cell_type", "prediction_set", "novelty"]].isna().to_numpy().all()
    table = out.obsm["cell_type_probability"]
    assert table.loc[[empty, unread]].isna().to_numpy().all() and table.notna().all(axis=1).sum() == 29
    assert out.obs["rna_measured"].sum() == 29


def test_one_cell(simulation, trusted, tmp_path):
    write_whole(simulation.mdata["rna"][:1].copy(), tmp_path / "one.h5ad")
    one, many = (label_cells(path, trusted) for path in (tmp_path / "one.h5ad", _some(simulation, tmp_path)))
    columns = [*COLUMNS, *NOVELTY, *MEASURED]
    assert one.obs.iloc[0][columns].to_dict() == many.obs.iloc[0][columns].to_dict()


def _some(simulation, folder):
    write_whole(simulation.mdata["rna"][:30].copy(), folder / "some.h5ad")
    return folder / "some.h5ad"


def test_from_python_as_from_the_script(query, trusted):
    ours = label_cells(query, trusted, choices=LabelConfig(coverage=0.8, reject=True, novel_below=0.3))
    theirs = predict(query, trusted, coverage=0.8, reject=True, novel_below=0.3)
    columns = [*COLUMNS, *NOVELTY, *MEASURED]
    pd.testing.assert_frame_equal(ours.obs[columns], theirs.obs[columns])


@pytest.mark.parametrize(
    ("flag", "value"), [("coverage", 0.3), ("coverage", 1.0), ("coverage", "nan"), ("novel_below", -1)]
)
def test_impossible_choices(flag, value, query, trusted, capsys):
    line = error_of(capsys, "predict_cell_type", data_path=query, model_path=trusted, **{flag: value})
    assert f"--{flag}" in line


def test_damaged_thresholds_are_refused(query, trusted, tmp_path, capsys):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        config["fitted"]["sets"]["threshold"][0] = 7.0
        (folder / "config.json").write_text(json.dumps(config))

    forge(trusted, tmp_path / "model", damage)
    line = error_of(capsys, "predict_cell_type", data_path=query, model_path=tmp_path / "model")
    assert "config.json" in line and "threshold" in line


def test_agreement_is_the_share_that_gives_the_same_type(query, trusted, cells):
    """Counted again from the baselines' own types; a cell's value does not depend on the others."""
    saved, out = load_model(trusted, "celltype"), predict(query, trusted)
    values = cells.values["rna"][cells.obs.index.get_indexer([name.removeprefix("sample#") for name in out.obs_names])]
    given = boxed_types(saved.arrays, values)
    numbers = [saved.outputs.index(name) for name in out.obs["predicted_cell_type"]]
    np.testing.assert_allclose(out.obs["agreement"], (1 + (given == numbers).sum(0)) / 4)
    assert set(out.obs["agreement"]) <= {0.25, 0.5, 0.75, 1.0} and (out.obs["agreement"] == 1).mean() > 0.5
    assert list(out.uns["scmomer"]["baselines"]) == list(NAMES)
    alone = [boxed_types(saved.arrays, values[[row]])[:, 0] for row in range(5)]
    np.testing.assert_array_equal(np.transpose(alone), given[:, :5])


def test_markers_separate_the_types_of_the_training_cells(query, trusted, cells):
    table = predict(query, trusted).uns["scmomer"]["marker_genes"]
    saved, mean = load_model(trusted, "celltype"), {}
    assert list(table.columns) == saved.outputs
    assert {name: [gene for gene in table[name] if gene] for name in table} == saved.fitted["marker_genes"]
    train = (cells.obs["split"] == "train").to_numpy()
    for name in saved.outputs:
        mean[name] = cells.values["rna"][np.flatnonzero(train & (cells.obs["cell_type"] == name))].mean(0).A1
    for name, genes in saved.fitted["marker_genes"].items():
        at = list(cells.features["rna"]).index(genes[0])
        assert mean[name][at] == max(found[at] for found in mean.values())
    every = [gene for genes in saved.fitted["marker_genes"].values() for gene in genes]
    assert lacks((trusted / "README.md").read_text(), *every) == []


def test_a_model_of_atac_has_marker_peaks(runs, cells):
    saved = load_model(runs["celltype_rna"], "celltype")
    assert "marker_genes" not in saved.fitted and set(saved.fitted["marker_peaks"]) == set(saved.outputs)
    assert set().union(*saved.fitted["marker_peaks"].values()) <= set(cells.features["atac"])
    boxed_types(saved.arrays, cells.values["atac"])  # they read the same peaks


def test_the_parent_is_what_the_types_of_a_set_have_in_common(query, trusted, tmp_path):
    """Without a hierarchy there is no column; with one, it is recorded, too."""
    first, second, third = load_model(trusted, "celltype").outputs
    plain = predict(query, trusted)
    assert "parent_cell_type" not in plain.obs
    second_best = np.sort(plain.obsm["cell_type_probability"].to_numpy(), axis=1)[:, -2]
    parents, threshold = {first: "both", second: "both"}, 1 - float(np.median(second_best))
    forge(trusted, tmp_path / "model", with_hierarchy(parents, threshold))
    out = predict(query, tmp_path / "model")
    expected = {frozenset({name}): name for name in (first, second, third)} | {frozenset({first, second}): "both"}
    sets = [frozenset(types_of(text)) for text in out.obs["prediction_set"]]
    assert {len(one) for one in sets} >= {1, 2}
    assert list(out.obs["parent_cell_type"]) == [expected.get(one, "cell") for one in sets]
    assert dict(out.uns["scmomer"]["hierarchy"].to_numpy()) == parents


def with_hierarchy(parents, threshold=0.5):
    """A change of a model folder: a hierarchy of its types, and one threshold for all sets."""

    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config["fitted"]["hierarchy"] = parents
        config["fitted"]["sets"] |= {"score": "probability", "threshold": [threshold] * 50}
        (folder / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize("damage", ["features", "MLP 1 weight", "circle"])
def test_a_damaged_folder_is_refused(damage, query, trusted, tmp_path, capsys):
    def change(folder):
        if damage == "circle":
            return with_hierarchy({"a": "b", "b": "a"})(folder)
        arrays = load_file(folder / ARRAYS)
        arrays[damage] = arrays[damage] + 9000 if damage == "features" else np.full_like(arrays[damage], np.nan)
        save_file(arrays, folder / ARRAYS)

    forge(trusted, tmp_path / "model", change)
    line = error_of(capsys, "predict_cell_type", data_path=query, model_path=tmp_path / "model")
    assert str(tmp_path / "model") in line


def test_evaluation_scores_the_sets(ready_file, trusted, tmp_path, capsys):
    flags = {"data_path": ready_file, "model_path": trusted, "split": "val", "out_path": tmp_path, "device": "cpu"}
    run("evaluate", **flags, coverage=0.8)
    shown = capsys.readouterr().out
    table = json.loads((tmp_path / "evaluation_val.json").read_text())
    for name in ("scmomer", "logistic regression"):
        assert 0 <= table[name]["set_coverage"] <= 1 <= table[name]["set_size"] <= 3
        assert f"{table[name]['set_coverage']:.1%}" in shown
    assert table["coverage"] == 0.8 and "set_size" not in table["majority class"]
    assert table["scmomer"]["agreement_auroc"] == pytest.approx(0.5, abs=0.5)
    assert "--coverage" in error_of(capsys, "evaluate", **flags, coverage=0.2)


@pytest.mark.parametrize(("shift", "warned"), [(0.0, False), (50.0, True)])
def test_many_novel_cells_are_a_warning(shift, warned, simulation, trusted, tmp_path, capsys):
    """Cells whose counts are those of other genes: the model has seen no such cells."""
    rna = simulation.mdata["rna"][:80].copy()
    if shift:
        rna.X = rna.X[:, np.random.default_rng(0).permutation(rna.n_vars)]
    write_whole(rna, tmp_path / "query.h5ad")
    out = predict(tmp_path / "query.h5ad", trusted)
    novel = (out.obs["novelty"] > 0.95).mean()
    assert (novel > 0.25) == warned
    expected = f"{novel:.0%} of the cells have a novelty above 0.95"
    assert (expected in capsys.readouterr().out) == warned
    assert any(expected in line for line in out.uns["scmomer"]["warnings"]) == warned


def test_files_of_an_earlier_run_are_named(query, trusted, capsys):
    predict(query, trusted, explain=2, report=True)
    assert "earlier run" not in capsys.readouterr().out
    predict(query, trusted)
    said = capsys.readouterr().out
    assert "out.report.html" in said and "out.explained.csv" in said
