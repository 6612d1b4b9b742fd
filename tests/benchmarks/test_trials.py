"""Trials: what each changes, that the batch set aside lends nothing to the others, and the table of differences."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from mudata import MuData
from scipy import sparse

from benchmarks import trials
from benchmarks.lib import trial_data
from benchmarks.lib.stages import Stages
from tests.test_docs import flags_of
from utils.cells.preprocessed import read_cells
from utils.predict.latents import read_latents, write_latents

K = 3


@pytest.fixture
def raw() -> MuData:
    """Paired cells in two batches of which A has two groups, with genes and peaks of their own."""
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1, 0], 12)
    obs = pd.DataFrame({"batch": np.repeat(["A", "A", "B"], 12)}, index=[f"cell{i}" for i in range(36)])
    counts = {name: rng.poisson(np.where(np.arange(40) % 2 == group[:, None], 4, 0.1)) for name in ("rna", "atac")}
    return MuData({name: ad.AnnData(sparse.csr_matrix(x.astype(np.float32)), obs.copy()) for name, x in counts.items()})


def test_neighbours_are_other_cells_of_the_same_kind_and_not_of_the_batch_set_aside(raw, monkeypatch):
    monkeypatch.setattr(trial_data, "COMPONENTS", 5)
    found = trial_data.nearest(raw, "B", K).toarray()
    assert (found.sum(1) == K).all() and not found.diagonal().any()
    assert not found[:, 24:].any()
    assert not found[:12, 12:].any() and not found[24:, 12:].any() and not found[12:24, :12].any()


def test_pooled_cells_are_sums_over_neighbours(raw, monkeypatch):
    monkeypatch.setattr(trial_data, "COMPONENTS", 5)
    of = trial_data.nearest(raw, "B").toarray()
    own = {name: raw[name].X.toarray().copy() for name in ("rna", "atac")}
    atac = trial_data.with_pooled_atac(raw, "B")["atac"].X.toarray()
    np.testing.assert_allclose(atac[:24], own["atac"][:24] + of[:24] @ own["atac"])
    np.testing.assert_array_equal(atac[24:], own["atac"][24:])  # what a test cell's peaks are stays as measured
    both = trial_data.with_neighbours(raw, "B")["rna"].X.toarray()
    np.testing.assert_allclose(both, own["rna"] + of @ own["rna"] / trial_data.N_NEIGHBOURS, rtol=1e-5)
    np.testing.assert_array_equal(raw["rna"].X.toarray(), own["rna"])


def test_lsi_takes_the_place_of_the_atac_latent_alone(ready_file, tmp_path, monkeypatch):
    monkeypatch.setattr(trial_data, "LSI_COMPONENTS", 4)
    cells, rng = read_cells(ready_file, ("rna", "atac")), np.random.default_rng(0)
    for split in ("train", "val"):
        barcodes = cells.obs.index[cells.rows(split)][::-1]
        latents = {name: rng.normal(scale=3, size=(len(barcodes), 6)).astype(np.float32) for name in ("rna", "atac")}
        write_latents(tmp_path, split, barcodes, latents["rna"], latents, "teacher")
    trial_data.write_lsi(cells, tmp_path, tmp_path / "lsi")

    class Teacher:
        hash, path = "teacher", "teacher"

    old, new = (
        read_latents(dict.fromkeys(("train", "val"), str(at)), cells, Teacher) for at in (tmp_path, tmp_path / "lsi")
    )
    np.testing.assert_array_equal(new["rna"], old["rna"])
    train = new["atac"][cells.rows("train")]
    np.testing.assert_allclose(train[:, :4].std(0), old["atac"][cells.rows("train")].std(0).mean(), rtol=1e-3)
    np.testing.assert_allclose(train[:, :4].mean(0), 0, atol=1e-3)
    assert not train[:, 4:].any()
    # Types differ in their peaks, so the first component after depth separates the simulated types.
    types = cells.labels("cell_type").to_numpy()[cells.rows("train")]
    means = pd.DataFrame(train[:, :4]).groupby(types).mean()
    assert (means.std(0) / train[:, :4].std(0)).max() > 0.5


def test_trials_change_what_they_say_and_share_the_rest(tmp_path, monkeypatch):
    ran = {}
    monkeypatch.setattr(
        Stages, "run", lambda self, name, command: ran.setdefault((self.path.parent.name, name), command)
    )
    monkeypatch.setattr(trials, "scores_in", lambda folder, *row: [(folder, *row)])
    monkeypatch.setattr(trials, "write_raw", lambda *_: None)
    monkeypatch.setattr(trials, "read_cells", lambda *_: None)
    monkeypatch.setattr(trials, "write_lsi", lambda *_: None)
    folders = {}
    for name, trial in trials.TRIALS.items():
        before = set(ran)
        ((folder, method, seed, n),) = trials.run(name, trial, tmp_path, tmp_path / "out", 3, 5, 10)
        assert (method, seed, n) == (name, 5, 10)
        folders[name] = folder
        new = [ran[stage] for stage in ran if stage not in before]
        again = "pretrain_rna.py" in " ".join(new)
        assert again == (name == "default" or trial.data != "cells"), name  # stage I is shared where the data are
    assert len(set(folders.values())) == len(trials.TRIALS)
    for command in ran.values():
        script, *words = command.split()
        assert {word for word in words if word.startswith("--")} <= flags_of(script.removesuffix(".py")), command
    splits = [command for command in ran.values() if command.startswith("preprocess.py")]
    assert len(splits) == 3 and all("--test_groups 09E" in command for command in splits)
    tuned = [command for command in ran.values() if command.startswith("train_")]
    assert all("--labels_per_type 10" in command and "--seed 5" in command for command in tuned)
    assert sum("--pseudo_labels_from" in command for command in tuned) == len(trials.TRIALS)
    share_first = sum(bool(trial.second) for trial in trials.TRIALS.values())  # only what follows differs
    assert len(tuned) == 2 * len(trials.TRIALS) - share_first
    (of_means,) = [command for command in splits if "neighbours" in command]
    assert "--values counts" in of_means and sum("--values" in command for command in splits) == 1


def test_the_table_pairs_each_trial_with_the_default(tmp_path):
    for fold, (plain, changed) in enumerate([(0.5, 0.53), (0.7, 0.71)]):
        rows = [
            (0, n, method, measure, value + 0.1 * (measure == "macro_f1"))
            for n in trials.NUMBERS
            for method, value in (
                *(("default", plain), ("LSI", changed)),
                *((trials.NOT_SPREAD, plain - 0.1), (f"LSI, {trials.NOT_SPREAD}", changed - 0.1)),
            )
            for measure in ("accuracy", "macro_f1")
        ]
        trials.add_rows(tmp_path / f"fold{fold}.csv", rows)
    default, lsi, not_spread, old_lsi = trials.table(tmp_path).splitlines()[2:]
    assert "0.600" in default and "0.620, +2.0 (+1.0 … +3.0); 0.720, +2.0 (+1.0 … +3.0)" in lsi
    assert "0.500, -10.0" in not_spread and "0.520, +2.0 (+1.0 … +3.0)" in old_lsi
