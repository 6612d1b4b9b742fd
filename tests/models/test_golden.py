"""The published functions' recorded outputs, reproduced from the published weights.

All sizes but one are read from the files in tests/golden, so that other recordings can be put in their place.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import published
from models.atac_encoder import ATACEncoder, ATACEncoderConfig
from models.minibatch import Minibatch
from models.objectives import MaskedATAC, MaskedRNA
from models.rna_encoder import GeneTokens, RNAEncoder, RNAEncoderConfig
from models.scmomer import ScMomer, ScMomerConfig
from models.shapes import FusionConfig
from models.student import StudentConfig
from tests.models.helpers import ragged
from tests.published import ATAC_HEADS, golden

TOLERANCE = {"atol": 1e-5, "rtol": 0}


def bare(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@cache
def rna_shape() -> RNAEncoderConfig:
    """Sizes of the RNA encoder, read from its recorded weights."""
    return published.rna_config(bare(golden("rna_performer")["lm"]), "rna")


@cache
def atac_shape() -> ATACEncoderConfig:
    """Sizes of the ATAC encoder, read from its recorded weights."""
    return published.atac_config(bare(golden("atac_vit")["vit"]), "atac", ATAC_HEADS)


@cache
def scmomer_shape() -> ScMomerConfig:
    """Sizes of the whole model, read from its recorded weights."""
    state = golden("scmomer")["scmomer"]
    return ScMomerConfig(
        rna=published.rna_config(bare(state), "student"),
        atac=published.atac_config(bare(state), "student", ATAC_HEADS),
        fusion=FusionConfig(
            latent_dim=len(state["rna_projection.weight"]), pair_hidden=len(state["sub_task.linear1.weight"])
        ),
        student=StudentConfig(student_hidden=len(state["encoder.encoder.0.weight"])),
        missing="atac",
    )


def width(name: str, values: str) -> int:
    """Genes or peaks of the recorded cells."""
    return golden(name)["in"][values].shape[1]


def ours(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a golden file, from the published names to ours; all names must be known."""
    layout, classifier = published.recognise(bare(state))
    assert layout == {"rna_performer": "rna", "atac_vit": "atac", "scmomer": "student"}[name]
    table = published.table_of(layout, *published.depths(state), classifier)
    if unknown := state.keys() - table.keys() - published.without_a_place(layout):
        raise KeyError(str(unknown))
    found = published.to_ours(state, table)
    if layout == "student":  # joined files have no mask token, and nothing reads it there
        found["towers.atac.encoder.mask_token"] = torch.zeros(atac_shape().dim)
    return found


@cache
def shell(name: str) -> nn.Module:
    """The module whose weights a golden file holds: of stage I with its head."""
    if name == "rna_performer":
        return MaskedRNA(RNAEncoder(rna_shape(), width(name, "tokens")), seed=0).eval()
    if name == "atac_vit":
        return MaskedATAC(ATACEncoder(atac_shape(), width(name, "accessibility"))).eval()
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
    model = load("rna_performer", recorded["lm"])
    genes = torch.arange(width("rna_performer", "tokens"))
    states = model.encoder(GeneTokens(recorded["in"]["tokens"][cells], genes, None))
    return {"encodings": states, "logits": model.head(states)}


@torch.no_grad()
def atac_outputs(cells: slice) -> dict[str, Tensor]:
    recorded = golden("atac_vit")
    states, pooled = load("atac_vit", recorded["vit"]).encoder(ragged(recorded["in"]["accessibility"][cells]))
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
    model = load("atac_vit", recorded["vit"])
    atac, hidden = ragged(recorded["in"]["accessibility"]), recorded["in"]["masked_patches"]
    states, _ = model.encoder(atac, hidden)
    n_hidden = hidden.sum(1)  # here not equally many in each cell
    logits, is_open = model.head.masked_peaks(states[:, 1:], atac, hidden, int(n_hidden.max()))
    counted = torch.arange(logits.shape[1]) < n_hidden[:, None]
    logits, is_open = logits[counted], is_open[counted]
    assert logits.shape == (int(hidden.sum()), len(recorded["vit"]["decoder_pred.weight"]))
    weight = recorded["vit"]["loss_fn.pos_weight"].squeeze()
    assert weight.item() == 20
    loss = F.binary_cross_entropy_with_logits(logits, is_open, pos_weight=weight)
    torch.testing.assert_close(loss, recorded["out"]["masked_bce_loss"], **TOLERANCE)


# Names of the published files that have no place in ours: counters, constants of a loss, heads of other stages.
WITHOUT_A_PLACE = {
    "rna_performer": {"performer.calls_since_last_redraw"},
    "atac_vit": {"loss_fn.pos_weight"},
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
    for missing in state.keys() - WITHOUT_A_PLACE[name]:
        with pytest.raises((RuntimeError, KeyError)):
            load(name, {key: tensor for key, tensor in state.items() if key != missing})


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight_arrives_and_goes_back(name):
    """No weight but the known few is lost on the way: change it, and ours changes, and so does what is exported."""
    state = golden(name)[WEIGHTS[name]]
    before = ours(name, state)
    table = published.table_of(published.recognise(bare(state))[0], *published.depths(state))
    for changed in state.keys() - WITHOUT_A_PLACE[name]:
        there = state | {changed: state[changed] + 1}
        after = ours(name, there)
        moved = [key for key in before if not torch.equal(before[key], after[key])]
        assert len(moved) == 1, changed
        back = published.to_theirs(after, table)
        assert back.keys() == state.keys() - WITHOUT_A_PLACE[name]
        assert all(torch.equal(back[key], there[key]) for key in back)


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
