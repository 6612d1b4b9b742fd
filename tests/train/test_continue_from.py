"""Stage I from an imported folder whose genes or peaks differ from those of the data."""

import numpy as np
import pytest
import torch

from models.atac_encoder import ATACEncoder
from models.objectives import MaskedATAC
from tests import published
from tests.helpers import (
    ATAC,
    ATAC_SHAPE,
    RNA,
    TRAINING,
    assert_same_tensors,
    error_of,
    lacks,
    last_weights,
    run,
    weights,
)
from tests.published import PEAKS, genes, import_state, raw_cells, state_of
from utils.train.continue_from import EarlierEncoder, carry
from utils.train.model_folder import SavedModel, load_model

STILL = TRAINING | {"learning_rate": 0, "epochs": 1}
"""Training that changes no weight."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with both imported encoders, and cells with the same, some or none of their genes."""
    folder = tmp_path_factory.mktemp("continue")
    for layout in ("rna", "atac"):
        import_state(folder, layout)
    known, unknown = genes(), [gene for gene in genes(140) if gene not in genes()]
    moved = [f"chr15:{1000 * i + 100}-{1000 * i + 300}" for i in range(25)]
    files = {
        "same": (known, PEAKS),
        "some": ([*known[20:80], *unknown[:20]], [*PEAKS[:20], *moved, *PEAKS[60:]]),
        "none": (unknown, moved),
    }
    for name, (gene_names, peaks) in files.items():
        raw_cells(folder / f"{name}.raw.h5mu", gene_names, peaks)
        like = {"gene_reference": folder / "rna"} if name == "same" else {}
        run("preprocess", data_path=folder / f"{name}.raw.h5mu", out_path=folder / f"{name}.h5mu", **like)
    return folder


def test_shared_genes_keep_their_embedding_and_new_ones_begin_at_the_mean(data, tmp_path, capsys):
    flags = {"data_path": data / "some.h5mu", "ckpt_dir": tmp_path, "model_name": "run"}
    run("pretrain_rna", **flags, **STILL, continue_from=data / "rna")
    assert "60 of 80 genes keep their embedding, 20 new ones begin at the mean" in capsys.readouterr().out
    saved, state = load_model(tmp_path / "run", "rna"), state_of("rna")
    rows = {gene: row for gene, row in zip(genes(), state["pos_emb.emb.weight"], strict=True)}
    for gene, row in zip(saved.features["rna"], saved.state["encoder.gene_embedding.weight"], strict=True):
        expected = rows.get(gene, state["pos_emb.emb.weight"].double().mean(0).float())
        torch.testing.assert_close(row, expected, atol=0 if gene in rows else 1e-6, rtol=0)
    same = load_model(data / "rna", "rna").state.keys() - {"encoder.gene_embedding.weight"}
    earlier = load_model(data / "rna", "rna").state
    assert all(torch.equal(saved.state[name], earlier[name]) for name in same)
    assert not saved.config["rna"].freeze_gene_embedding  # the new genes must learn
    assert saved.parents["continue_from"] == load_model(data / "rna", "rna").hash


@pytest.mark.parametrize("kind", ["rna", "atac"])
def test_the_same_features_keep_every_weight(kind, data, tmp_path):
    flags = {"data_path": data / "same.h5mu", "ckpt_dir": tmp_path, "model_name": "run"}
    run(f"pretrain_{kind}", **flags, **STILL, continue_from=data / kind)
    assert_same_tensors(weights(tmp_path / "run"), weights(data / kind))
    shape = load_model(tmp_path / "run", kind).config[kind]
    assert shape == load_model(data / kind, kind).config[kind]


def test_other_peaks_begin_at_the_mean_of_their_position(data, tmp_path, capsys):
    flags = {"data_path": data / "some.h5mu", "ckpt_dir": tmp_path, "model_name": "run"}
    run("pretrain_atac", **flags, **STILL, continue_from=data / "atac")
    assert "260 of 285 peaks keep their embedding" in capsys.readouterr().out
    saved, earlier = load_model(tmp_path / "run", "atac"), load_model(data / "atac", "atac")
    old = {peak: i for i, peak in enumerate(earlier.features["atac"])}
    size, old_size = len(saved.state["encoder.peak_rows"]), len(earlier.state["encoder.peak_rows"])
    assert (size, old_size) == (18, 19)
    for name in ("encoder.peak_rows", "head.to_peaks.weight", "head.to_peaks.bias"):
        for position in range(size):
            shared = [old[peak] % old_size for peak in saved.features["atac"][position::size] if peak in old]
            expected = earlier.state[name][shared].mean(0)
            torch.testing.assert_close(saved.state[name][position], expected, atol=1e-6, rtol=0)


def test_a_peak_with_a_row_of_its_own_keeps_it():
    shape = ATAC_SHAPE.__class__(n_patches=4, dim=8, depth=1, heads=2, dim_head=4, patch_maps="own")
    old, new = np.array(PEAKS[:30]), np.array([*PEAKS[5:20], "chr9:1-2"])
    torch.manual_seed(0)
    before, after = (MaskedATAC(ATACEncoder(shape, len(names))) for names in (old, new))
    parent = SavedModel("atac", {"atac": shape}, {"atac": old}, {}, before.state_dict())
    encoder = EarlierEncoder.of(parent, new, "cells.h5ad", {})
    encoder.load_into(after)
    assert torch.equal(after.encoder.peak_rows[:15], before.encoder.peak_rows[5:20])
    torch.testing.assert_close(after.encoder.peak_rows[15], before.encoder.peak_rows.mean(0))


def test_carried_rows():
    rows = torch.tensor([[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]])
    found = carry(rows, np.array([0, 1, 2]), np.array([3, 3, 0]), 4)
    assert found.tolist() == [[6, 60], [3, 30], [3, 30], [1.5, 15]]


def test_a_run_that_goes_on_from_a_folder_can_be_resumed(data, tmp_path):
    flags = {"data_path": data / "some.h5mu", "ckpt_dir": tmp_path, "continue_from": data / "rna"} | TRAINING
    run("pretrain_rna", **flags, model_name="whole", tokens="expressed")
    run("pretrain_rna", **flags, model_name="parts", tokens="expressed", max_steps=5)
    run("pretrain_rna", **flags, model_name="parts", tokens="expressed", resume=True)
    assert load_model(tmp_path / "parts", "rna").config["rna"].tokens == "expressed"
    assert_same_tensors(last_weights(tmp_path / "parts"), last_weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("script", "data_name", "flags", "words"),
    [
        ("pretrain_rna", "none", {}, ["none.h5mu", "genes"]),
        ("pretrain_atac", "none", {}, ["none.h5mu", "peaks"]),
        ("pretrain_rna", "same", {"dim": 64}, ["--dim"]),
        ("pretrain_atac", "same", {"n_patches": 8}, ["--n_patches"]),
        ("pretrain_rna", "same", {"gene_embedding": "coexpression"}, ["--continue_from"]),
        ("pretrain_rna", "same", {"continue_from": "atac"}, ["pretrain_rna.py", "pretrain_atac.py"]),
    ],
)
def test_what_does_not_go_together(script, data_name, flags, words, data, tmp_path, capsys):
    parent = data / flags.pop("continue_from", script.removeprefix("pretrain_"))
    given = {"data_path": data / f"{data_name}.h5mu", "ckpt_dir": tmp_path, "model_name": "run"} | TRAINING | flags
    assert lacks(error_of(capsys, script, **given, continue_from=parent), *words) == []


def test_other_normalisation_is_refused(data, tmp_path, capsys):
    run("preprocess", data_path=data / "some.raw.h5mu", out_path=tmp_path / "c.h5mu", target_sum=5000)
    flags = {"data_path": tmp_path / "c.h5mu", "ckpt_dir": tmp_path, "model_name": "run", "continue_from": data / "rna"}
    assert lacks(error_of(capsys, "pretrain_rna", **flags, **TRAINING), "c.h5mu", "--target_sum 10000") == []


def test_a_folder_trained_here_is_continued_too(data, tmp_path):
    same = {"data_path": data / "same.h5mu", "ckpt_dir": tmp_path}
    run("pretrain_rna", **same, model_name="first", **RNA)
    run("pretrain_rna", **same, model_name="second", **STILL, continue_from=tmp_path / "first")
    assert_same_tensors(weights(tmp_path / "second"), weights(tmp_path / "first"))
    run("pretrain_atac", **same, model_name="a", **ATAC)
    run("pretrain_atac", **same, model_name="b", **STILL, continue_from=tmp_path / "a")
    assert_same_tensors(weights(tmp_path / "b"), weights(tmp_path / "a"))


def test_the_recording_has_the_sizes_that_these_tests_count_on():
    assert (len(genes()), len(PEAKS)) == (published.N_TOKENS, published.N_PEAKS)
