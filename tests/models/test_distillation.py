"""Distillation, stage III: its loss by hand, and what it trains."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models.objectives import (
    Distillation,
)
from models.peak_loss import peak_bce
from tests.models.helpers import (
    LATENT_DIM,
    N_GENES,
    N_PEAKS,
    minibatch,
    scmomer,
)


@torch.no_grad()
@pytest.mark.parametrize("missing", ["atac", "rna"])
def test_distillation_loss_by_hand(missing):
    model, batch = scmomer(missing=missing, other_modality="student"), minibatch()
    present = "rna" if missing == "atac" else "atac"
    loss, metrics = Distillation(model)(batch)
    stand_in = model.student(batch[present])
    latent = {present: batch.latent[present], missing: stand_in}
    embedding = model.fusion.linear(torch.cat([latent["atac"], latent["rna"]], 1))
    latent_mse = (stand_in - batch.latent[missing]).square().mean(1)
    mse = (model.decoders["rna"](embedding) - batch.rna.dense()).square().mean(1)
    bce = F.binary_cross_entropy_with_logits(
        model.decoders["atac"](embedding), batch.atac.dense(), pos_weight=torch.tensor(5.0), reduction="none"
    ).mean(1)
    torch.testing.assert_close(loss, latent_mse + mse + bce, atol=1e-5, rtol=1e-5)
    cosine = (F.normalize(stand_in, dim=1) * F.normalize(batch.latent[missing], dim=1)).sum()
    expected = {"latent_mse": latent_mse.sum(), "latent_cosine": cosine, "rna_mse": mse.sum(), "atac_bce": bce.sum()}
    assert {name: total.item() for name, (total, _) in metrics.items()} == pytest.approx(
        {name: total.item() for name, total in expected.items()}, rel=1e-4
    )


@pytest.mark.parametrize("missing", ["atac", "rna"])
def test_distillation_trains_student_fusion_and_decoders(missing):
    objective = Distillation(scmomer(missing=missing, other_modality="student"))
    assert {name for name, _ in objective.named_children()} == {"student", "fusion", "decoders"}
    assert all(p.requires_grad for p in objective.parameters())
    n_features = N_GENES if missing == "atac" else N_PEAKS
    assert objective.student.embed.weight.shape[0] == n_features


@torch.no_grad()
@pytest.mark.parametrize("missing", ["atac", "rna"])
def test_the_student_alone_reconstructs_the_whole_cell(missing):
    """Loss of stage III with `alone_weight`, by hand: the measured latent at zero."""
    model, batch = scmomer(other_modality="student", missing=missing), minibatch()
    loss, metrics_alone = Distillation(model, alone_weight=0.3)(batch)
    stand_in = model.student(batch["rna" if missing == "atac" else "atac"])
    embedding = model.fusion({name: torch.zeros(5, LATENT_DIM) for name in ("rna", "atac")} | {missing: stand_in})
    mse = (model.decoders["rna"](embedding) - batch.rna.dense()).square().mean(1)
    bce = peak_bce(model.decoders["atac"](embedding), batch.atac, 5.0)
    torch.testing.assert_close(loss, Distillation(model)(batch)[0] + 0.3 * (mse + bce))
    assert metrics_alone["rna_mse_of_student"][0].item() == pytest.approx(mse.sum().item(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("missing", ["atac", "rna"])
def test_teacher_and_missing_modality_have_weights(missing):
    """By hand; without both, neither the teacher's latent nor the missing modality changes the loss."""
    model, batch = scmomer(other_modality="student", missing=missing), minibatch()
    loss, metrics = Distillation(model, alone_weight=0.3, teacher_weight=0.5, missing_weight=0.1)(batch)
    present = "rna" if missing == "atac" else "atac"
    stand_in = model.student(batch[present])
    zeros = torch.zeros(5, LATENT_DIM)
    expected = 0.5 * (stand_in - batch.latent[missing]).square().mean(1)
    for weight, latent in ((1.0, batch.latent[present]), (0.3, zeros)):
        embedding = model.fusion({present: latent, missing: stand_in})
        errors = {
            "rna": (model.decoders["rna"](embedding) - batch.rna.dense()).square().mean(1),
            "atac": peak_bce(model.decoders["atac"](embedding), batch.atac, 5.0),
        }
        expected = expected + weight * (errors[present] + 0.1 * errors[missing])
    torch.testing.assert_close(loss, expected)
    assert metrics.keys() == Distillation(model, alone_weight=0.3)(batch)[1].keys()
    denoiser = Distillation(model, alone_weight=0.3, teacher_weight=0.0, missing_weight=0.0)
    turned = {missing: minibatch(cells=[4, 3, 2, 1, 0])[missing]}
    other_cells = replace(batch, latent=batch.latent | {missing: batch.latent[missing] + 1}, **turned)
    assert (Distillation(model)(batch)[0] != Distillation(model)(other_cells)[0]).all()
    torch.testing.assert_close(denoiser(batch)[0], denoiser(other_cells)[0], rtol=0, atol=0)
