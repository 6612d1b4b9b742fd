"""Stage II of one modality, where no cell has both: what it trains, and what starts from it."""

import anndata as ad
import numpy as np
import pytest
from torch import nn

from tests.helpers import MULTIMODAL, TRAINING, error_of, lacks, records, run, weights
from utils.errors import UserError
from utils.train.fine_tune import parts_for_head, with_head
from utils.train.model_folder import load_model

LOSS = {"rna": "rna_mse", "atac": "atac_bce"}


@pytest.fixture(scope="module", params=["rna", "atac"])
def one(request, ready_file, runs, tmp_path_factory):
    """The modality, and a folder of stage II that has learned from it alone."""
    folder = tmp_path_factory.mktemp("one")
    encoder = {f"{request.param}_model_path": runs[request.param]}
    run("pretrain_multimodal", data_path=ready_file, ckpt_dir=folder, model_name="one", **encoder, **MULTIMODAL)
    return request.param, folder / "one"


def test_it_learns_to_reconstruct_and_knows_one_modality(one, runs):
    name, folder = one
    losses = [row[LOSS[name]] for row in records(folder, "train")]
    assert losses[-1] < losses[0] and losses == [row["loss"] for row in records(folder, "train")]
    saved = load_model(folder, "multimodal")
    assert saved.features.keys() == saved.config.keys() - {"fusion"} == {name}
    assert {key.split(".")[1] for key in saved.state if key.startswith(("towers.", "decoders."))} == {name}
    first = weights(runs[name])
    assert not np.array_equal(weights(folder)[f"towers.{name}.encoder.norm.weight"], first["encoder.norm.weight"])


def test_a_cell_type_model_starts_from_it(one, ready_file, tmp_path):
    """With all of its weights but the decoders, and the same embedding of each cell."""
    name, folder = one
    flags = {"data_path": ready_file, "pretrained_model_path": folder, "ckpt_dir": tmp_path, "model": "types"}
    still = TRAINING | {"epochs": 1, "learning_rate": 0.0}
    run("train_missing_celltype_func", **flags, other_modality="zeros", **still)
    parent, types = weights(folder), weights(tmp_path / "types")
    kept = {key for key in parent if not key.startswith("decoders.")}
    assert kept == {key for key in types if not key.startswith("head.")}
    assert all(np.array_equal(parent[key], types[key]) for key in kept)
    embeddings = []
    for model in (folder, tmp_path / "types"):
        out = tmp_path / f"{model.name}.h5ad"
        run("get_latent_emb", what="cells", data_path=ready_file, model_path=model, out_path=out, device="cpu")
        embeddings.append(ad.read_h5ad(out).X)
    np.testing.assert_array_equal(*embeddings)
    assert np.std(embeddings[0], axis=0).max() > 0
    assert load_model(tmp_path / "types", "celltype").model_config.inputs == (name,)


def test_it_is_no_teacher(one, ready_file, tmp_path, capsys):
    name, folder = one
    flags = {"data_path": ready_file, "model_path": folder, "ckpt_dir": tmp_path}
    line = error_of(capsys, "get_latent_emb", **flags)
    assert lacks(line, str(folder), name.upper(), "pretrain_multimodal.py") == []
    latents = {"dir_train": tmp_path, "dir_val": tmp_path, "model_name": "student"}
    line = error_of(capsys, "pretrain_missing_mod", **flags, **latents)
    assert lacks(line, str(folder), name.upper(), "pretrain_multimodal.py") == []


@pytest.mark.parametrize("other_modality", ["measured", "student"])
def test_fine_tuning_does_not_look_for_the_other(one, other_modality):
    _, folder = one
    with pytest.raises(UserError, match="--other_modality zeros"):
        parts_for_head(load_model(folder, "multimodal"), other_modality, "atac")


def test_the_modality_left_out_follows_from_the_folder(one):
    name, folder = one
    parent = load_model(folder, "multimodal")
    parts, options = parts_for_head(parent, "zeros", name)  # --missing cannot name the only one
    assert options["missing"] != name
    model = with_head(parent, parts, options, lambda width: nn.Identity())
    assert set(model.towers) == {name}


def test_an_encoder_is_needed(ready_file, tmp_path, capsys):
    line = error_of(capsys, "pretrain_multimodal", data_path=ready_file, ckpt_dir=tmp_path, model_name="none")
    assert lacks(line, "--rna_model_path", "pretrain_rna.py", "pretrain_atac.py") == []
