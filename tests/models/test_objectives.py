"""Objectives: the losses by hand, what is trained and what is not, and nothing owned that is not read."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.atac_encoder import ATACEncoder
from models.device import ON_CPU
from models.masking import mask_genes, mask_patches
from models.objectives import (
    Denoising,
    Distillation,
    JointPairs,
    MaskedATAC,
    MaskedRNA,
)
from models.peak_loss import decoded_peak_bce, peak_bce
from models.rna_encoder import MASK_TOKEN
from tests.models.helpers import (
    ATAC,
    N_GENES,
    N_PEAKS,
    accessibility,
    by_gene,
    celltypes,
    gradients,
    masked_atac,
    masked_rna,
    minibatch,
    one_tower,
    ragged,
    rna_encoder,
    scmomer,
)

DEPTH = 3
KINDS = ("all", "expressed")


OBJECTIVES = {
    **{f"MaskedRNA {kind}": lambda kind=kind: masked_rna(kind) for kind in KINDS},
    "MaskedATAC": masked_atac,
    **{
        f"JointPairs {kind} {k}": lambda kind=kind, k=k: JointPairs(scmomer(kind), k) for kind in KINDS for k in (0, -1)
    },
    "JointPairs expressed 2": lambda: JointPairs(scmomer("expressed"), 2),
    **{f"Denoising rna {kind}": lambda kind=kind: Denoising(one_tower("rna", kind), 2) for kind in KINDS},
    "Denoising atac": lambda: Denoising(one_tower("atac"), -1),
    **{
        f"Distillation without {missing}": lambda missing=missing: Distillation(
            scmomer(missing=missing, other_modality="student")
        )
        for missing in ("atac", "rna")
    },
    **{
        f"FineTuning {other_modality} without {missing} {k}{' with student' * train_student}": (
            lambda args=(other_modality, missing, k, train_student): celltypes(*args)
        )
        for other_modality in ("student", "zeros", "measured")
        for missing in ("atac", "rna")
        for k in (0, 2, -1)
        for train_student in (False, True)
        if other_modality == "student" or not train_student
    },
}
objectives = pytest.mark.parametrize("name", OBJECTIVES)

# ------------------------------------------------------------------------------------------------ for all of them


def unread(name: str) -> set[str]:
    """Owned, never trained and rightly not read: shapes that belong to the encoder, on no way to this loss."""
    if name.startswith("MaskedATAC"):
        return {"encoder.pooler.weight", "encoder.pooler.bias"}
    prefix = "model." * name.startswith("FineTuning")
    return {f"{prefix}towers.atac.encoder.mask_token"}


@objectives
def test_what_is_trained_gets_a_gradient_and_the_rest_none(name):
    """An unused trainable parameter would stop a distributed run."""
    objective = OBJECTIVES[name]()
    loss, metrics = objective(minibatch())
    assert loss.shape == (5,)
    assert loss.isfinite().all()
    for metric in metrics.values():
        assert all(part.ndim == 0 and not part.requires_grad for part in metric)
    loss.sum().backward()
    trainable = {key for key, p in objective.named_parameters() if p.requires_grad}
    found = gradients(objective)
    assert trainable
    assert found.keys() == trainable
    for key, gradient in found.items():
        assert gradient.isfinite().all(), key
        assert gradient.any(), key


@objectives
def test_what_is_owned_is_read(name):
    """A parameter that is not a number shows in the loss, or the objective should not hold it."""
    objective = OBJECTIVES[name]()
    batch = minibatch(cells=[0, 3])
    for key, parameter in objective.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.fill_(torch.nan)
            loss, _ = objective(batch)
            parameter.copy_(kept)
        assert loss.isnan().any() == (key not in unread(name)), key


@torch.no_grad()
@objectives
def test_a_cells_loss_is_the_same_alone_and_in_any_minibatch(name):
    """Masks included; and a minibatch's metrics are the sum of its cells'."""
    objective = OBJECTIVES[name]().eval()
    alone = [objective(minibatch(cells=[cell])) for cell in range(5)]
    for cells in ([0, 1, 2, 3, 4], [4, 2, 0], [1, 1, 3]):
        loss, metrics = objective(minibatch(cells=cells))
        torch.testing.assert_close(loss, torch.cat([alone[cell][0] for cell in cells]), atol=1e-5, rtol=1e-5)
        for key, metric in metrics.items():
            for part in range(2):
                apart = sum(alone[cell][1][key][part] for cell in cells)
                torch.testing.assert_close(metric[part], apart, atol=1e-4, rtol=1e-5, msg=key)


@torch.no_grad()
@objectives
def test_cells_that_fill_up_do_not_count_in_metrics(name):
    objective = OBJECTIVES[name]().eval()
    _, with_filling = objective(minibatch(cells=[0, 1, 2, 3], weight=torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0])))
    _, without = objective(minibatch(cells=[0, 1]))
    for key, (total, count) in without.items():
        torch.testing.assert_close(with_filling[key][0], total, atol=1e-5, rtol=1e-5, msg=key)
        torch.testing.assert_close(with_filling[key][1], count, atol=1e-5, rtol=1e-5, msg=key)


@objectives
def test_frozen_weights_stay_and_trained_ones_move(name):
    """Bit for bit, over three steps of an optimiser that is given everything with a gradient."""
    objective = OBJECTIVES[name]().train()
    before = {key: tensor.clone() for key, tensor in objective.state_dict().items()}
    trainable = {key for key, p in objective.named_parameters() if p.requires_grad}
    optimiser = torch.optim.Adam(objective.parameters(), lr=1e-2)
    for step in range(3):
        objective.before_step(step)
        loss, _ = objective(minibatch())
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
    moved = {key for key, tensor in objective.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved == trainable


@pytest.mark.parametrize("name", ["MaskedRNA all", "MaskedRNA expressed", "MaskedATAC"])
def test_a_minibatch_without_anything_has_a_loss_and_gradients(name):
    objective = OBJECTIVES[name]()
    empty = minibatch(np.zeros((2, N_GENES)), np.zeros((2, N_PEAKS)))
    loss, metrics = objective(empty)
    assert loss.isfinite().all()
    if isinstance(objective, MaskedRNA):
        assert loss.tolist() == [0.0, 0.0]
        assert metrics["accuracy"][0] == 0
    loss.sum().backward()
    for key, parameter in objective.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), key


# ---------------------------------------------------------------------------------------------------- small parts


@pytest.mark.parametrize("open_weight", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_peak_bce_is_the_dense_one(open_weight, scale):
    """Values and gradients, also where a sigmoid is 0 or 1 in float32, and for cells with none or all peaks open."""
    dense = torch.from_numpy(accessibility())
    logits = (scale * torch.randn(5, N_PEAKS, generator=torch.Generator().manual_seed(0))).requires_grad_()
    sparse = peak_bce(logits, ragged(dense), open_weight)
    expected = F.binary_cross_entropy_with_logits(
        logits, dense, pos_weight=torch.tensor(open_weight), reduction="none"
    ).mean(1)
    assert sparse.shape == (5,)
    torch.testing.assert_close(sparse, expected, atol=1e-5, rtol=1e-5)
    weight = torch.arange(1.0, 6.0)
    (gradient,) = torch.autograd.grad((sparse * weight).sum(), logits)
    (dense_gradient,) = torch.autograd.grad((expected * weight).sum(), logits)
    torch.testing.assert_close(gradient, dense_gradient, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ MaskedRNA


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_masked_rna_loss_by_hand(kind):
    """Cross-entropy at the targets of each cell, the encoder having seen the mask token at the hidden ones."""
    objective, batch = masked_rna(kind), minibatch()
    bins = batch.rna.dense().floor().clamp(max=5).long()
    target, hidden = mask_genes(batch.key, torch.arange(N_GENES), bins > 0)
    assert (target & ~hidden).any()  # some targets show their bin
    tokens = objective.encoder.tokenize(batch.rna)
    shown = tokens.bins.clone()
    for b in range(5):
        genes = tokens.genes if kind == "all" else tokens.genes[b]
        for place, gene in enumerate(genes.tolist()):
            if (tokens.valid is None or tokens.valid[b, place]) and hidden[b, gene]:
                shown[b, place] = MASK_TOKEN
    log_probability = objective.head(by_gene(objective.encoder(tokens._replace(bins=shown)), tokens)).log_softmax(-1)
    loss, metrics = objective(batch)
    hits = 0.0
    for b in range(5):
        genes = target[b].nonzero().flatten().tolist()
        costs = [-log_probability[b, gene, bins[b, gene]].item() for gene in genes]
        assert loss[b].item() == pytest.approx(np.mean(costs) if costs else 0.0, abs=1e-5)
        right = [log_probability[b, gene].argmax() == bins[b, gene] for gene in genes]
        hits += np.mean(right) if right else 0.0
    assert metrics["accuracy"][0].item() == pytest.approx(hits, abs=1e-5)
    assert metrics["accuracy"][1] == 5


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_true_bin_of_a_hidden_gene_does_not_leak(kind):
    """It changes the loss, and nothing that the encoder puts out; that of a shown gene changes both."""
    objective, batch = masked_rna(kind), minibatch()
    dense = batch.rna.dense()
    target, hidden = mask_genes(batch.key, torch.arange(N_GENES), dense >= 1)

    def run(values: Tensor) -> tuple[Tensor, Tensor]:
        seen = []
        handle = objective.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
        loss, _ = objective(minibatch(values.numpy()))
        handle.remove()
        return seen[0], loss

    other_bin = 1 + (dense.floor().clamp(max=5) % 5) + 0.5  # another bin from 1 to 5
    states, loss = run(dense)
    hidden_changed, hidden_loss = run(torch.where(hidden, other_bin, dense))
    assert torch.equal(states, hidden_changed)
    assert (loss != hidden_loss).tolist() == hidden.any(1).tolist()
    shown = target & ~hidden
    shown_changed, shown_loss = run(torch.where(shown, other_bin, dense))
    assert (states != shown_changed).flatten(1).any(1).tolist() == shown.any(1).tolist()
    assert (loss != shown_loss).tolist() == shown.any(1).tolist()
    assert hidden.any(1).sum() >= 3
    assert shown.any()


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.05, 0.5])
def test_mask_ratio_is_heeded(ratio):
    rna, atac = MaskedRNA(rna_encoder(), 0, ratio), MaskedATAC(ATACEncoder(ATAC, N_PEAKS), ratio)
    n_targets, n_patches = [], []
    rna.head.register_forward_hook(lambda module, inputs, output: n_targets.append(output.shape[1]))
    atac.head.to_peaks.register_forward_hook(lambda module, inputs, output: n_patches.append(output.shape[1]))
    rna(minibatch(cells=[0]))
    atac(minibatch(cells=[0]))
    assert n_targets == [round(60 * ratio)]
    assert n_patches == [max(1, round(8 * ratio))]


def test_features_are_redrawn_at_every_thousandth_step_from_seed_and_step_alone():
    def features(objective: MaskedRNA) -> Tensor:
        return torch.cat([block.attention.features for block in objective.encoder.blocks])

    objective = masked_rna(seed=3)
    drawn = {}
    for step in (0, 1, 500, 999, 1000, 1001, 1999, 2000, 2001, 3000):
        before = features(objective)
        objective.before_step(step)
        after = features(objective)
        assert torch.equal(before, after) == (step not in (1000, 2000, 3000)), step
        drawn[step] = after
    assert not torch.isclose(drawn[1000], drawn[2000]).any()

    resumed = masked_rna(seed=3)
    torch.manual_seed(99)
    resumed.before_step(2000)
    assert torch.equal(features(resumed), drawn[2000])
    elsewhere = masked_rna(seed=4)
    elsewhere.before_step(2000)
    assert not torch.isclose(features(elsewhere), drawn[2000]).any()


# ----------------------------------------------------------------------------------------------------- MaskedATAC


@torch.no_grad()
def test_masked_atac_loss_by_hand():
    """Mean over the hidden patches' peaks, the filling included; open ones count 20 times."""
    objective, batch = masked_atac(), minibatch()
    hidden = mask_patches(batch.key, 8)
    states, _ = objective.encoder(batch.atac, hidden)
    logits = objective.head.to_peaks(states[:, 1:])  # [B, 8, 13]
    truth = F.pad(batch.atac.dense(), (0, 7)).unflatten(1, (8, 13))
    cost = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=torch.tensor(20.0), reduction="none")
    loss, metrics = objective(batch)
    mass = logits.sigmoid()
    for b in range(5):
        assert loss[b].item() == pytest.approx(cost[b, hidden[b]].mean().item(), abs=1e-5)
    on_open = sum((mass * truth)[b, hidden[b]].sum(-1).mean() for b in range(5))
    everywhere = sum(mass[b, hidden[b]].sum(-1).mean() for b in range(5))
    assert metrics["expected_precision"][0].item() == pytest.approx(on_open.item(), rel=1e-5)
    assert metrics["expected_precision"][1].item() == pytest.approx(everywhere.item(), rel=1e-5)


@torch.no_grad()
def test_open_peaks_of_hidden_patches_change_the_loss_alone():
    objective, batch = masked_atac(), minibatch()
    hidden = mask_patches(batch.key, 8)
    dense = accessibility()
    inverted = np.where(hidden[:, torch.arange(N_PEAKS) // 13].numpy(), 1 - dense, dense)
    assert (objective(minibatch(atac=inverted))[0] != objective(batch)[0]).all()
    states, other_states = (objective.encoder(ragged(cells), hidden)[0] for cells in (dense, inverted))
    assert torch.equal(states, other_states)


@pytest.mark.parametrize("max_logits", [1, 5 * 10, 5 * 64, 5 * N_PEAKS])
def test_the_peak_decoders_loss_is_the_same_by_stretches(max_logits, monkeypatch):
    """Values, gradients, and nothing as large as all logits kept, where they do not fit."""
    torch.manual_seed(0)
    decoder, embedding = torch.nn.Linear(12, N_PEAKS), torch.randn(5, 12, requires_grad=True)
    atac, weight = ragged(accessibility()), torch.arange(1.0, 6.0)
    inputs = [embedding, decoder.weight, decoder.bias]
    expected = peak_bce(decoder(embedding), atac, 5.0)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    monkeypatch.setattr("models.peak_loss.sizes_for", lambda device: replace(ON_CPU, logits=max_logits))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        loss = decoded_peak_bce(decoder, embedding, atac, 5.0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(torch.autograd.grad((loss * weight).sum(), inputs), expected_gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert (torch.Size([5, N_PEAKS]) in kept) == (max_logits == 5 * N_PEAKS)
