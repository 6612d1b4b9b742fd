"""get_latent_emb.py --what cells and genes: embeddings of any model folder, equal to a plain loop over cells."""

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

from models.rna_encoder import RNAEncoder
from tests.helpers import CPU, RNA, error_of, lacks, run
from tests.predict.test_infer import make_model
from utils.cells.minibatches import CellDataset, MicroBatch, ragged
from utils.cells.preprocessed import read_cells
from utils.evaluate.gene_features import coexpression_embedding
from utils.features.gene_vectors import read_gene_vectors
from utils.predict.gene_embeddings import gene_embeddings
from utils.train.config import InferConfig
from utils.train.model_folder import SavedModel, load_model


@pytest.fixture(scope="module")
def expressed_run(ready_file, tmp_path_factory):
    """An RNA encoder whose tokens are the expressed genes alone; that of `runs` has all genes as tokens."""
    folder = tmp_path_factory.mktemp("expressed")
    run("pretrain_rna", data_path=ready_file, ckpt_dir=folder, model_name="rna", **RNA | {"tokens": "expressed"})
    return folder / "rna"


def plain_means(encoder: RNAEncoder, values) -> tuple[np.ndarray, np.ndarray]:
    """Mean states and counts by a loop over cells, one at a time."""
    sums, counts = np.zeros((encoder.n_genes, encoder.config.dim)), np.zeros(encoder.n_genes, dtype=int)
    for row in range(values.shape[0]):
        tokens = encoder.tokenize(ragged(values, np.array([row])))
        states = encoder(tokens)[0].numpy()
        genes = np.broadcast_to(tokens.genes.numpy(), tokens.bins.shape)[0]
        for bin_, gene, state in zip(tokens.bins[0].tolist(), genes, states, strict=True):
            if 0 < bin_ < 6:
                sums[gene] += state
                counts[gene] += 1
    return sums / np.maximum(counts, 1)[:, None], counts


@pytest.mark.parametrize("tokens", ["all", "expressed"])
@torch.no_grad()
def test_streamed_gene_means_equal_a_loop_over_cells(tokens, runs, expressed_run, ready_file, tmp_path):
    model = runs["rna"] if tokens == "all" else expressed_run
    saved, cells = load_model(model, "rna"), read_cells(ready_file, ("rna",))
    assert saved.config["rna"].tokens == tokens
    encoder = saved.build().encoder
    expected, n_cells = plain_means(encoder, cells.values["rna"][:])
    assert (n_cells > 0).sum() > 20 and np.ptp(expected, axis=0).min() > 1e-3
    out = tmp_path / "genes.h5ad"
    run(
        "get_latent_emb", what="genes", data_path=ready_file, model_path=model, out_path=out, batch_size=7, device="cpu"
    )
    found = read_gene_vectors(out)
    assert found.genes.tolist() == saved.features["rna"].tolist()
    np.testing.assert_array_equal(found.n_cells, n_cells)
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)
    np.testing.assert_array_equal(found.static, encoder.gene_embedding.weight.numpy())


@torch.no_grad()
def test_a_gene_that_no_cell_expresses_has_zeros_and_the_minibatch_does_not_matter():
    model = make_model("expressed", "student")
    saved = SavedModel("celltype", {"rna": model.config.rna}, {"rna": np.array([f"g{i}" for i in range(500)])}, {})
    saved.build = lambda: model
    values = np.zeros((5, 500), np.float32)
    values[:4, :30] = np.random.default_rng(0).uniform(1, 6, (4, 30))
    values[3, 10:] = 0
    dataset = CellDataset({"rna": csr_matrix(values)}, pd.Index(list("abcde")))
    one, many = (gene_embeddings(saved, dataset, InferConfig(size, "cpu"), CPU) for size in (1, 64))
    assert one.n_cells.tolist() == [4] * 10 + [3] * 20 + [0] * 470
    assert not one.vectors[30:].any() and one.vectors[:30].any(1).all()
    np.testing.assert_allclose(one.vectors, many.vectors, atol=1e-6)


def test_gene_embeddings_of_raw_cells_by_any_stage_go_into_pretraining(runs, raw_file, ready_file, tmp_path):
    out = tmp_path / "genes.txt"
    for name in ("multimodal", "celltype_atac"):
        run("get_latent_emb", what="genes", data_path=raw_file, model_path=runs[name], out_path=out, device="cpu")
        found = read_gene_vectors(out)
        assert (len(found), found.width) == (len(load_model(runs["rna"], "rna").features["rna"]), 16)
    run(
        "pretrain_rna",
        **{"data_path": ready_file, "ckpt_dir": tmp_path, "model_name": "second", "gene_embedding_path": out},
        **RNA | {"epochs": 1},
    )
    weight = load_model(tmp_path / "second", "rna").build().encoder.gene_embedding.weight
    np.testing.assert_array_equal(weight.detach().numpy(), found.vectors)


def test_pretraining_may_embed_genes_by_their_coexpression_in_training_cells(ready_file, tmp_path, capsys):
    settings = {"data_path": ready_file, "ckpt_dir": tmp_path, "gene_embedding": "coexpression", **RNA, "epochs": 1}
    run("pretrain_rna", model_name="rna", **settings)
    saved, cells = load_model(tmp_path / "rna", "rna"), read_cells(ready_file, ("rna",))
    assert saved.config["rna"].freeze_gene_embedding
    weight = saved.build().encoder.gene_embedding.weight.detach().numpy()
    train = cells.values["rna"][np.sort(cells.rows("train"))]
    np.testing.assert_allclose(weight, coexpression_embedding(train, 16, 0), atol=1e-3)
    everything = coexpression_embedding(cells.values["rna"][:], 16, 0)
    assert np.abs(weight - everything).max() > 0.1  # validation cells are not among them
    refused = error_of(capsys, "pretrain_rna", model_name="two", **settings, gene_embedding_path="genes.txt")
    assert "--gene_embedding_path" in refused


@pytest.mark.parametrize("name", ["rna", "atac", "multimodal", "student_atac", "student_rna", "celltype_atac"])
def test_cells_of_a_raw_and_a_preprocessed_file_get_the_same_embedding(name, runs, raw_file, ready_file, tmp_path):
    embedded = []
    for path in (raw_file, ready_file):
        out = tmp_path / f"{path.stem}.h5ad"
        run("get_latent_emb", what="cells", data_path=path, model_path=runs[name], out_path=out, device="cpu")
        embedded.append(ad.read_h5ad(out))
    raw, ready = embedded
    assert raw.shape == (96, 16) and raw.uns["model_hash"] and "cell_type" in raw.obs
    assert np.ptp(raw.X, axis=0).max() > 1e-3
    np.testing.assert_allclose(raw[ready.obs_names].X, ready.X, atol=1e-5)


def test_cell_embeddings_are_those_that_prediction_writes(runs, raw_file, tmp_path):
    model, out, labelled = runs["celltype_atac"], tmp_path / "cells.h5ad", tmp_path / "labelled.h5mu"
    run("get_latent_emb", what="cells", data_path=raw_file, model_path=model, out_path=out, device="cpu")
    run("predict_cell_type", data_path=raw_file, model_path=model, out_path=labelled, device="cpu")
    cells, expected = ad.read_h5ad(out), mudata.read_h5mu(labelled)
    np.testing.assert_array_equal(cells.X, expected[cells.obs_names].obsm["X_scmomer"])


def test_cells_may_have_a_column_of_barcodes(runs, simulation, tmp_path):
    rna = simulation.mdata["rna"][:9].copy()
    rna.obs["barcode"] = [f"other {i}" for i in range(9)]
    rna.write(tmp_path / "cells.h5ad")
    flags = {"data_path": tmp_path / "cells.h5ad", "out_path": tmp_path / "out.h5ad", "device": "cpu"}
    run("get_latent_emb", what="cells", model_path=runs["celltype_atac"], **flags)
    found = ad.read_h5ad(tmp_path / "out.h5ad")
    assert list(found.obs["barcode"]) == list(rna.obs["barcode"]) and list(found.obs_names) == list(rna.obs_names)


@torch.no_grad()
def test_the_joint_model_embeds_cells_without_a_modality(runs, raw_file, ready_file, simulation, tmp_path):
    """Zeros stand for the latent that is left out; a file without the modality gives the same."""
    saved, cells = load_model(runs["multimodal"], "multimodal"), read_cells(ready_file, ("rna", "atac"))
    model, everything = saved.build(), np.arange(len(cells.obs))
    for missing, present in (("atac", "rna"), ("rna", "atac")):
        batch = CellDataset({present: cells.values[present]}, cells.obs.index)[
            MicroBatch(everything, np.ones(len(everything)), 0, len(everything))
        ]
        latent = model.towers[present](batch[present])
        expected = model.fusion({present: latent, missing: torch.zeros_like(latent)}).numpy()
        simulation.mdata[present].copy().write_h5ad(tmp_path / "alone.h5ad")
        for path in (raw_file, tmp_path / "alone.h5ad"):
            out = tmp_path / "cells.h5ad"
            flags = {"what": "cells", "data_path": path, "model_path": runs["multimodal"], "out_path": out}
            run("get_latent_emb", without=missing, device="cpu", **flags)
            found = ad.read_h5ad(out)[cells.obs.index].X
            np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"what": "teacher"}, ["--ckpt_dir"]),
        ({"what": "cells", "out_path": "x.h5ad", "without": "atac", "model": "rna"}, ["--without", "rna"]),
        ({"what": "genes", "out_path": "genes.h5ad", "without": "atac"}, ["--without", "--what cells"]),
        ({"what": "cells"}, ["--out_path"]),
        ({"what": "cells", "out_path": "cells.txt"}, ["--out_path", ".h5ad"]),
        ({"what": "genes", "out_path": "genes.csv"}, ["--out_path", ".h5ad"]),
        ({"what": "genes", "out_path": "genes.txt", "model": "atac"}, ["atac", "no genes"]),
        ({"what": "cells", "out_path": "x.h5ad", "data": "rna.h5ad", "model": "multimodal"}, ["rna.h5ad", "no atac"]),
    ],
)
def test_bad_input_is_one_sentence(flags, words, runs, simulation, raw_file, tmp_path, capsys):
    simulation.mdata["rna"].copy().write_h5ad(tmp_path / "rna.h5ad")
    data = tmp_path / flags.pop("data") if "data" in flags else raw_file
    flags = {name: tmp_path / value if name == "out_path" else value for name, value in flags.items()}
    model = runs[flags.pop("model", "multimodal")]
    line = error_of(capsys, "get_latent_emb", data_path=data, model_path=model, device="cpu", **flags)
    assert lacks(line, *words) == []
