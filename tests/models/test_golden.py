"""The published functions' recorded outputs, reproduced from the published weights.

All sizes but one are read from the files in tests/golden, so that other recordings can be put in their place.
"""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import published
from models.atac_encoder import ATACEncoder, ATACEncoderConfig, PatchHead
from models.minibatch import Minibatch
from models.rna_encoder import GeneTokens, RNAEncoder, RNAEncoderConfig
from models.scmomer import ScMomer, ScMomerConfig
from models.shapes import FusionConfig
from models.student import StudentConfig
from tests.models.helpers import ragged

FOLDER = Path(__file__).resolve().parents[1] / "golden"
ATAC_HEADS = 4  # the one size that the published weights do not show
TOLERANCE = {"atol": 1e-5, "rtol": 0}


@cache
def golden(name: str) -> dict[str, dict[str, Tensor]]:
    """Part of the file's keys before the first slash → the rest → array."""
    out: dict[str, dict[str, Tensor]] = {}
    with np.load(FOLDER / f"{name}.npz") as file:
        for key in file.files:
            part, rest = key.split("/", 1)
            out.setdefault(part, {})[rest] = torch.from_numpy(np.asarray(file[key]))
    return out


@cache
def rna_shape() -> RNAEncoderConfig:
    """Sizes of the RNA encoder, read from its recorded weights."""
    state, block = golden("rna_performer")["lm"], "performer.net.layers.0."
    dim_head = state[block + "0.fn.fast_attention.projection_matrix"].shape[1]
    return RNAEncoderConfig(
        dim=state["token_emb.weight"].shape[1],
        depth=count(state, r"performer\.net\.layers\.\d+\.0\.fn\.to_q\.weight"),
        heads=len(state[block + "0.fn.to_q.weight"]) // dim_head,
        dim_head=dim_head,
        ff_mult=len(state[block + "1.fn.fn.w1.bias"]) // state["token_emb.weight"].shape[1],
        tokens="all",
    )


@cache
def atac_shape() -> ATACEncoderConfig:
    """Sizes of the ATAC encoder, read from its recorded weights."""
    state = golden("atac_vit")["vit"]
    _, n_positions, dim = state["embeddings.position_embeddings"].shape
    return ATACEncoderConfig(
        n_patches=n_positions - 1,  # the first position is the class token's
        dim=dim,
        depth=count(state, r"encoder\.layer\.\d+\.attention\.attention\.query\.weight"),
        heads=ATAC_HEADS,
        dim_head=len(state["encoder.layer.0.attention.attention.query.weight"]) // ATAC_HEADS,
        ff_mult=len(state["encoder.layer.0.intermediate.dense.bias"]) // dim,
    )


@cache
def scmomer_shape() -> ScMomerConfig:
    """Sizes of the whole model, read from its recorded weights; the encoders are those of stage I."""
    state = golden("scmomer")["scmomer"]
    return ScMomerConfig(
        rna=replace(rna_shape(), binning="round"),
        atac=atac_shape(),
        fusion=FusionConfig(
            latent_dim=len(state["rna_projection.weight"]), pair_hidden=len(state["sub_task.linear1.weight"])
        ),
        student=StudentConfig(student_hidden=len(state["encoder.encoder.0.weight"])),
        missing="atac",
    )


def count(state: dict[str, Tensor], pattern: str) -> int:
    """How many weights have a name like this."""
    return sum(re.fullmatch(pattern, name) is not None for name in state)


def width(name: str, values: str) -> int:
    """Genes or peaks of the recorded cells."""
    return golden(name)["in"][values].shape[1]


def linear(state: dict[str, Tensor], name: str) -> nn.Linear:
    weight = state[name + ".weight"]
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": state[name + ".bias"]})
    return layer


def ours(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a golden file, from the published names to ours."""
    translate = {
        "rna_performer": published.rna_encoder,
        "atac_vit": published.atac_encoder,
        "scmomer": published.scmomer,
    }
    return translate[name](state)


@cache
def shell(name: str) -> nn.Module:
    """The module whose weights a golden file holds."""
    if name == "rna_performer":
        return RNAEncoder(rna_shape(), width(name, "tokens")).eval()
    if name == "atac_vit":
        return ATACEncoder(atac_shape(), width(name, "accessibility")).eval()
    return ScMomer(scmomer_shape(), width(name, "expression"), width(name, "accessibility")).eval()


def load(name: str, state: dict[str, Tensor]) -> nn.Module:
    """The module of a golden file with all its weights replaced, strictly."""
    module = shell(name)
    module.load_state_dict(ours(name, state), strict=True)
    return module


@cache
def student_shell() -> ScMomer:
    shape = replace(scmomer_shape(), other_modality="student")
    return ScMomer(shape, width("scmomer", "expression"), width("scmomer", "accessibility")).eval()


WEIGHTS = {"rna_performer": "lm", "atac_vit": "vit", "scmomer": "scmomer"}


@torch.no_grad()
def rna_outputs(cells: slice) -> dict[str, Tensor]:
    recorded = golden("rna_performer")
    states = load("rna_performer", recorded["lm"])(
        GeneTokens(recorded["in"]["tokens"][cells], torch.arange(width("rna_performer", "tokens")), None)
    )
    return {"encodings": states, "logits": linear(recorded["lm"], "to_out")(states)}


@torch.no_grad()
def atac_outputs(cells: slice) -> dict[str, Tensor]:
    recorded = golden("atac_vit")
    states, pooled = load("atac_vit", recorded["vit"])(ragged(recorded["in"]["accessibility"][cells]))
    return {"last_hidden_state": states, "pooled": pooled}


@torch.no_grad()
def scmomer_outputs(cells: slice) -> dict[str, Tensor]:
    recorded = golden("scmomer")
    teacher = load("scmomer", recorded["scmomer"])
    rna, atac = (ragged(recorded["in"][name][cells]) for name in ("expression", "accessibility"))
    n_cells = len(rna)
    batch = Minibatch(torch.arange(n_cells), torch.arange(n_cells), torch.ones(n_cells), n_cells, rna, atac)
    latents = teacher.latents(batch)
    embedding = teacher.embed(batch)
    student = student_shell()
    student.load_state_dict(teacher.state_dict(), strict=True)
    rna_only = student.embed(replace(batch, atac=None))
    return {
        "atac_recon": teacher.decoders["atac"](embedding),
        "rna_recon": teacher.decoders["rna"](embedding),
        "pair_logits": teacher.pair_head(embedding),
        "teacher_atac_latent": latents["atac"],
        "student_atac_latent": student.latents(replace(batch, atac=None))["atac"],
        "rna_only_atac_recon": student.decoders["atac"](rna_only),
        "rna_only_rna_recon": student.decoders["rna"](rna_only),
        "rna_only_cell_embedding": rna_only,
    }


RECORDED = [
    ("rna_performer", rna_outputs, set()),
    ("atac_vit", atac_outputs, {"masked_bce_loss"}),  # has a test of its own
    ("scmomer", scmomer_outputs, set()),
]


@pytest.mark.parametrize(("name", "outputs", "elsewhere"), RECORDED, ids=[case[0] for case in RECORDED])
def test_every_recorded_output_is_reproduced_alone_and_in_a_batch(name, outputs, elsewhere):
    recorded = golden(name)["out"]
    together = outputs(slice(None))
    assert together.keys() == recorded.keys() - elsewhere
    n_cells = len(next(iter(together.values())))
    assert n_cells >= 3
    alone = [outputs(slice(cell, cell + 1)) for cell in range(n_cells)]
    for key, values in together.items():
        assert recorded[key].std() > 1e-2  # the record says something
        torch.testing.assert_close(values, recorded[key], **TOLERANCE)
        torch.testing.assert_close(torch.cat([one[key] for one in alone]), recorded[key], **TOLERANCE)


def test_recorded_tokens_include_the_mask_token():
    n_tokens = len(golden("rna_performer")["lm"]["token_emb.weight"])
    assert set(golden("rna_performer")["in"]["tokens"].unique().tolist()) == set(range(n_tokens))


@torch.no_grad()
def test_masked_patch_loss_is_reproduced():
    recorded = golden("atac_vit")
    encoder = load("atac_vit", recorded["vit"])
    head = PatchHead(encoder)
    head.to_peaks = linear(recorded["vit"], "decoder_pred")
    atac, hidden = ragged(recorded["in"]["accessibility"]), recorded["in"]["masked_patches"]
    states, _ = encoder(atac, hidden)
    n_hidden = hidden.sum(1)  # here not equally many in each cell
    logits, is_open = head.masked_peaks(states[:, 1:], atac, hidden, int(n_hidden.max()))
    counted = torch.arange(logits.shape[1]) < n_hidden[:, None]
    logits, is_open = logits[counted], is_open[counted]
    assert logits.shape == (int(hidden.sum()), len(recorded["vit"]["decoder_pred.weight"]))
    weight = recorded["vit"]["loss_fn.pos_weight"].squeeze()
    assert weight.item() == 20
    loss = F.binary_cross_entropy_with_logits(logits, is_open, pos_weight=weight)
    torch.testing.assert_close(loss, recorded["out"]["masked_bce_loss"], **TOLERANCE)


def with_module(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("name", WEIGHTS)
def test_prefix_of_a_distributed_wrapper_is_read_over(name):
    state = golden(name)[WEIGHTS[name]]
    wrapped = with_module(state)
    plain = ours(name, state)
    prefixed = ours(name, wrapped)
    assert plain.keys() == prefixed.keys()
    assert all(torch.equal(plain[key], prefixed[key]) for key in plain)


# Names of the published files that have no place in ours: counters, constants of a loss, heads of other stages.
WITHOUT_A_PLACE = {
    "rna_performer": {"performer.calls_since_last_redraw", "to_out.weight", "to_out.bias"},
    "atac_vit": {"loss_fn.pos_weight", "decoder_pred.weight", "decoder_pred.bias"},
    "scmomer": {
        "rna_model.model.performer.calls_since_last_redraw",
        "atac_model.loss_fn.pos_weight",
        "atac_model.decoder_pred.weight",
        "atac_model.decoder_pred.bias",
    },
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_missing_weight_is_an_error(name):
    state = golden(name)[WEIGHTS[name]]
    # A stage I file may lack it: later stages have dropped the mask token, and nothing reads it there.
    optional = WITHOUT_A_PLACE[name] | {"embeddings.mask_token"}
    for missing in state.keys() - optional:
        with pytest.raises((RuntimeError, KeyError)):
            load(name, {key: tensor for key, tensor in state.items() if key != missing})


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight_arrives(name):
    """No weight but the known few is lost on the way: change it, and ours changes."""
    state = golden(name)[WEIGHTS[name]]
    before = ours(name, state)
    for changed in state.keys() - WITHOUT_A_PLACE[name]:
        after = ours(name, state | {changed: state[changed] + 1})
        moved = [key for key in before if not torch.equal(before[key], after[key])]
        assert len(moved) == 1, changed


# {} stands for the number of a layer that the recorded model does not have.
EXTRA = [
    ("rna_performer", "to_extra.weight"),
    ("rna_performer", "performer.net.layers.0.0.fn.to_q.bias"),
    ("rna_performer", "performer.net.layers.{}.0.fn.fast_attention.projection_matrix"),
    ("rna_performer", "performer.net.layers.0.1.fn.fn.w3.weight"),
    ("atac_vit", "encoder.layer.0.extra.weight"),
    ("atac_vit", "encoder.layer.{}.layernorm_before.weight"),
    ("scmomer", "rna_projection.bias"),
    ("scmomer", "encoder.encoder.6.weight"),
    ("scmomer", "batch_head.weight"),
]


@pytest.mark.parametrize(("name", "extra"), EXTRA, ids=[f"{name}-{extra}" for name, extra in EXTRA])
def test_an_extra_weight_is_an_error(name, extra):
    extra = extra.format((rna_shape() if name == "rna_performer" else atac_shape()).depth)
    with pytest.raises((RuntimeError, KeyError, ValueError)):
        load(name, golden(name)[WEIGHTS[name]] | {extra: torch.zeros(3)})


def test_rounding_and_flooring_differ_on_the_recorded_cells():
    """Else the recorded outputs would not say which of the two was computed."""
    rna = ragged(golden("scmomer")["in"]["expression"])
    encoders = [
        RNAEncoder(replace(rna_shape(), binning=how), width("scmomer", "expression")) for how in ("round", "floor")
    ]
    tokens = [encoder.tokenize(rna).bins for encoder in encoders]
    share = (tokens[0] != tokens[1]).float().mean()
    assert 0.05 < share < 0.95
    assert torch.equal(tokens[0], golden("scmomer")["in"]["expression"].round().clamp(0, 5).long())
    assert torch.equal(tokens[1], golden("scmomer")["in"]["expression"].floor().clamp(0, 5).long())
