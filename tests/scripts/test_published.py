"""Published files, imported by the script: what they compute, what comes back, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy.sparse import csr_matrix
from torch import nn

from models.rna_encoder import MASK_TOKEN
from models.shapes import FusionConfig, RNAEncoderConfig
from tests import published
from tests.helpers import ATAC_SHAPE, CPU, RNA_SHAPE, run
from tests.published import CLASSES, LAYOUTS, N_PEAKS, N_TOKENS, PEAKS, genes, golden, import_state, state_of
from utils.cells.minibatches import CellDataset, MicroBatch
from utils.cells.preprocessed import STAMP
from utils.features.normalise import log_normalise
from utils.files.file_hash import file_hash
from utils.predict.infer import infer, predict
from utils.predict.translation import translate
from utils.train.config import InferConfig
from utils.train.folders import write_folder
from utils.train.model_folder import SavedModel, load_model
from utils.train.published import EXTRA_TOKEN

TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Layout → the folder that the script made of it."""
    return {layout: import_state(tmp_path_factory.mktemp(layout), layout) for layout in LAYOUTS}


def dataset(**values: torch.Tensor) -> CellDataset:
    """Cells with these model values, as the scripts hand them to a model."""
    n_cells = len(next(iter(values.values())))
    matrices = {name: csr_matrix(value.numpy().astype(np.float32)) for name, value in values.items()}
    return CellDataset(matrices, pd.Index([f"cell{i}" for i in range(n_cells)]))


def close(ours: np.ndarray, recorded: torch.Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(np.asarray(ours)), recorded, **TOLERANCE)


# What an imported model computes ----------------------------------------------------------------------------------


def test_stage_1_rna_gives_the_recorded_outputs(folders):
    recorded = golden("rna_performer")
    tokens = recorded["in"]["tokens"]
    model = load_model(folders["rna"], "rna").build()

    def outputs(batch):
        shown = model.encoder.tokenize(batch.rna)
        hidden = tokens[batch.row] == MASK_TOKEN
        states = model.encoder(shown._replace(bins=shown.bins.masked_fill(hidden, MASK_TOKEN)))
        return states, model.head(states)

    cells = dataset(rna=tokens.where(tokens != MASK_TOKEN, 0))
    encodings, logits = infer(outputs, model, cells, InferConfig(2), CPU, "test")
    close(encodings, recorded["out"]["encodings"])
    close(logits, recorded["out"]["logits"])


def test_stage_1_atac_gives_the_recorded_outputs(folders):
    recorded = golden("atac_vit")
    model = load_model(folders["atac"], "atac").build()
    cells = dataset(atac=recorded["in"]["accessibility"])
    states, pooled = infer(lambda batch: model.encoder(batch.atac), model, cells, InferConfig(3), CPU, "test")
    close(states, recorded["out"]["last_hidden_state"])
    close(pooled, recorded["out"]["pooled"])


def preprocessed(path: Path) -> Path:
    """The recorded cells as preprocess.py would have written them: their values are given, not their counts."""
    recorded = golden("scmomer")["in"]
    obs = pd.DataFrame({"split": "train"}, index=[f"cell{i}" for i in range(len(recorded["expression"]))])
    parts = {"rna": ("expression", genes()), "atac": ("accessibility", PEAKS)}
    mdata = mudata.MuData(
        {
            name: ad.AnnData(csr_matrix(recorded[key].numpy()), obs.copy(), pd.DataFrame(index=features))
            for name, (key, features) in parts.items()
        }
    )
    mdata.obs = obs
    mdata.uns[STAMP] = json.dumps({"version": 1, "target_sum": 1e4, "log_base": 2, "label_column": None})
    mdata.write(path)
    return path


@pytest.mark.parametrize("layout", ["multimodal"])
def test_stage_2_gives_the_recorded_outputs_by_the_script(layout, folders, tmp_path):
    path = preprocessed(tmp_path / "cells.h5mu")
    run("get_latent_emb", data_path=path, model_path=folders[layout], ckpt_dir=tmp_path / "latents", device="cpu")
    latents, recorded = ad.read_h5ad(tmp_path / "latents" / "train.h5ad"), golden("scmomer")["out"]
    close(latents.obsm["atac"], recorded["teacher_atac_latent"])
    model = load_model(folders[layout], layout).build()
    with torch.no_grad():
        embedding = torch.from_numpy(latents.X)
        close(model.decoders["rna"](embedding), recorded["rna_recon"])
        close(model.decoders["atac"](embedding), recorded["atac_recon"])
        close(model.pair_head(embedding), recorded["pair_logits"])


def test_stage_3_gives_the_recorded_outputs(folders):
    recorded = golden("scmomer")
    saved = load_model(folders["student"], "student")
    cells = dataset(rna=recorded["in"]["expression"])
    found = translate(saved, cells, InferConfig(2), CPU)  # as downstream.translate does
    close(found.left[:, :-1], recorded["out"]["rna_only_cell_embedding"])
    close(found.left @ found.right, recorded["out"]["rna_only_atac_recon"])
    model = saved.build()
    latent, rna = infer(
        lambda batch: (model.latents(batch)["atac"], model.decoders["rna"](model.embed(batch))),
        model,
        cells,
        InferConfig(),
        CPU,
        "test",
    )
    close(latent, recorded["out"]["student_atac_latent"])
    close(rna, recorded["out"]["rna_only_rna_recon"])


def test_a_classifier_of_scmomer_reads_the_recorded_embedding(folders):
    recorded, state = golden("scmomer"), state_of("celltype")
    saved = load_model(folders["celltype"], "celltype")
    found = predict(saved, dataset(rna=recorded["in"]["expression"]), InferConfig(), CPU)
    hidden, logits = ((state[f"{name}.weight"], state[f"{name}.bias"]) for name in published.CLASSIFIER)
    embedding = recorded["out"]["rna_only_cell_embedding"]
    expected = (torch.relu(embedding @ hidden[0].T + hidden[1]) @ logits[0].T + logits[1]).softmax(1)
    close(found.embedding, embedding)
    close(found["probability"], expected)
    assert list(found["predicted_cell_type"]) == [CLASSES[i] for i in expected.argmax(1)]


class PlainHead(nn.Module):
    """scBERT's classifier head, from its documented layers: a convolution over genes, then three linear layers."""

    def __init__(self, dim: int, n_tokens: int, n_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 1, (1, dim))
        self.fc1, self.fc2, self.fc3 = nn.Linear(n_tokens, 512), nn.Linear(512, 128), nn.Linear(128, n_classes)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[B, L, dim] → [B, classes]; dropout is off."""
        x = self.conv1(states[:, None]).relu().flatten(1)
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


def counts_file(path: Path, names: list[str], seed: int = 0, n_cells: int = 24) -> Path:
    """Raw counts of these genes, and of some that the model does not know, in another order."""
    rng = np.random.default_rng(seed)
    names = [*names, *genes(150)[N_TOKENS:]]
    counts = rng.negative_binomial(1, 0.02, (n_cells, len(names))) * (rng.random((n_cells, len(names))) < 0.4)
    counts[:, 0] = 1
    order = rng.permutation(len(names))
    obs = pd.DataFrame({"cell_type": rng.choice(CLASSES[:2], n_cells)}, index=[f"c{i}" for i in range(n_cells)])
    ad.AnnData(csr_matrix(counts[:, order].astype(np.float32)), obs, pd.DataFrame(index=np.array(names)[order])).write(
        path
    )
    return path


@torch.no_grad()
def test_a_classifier_of_scbert_predicts_through_its_own_head(folders, tmp_path):
    cells = ad.read_h5ad(counts_file(tmp_path / "cells.h5ad", genes()[:-1]))
    # The release's steps: normalise, round down to a bin of 5 at most, add the last token, encode, and its head.
    values = log_normalise(cells[:, genes()[:-1]].X.tocsr(), 1e4).toarray()
    bins = np.append(np.floor(values).clip(0, 5), np.zeros((len(values), 1)), axis=1)
    state, rows = dict(state_of("scbert")), np.arange(len(bins))
    encoder = load_model(folders["rna"], "rna").build().encoder  # its outputs are the recorded ones
    encoder.gene_embedding.weight.copy_(state["pos_emb.emb.weight"])
    ready = dataset(rna=torch.from_numpy(bins))[MicroBatch(rows, np.ones(len(rows), np.float32), 0, len(rows))]
    states = encoder(encoder.tokenize(ready.rna))
    head = PlainHead(states.shape[2], N_TOKENS, len(CLASSES))
    head.load_state_dict({name.removeprefix("to_out."): x for name, x in state.items() if name.startswith("to_out.")})
    logits = head(states)
    head.fc3.weight /= logits.std(0)[:, None]  # random weights would give all cells the same class
    head.fc3.bias.copy_((head.fc3.bias - logits.mean(0)) / logits.std(0))
    expected = head(states).softmax(1)
    assert len(set(expected.argmax(1).tolist())) > 2

    state |= {f"to_out.{name}": x for name, x in head.state_dict().items()}
    folder = import_state(tmp_path, "scbert", state)
    saved = load_model(folder, "celltype")
    assert list(saved.features["rna"]) == [*genes()[:-1], EXTRA_TOKEN]
    assert (saved.stamp["target_sum"], saved.config["rna"].binning) == (1e4, "floor")
    run("predict_cell_type", data_path=tmp_path / "cells.h5ad", model_path=folder, device="cpu")
    labelled = ad.read_h5ad(tmp_path / "cells.predicted.h5ad")
    close(labelled.obsm["cell_type_probability"].to_numpy(), expected)
    assert list(labelled.obs["predicted_cell_type"]) == [CLASSES[i] for i in expected.argmax(1)]
    close(labelled.obsm["X_scmomer"], head.fc1(head.conv1(states[:, None]).relu().flatten(1)).relu())


# What comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["model_state_dict", "bare", "module.", "both"])
def test_export_after_import_is_the_identity(form, layout, tmp_path):
    state = state_of(layout)
    if form in ("module.", "both"):
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    content = state if form in ("bare", "module.") else {"epoch": 7, "model_state_dict": state, "losses": 0.1}
    folder = import_state(tmp_path, layout, content)
    run("export_published", model_path=folder, out_path=tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model_state_dict"]
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert back[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    assert abs((tmp_path / "back.pth").stat().st_size - (tmp_path / f"{layout}.pth").stat().st_size) < 5000


def test_the_folder_says_where_it_comes_from(folders):
    words = {
        "rna": "RNA encoder of stage I",
        "scbert": "classifier of scBERT",
        "student": "stage III",
    }
    for layout, named in words.items():
        saved = load_model(folders[layout], layout if layout != "scbert" else "celltype")
        source = folders[layout].with_suffix(".pth")
        ((role, digest),) = saved.parents.items()
        assert digest == file_hash(source)
        assert saved.stamp["source"] == [{"name": source.name, "sha256": digest}]
        card = (folders[layout] / "README.md").read_text()
        assert all(text in card for text in (named, digest, source.name))
        assert named in saved.training["published"]
        assert named in role
    assert load_model(folders["student"], "student").config["rna"].binning == "round"


def test_the_additional_token_tells_scberts_language_model_from_stage_1(tmp_path):
    folder = import_state(tmp_path, "rna", gene_reference=tmp_path / "genes_but_one.txt")
    saved = load_model(folder, "rna")
    assert saved.training["published"] == "scBERT's masked language model"
    assert saved.features["rna"][-1] == EXTRA_TOKEN
    assert len(saved.features["rna"]) == N_TOKENS


def test_former_symbols_are_updated_where_they_stay_unique(tmp_path):
    published.write_lists(tmp_path)
    listed = genes()
    names = ["MARCH1", "TAZ", "TAFAZZIN", *[gene for gene in listed if gene not in ("MARCHF1", "TAFAZZIN")]][:N_TOKENS]
    (tmp_path / "old.txt").write_text("gene\n" + "\n".join(names))
    saved = load_model(import_state(tmp_path, "rna", gene_reference=tmp_path / "old.txt"), "rna")
    assert list(saved.features["rna"][:3]) == ["MARCHF1", "TAZ", "TAFAZZIN"]


@pytest.mark.parametrize("missing", [True, False], ids=["the file lacks it", "compared"])
def test_gene2vec(missing, tmp_path, capsys):
    state, name = state_of("scbert"), "pos_emb.emb.weight"
    np.save(tmp_path / "gene2vec.npy", state[name][:-1].numpy().astype(np.float64))
    shown = {key: tensor for key, tensor in state.items() if not (missing and key == name)}
    folder = import_state(tmp_path, "scbert", shown, gene2vec=tmp_path / "gene2vec.npy")
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights["towers.rna.encoder.gene_embedding.weight"], state[name])
    assert ("as the file lacks it" if missing else f"{name} is that of") in capsys.readouterr().out


# Folders that were trained here -----------------------------------------------------------------------------------


def own_folder(path: Path, kind: str, **changes) -> SavedModel:
    """A folder like those of the training scripts, with random weights."""
    atac = replace(ATAC_SHAPE, n_patches=10)
    parts = {"rna": {"rna": RNA_SHAPE}, "atac": {"atac": atac}}.get(kind)
    parts = parts or {"rna": replace(RNA_SHAPE, binning="round"), "atac": atac, "fusion": FusionConfig(16, 8)}
    stamp = {"version": 1, "target_sum": 1e4, "log_base": 2}
    features = {name: x for name, x in (("rna", genes()), ("atac", PEAKS)) if name in parts}
    saved = SavedModel(kind, parts, {name: np.array(x) for name, x in features.items()}, stamp)
    saved = replace(saved, **changes)
    torch.manual_seed(0)
    module = saved._fresh({name: len(x) for name, x in saved.features.items()})
    write_folder(path, saved.writer(module))
    return load_model(path, kind)


@pytest.mark.parametrize("kind", ["rna", "atac", "multimodal"])
def test_our_own_folder_goes_out_and_comes_back(kind, tmp_path):
    saved = own_folder(tmp_path / "own", kind)
    run("export_published", model_path=tmp_path / "own", out_path=tmp_path / "own.pth")
    flags = published.flags_of(kind, tmp_path) | ({} if kind == "rna" else {"atac_heads": ATAC_SHAPE.heads})
    published.write_lists(tmp_path)
    run("import_published", checkpoint=tmp_path / "own.pth", ckpt_dir=tmp_path, model_name="back", **flags)
    back = load_model(tmp_path / "back", kind)
    unread = {"towers.atac.encoder.mask_token"}  # of stage I, which no joined file has
    assert back.state.keys() == saved.state.keys()
    assert all(torch.equal(back.state[name], saved.state[name]) for name in saved.state.keys() - unread)
    for part, shape in saved.config.items():
        ours = {"n_features": 0, "freeze_gene_embedding": False}
        assert shape == (replace(back.config[part], **ours) if isinstance(shape, RNAEncoderConfig) else shape)


def test_a_head_that_standardises_is_exported_as_one_that_does_not(folders, tmp_path):
    saved = load_model(folders["celltype"], "celltype")
    state = dict(saved.state)
    state["head.mean"], state["head.deviation"] = torch.randn(128), torch.rand(128) + 0.5
    write_folder(tmp_path / "own", replace(saved, state=state).write)
    run("export_published", model_path=tmp_path / "own", out_path=tmp_path / "own.pth")
    published.write_lists(tmp_path)
    flags = {"gene_reference": tmp_path / "genes.txt", "labels": tmp_path / "labels.txt"}
    run("import_published", checkpoint=tmp_path / "own.pth", ckpt_dir=tmp_path, model_name="back", **flags)
    cells, before = dataset(rna=golden("scmomer")["in"]["expression"]), load_model(tmp_path / "own", "celltype")
    after = load_model(tmp_path / "back", "celltype")
    assert not after.state["head.mean"].any()
    probability = [predict(model, cells, InferConfig(), CPU)["probability"] for model in (before, after)]
    np.testing.assert_allclose(*probability, atol=1e-5)
    assert np.abs(probability[0] - predict(saved, cells, InferConfig(), CPU)["probability"]).max() > 0.01


def test_n_peaks_are_those_of_the_recording():
    assert len(PEAKS) == N_PEAKS == golden("atac_vit")["in"]["accessibility"].shape[1]
