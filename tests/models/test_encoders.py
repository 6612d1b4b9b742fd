"""Sparse cells, encoders, towers and the joined model: exact, and independent of the minibatch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.atac_encoder import ATACEncoder, PatchHead
from models.minibatch import Ragged
from models.rna_encoder import MASK_TOKEN, GenePooling, GeneTokens
from models.shapes import other
from models.student import Student
from tests.models.helpers import (
    ATAC,
    LATENT_DIM,
    LENGTHS,
    N_GENES,
    N_PEAKS,
    STUDENT,
    accessibility,
    by_gene,
    expression,
    gradients,
    jitter,
    masked_rna,
    minibatch,
    ragged,
    rna_encoder,
    scmomer,
)

# ----------------------------------------------------------------------------------------------------- RNA encoder


@pytest.mark.parametrize("binning", ["floor", "round"])
def test_bins(binning):
    values = np.array([[0.0, 0.4, 0.6, 1.0, 1.4, 1.6, 4.9, 5.2, 5.9, 9.3]], dtype=np.float32)
    floor, rounded = [0, 0, 0, 1, 1, 1, 4, 5, 5, 5], [0, 0, 1, 1, 1, 2, 5, 5, 5, 5]
    bins = floor if binning == "floor" else rounded
    for kind in ("all", "expressed"):
        encoder = rna_encoder(kind)
        encoder.config, encoder.n_genes = replace(encoder.config, binning=binning), 10
        tokens = encoder.tokenize(ragged(values))
        if kind == "all":
            assert tokens.bins.tolist() == [bins]
            assert tokens.genes.tolist() == list(range(10))
        else:  # a value whose bin is 0 is not expressed
            assert tokens.bins.tolist() == [[b for b in bins if b]]
            assert tokens.genes.tolist() == [[gene for gene, b in enumerate(bins) if b]]


def test_expressed_tokens_are_padded_with_the_mask_token():
    tokens = rna_encoder("expressed").tokenize(ragged(expression()))
    assert tokens.bins.shape == (5, 60)
    assert tokens.valid.sum(1).tolist() == list(LENGTHS)
    assert (tokens.bins[~tokens.valid] == MASK_TOKEN).all()
    assert ((tokens.bins[tokens.valid] > 0) & (tokens.bins[tokens.valid] < MASK_TOKEN)).all()


@torch.no_grad()
def test_order_of_the_genes_does_not_matter():
    """Expressed genes are a set: permuting a cell's entries permutes its states and leaves its latent."""
    tower = scmomer("expressed").towers["rna"]
    cells = ragged(expression())
    shuffle = torch.cat(
        [start + torch.randperm(n) for start, n in zip(cells.offsets[:-1], cells.lengths.tolist(), strict=True)]
    )
    shuffled = Ragged(cells.indices[shuffle], cells.values[shuffle], cells.offsets, cells.width)
    assert not torch.equal(shuffled.indices, cells.indices)
    torch.testing.assert_close(tower(shuffled), tower(cells), atol=1e-5, rtol=0)
    states = [by_gene(tower.encoder(t), t) for t in map(tower.encoder.tokenize, (cells, shuffled))]
    torch.testing.assert_close(states[1], states[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_all_and_expressed_tokens_agree_where_all_genes_are_expressed():
    cells = ragged(expression((60, 60)))
    torch.testing.assert_close(
        scmomer("expressed").towers["rna"](cells), scmomer("all").towers["rna"](cells), atol=1e-5, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("tokens_kind", ["all", "expressed"])
def test_padding_changes_no_loss(tokens_kind, monkeypatch):
    objective, batch = masked_rna(tokens_kind), minibatch()
    expected = objective(batch)[0]
    if tokens_kind == "expressed":
        padded = replace(batch, rna=replace(batch.rna, padded_length=83))
    else:
        padded, tokenize = batch, objective.encoder.tokenize

        def with_padding(rna: Ragged) -> GeneTokens:
            bins, genes, *_ = tokenize(rna)
            return GeneTokens(
                F.pad(bins, (0, 23), value=MASK_TOKEN),
                F.pad(genes.expand(bins.shape), (0, 23)),
                F.pad(torch.ones_like(bins, dtype=torch.bool), (0, 23)),
            )

        monkeypatch.setattr(objective.encoder, "tokenize", with_padding)
    assert (expected > 0).sum() >= 4
    torch.testing.assert_close(objective(padded)[0], expected, rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("tokens_kind", ["all", "expressed"])
def test_gene_pooling_is_the_dense_formula(tokens_kind):
    """ReLU of an affine map of each gene's state, 0 for genes that are no token, then linear over genes."""
    pooling = jitter(GenePooling(16, N_GENES, LATENT_DIM), scale=0.5)
    encoder = jitter(rna_encoder(tokens_kind))
    cells = ragged(expression())
    tokens = encoder.tokenize(cells)
    states = encoder(tokens)
    if tokens_kind == "expressed":
        states = torch.where(tokens.valid[..., None], states, 1e3)  # whatever stands in the padding
    scalars = (by_gene(states, tokens) @ pooling.scalar.weight[0] + pooling.scalar.bias).clamp(min=0)
    if tokens_kind == "expressed":
        scalars = scalars * (cells.dense() >= 1)
    assert 0.2 < (scalars[0] > 0).float().mean() < 0.9  # the ReLU cuts some, not all
    torch.testing.assert_close(pooling(states, tokens), scalars @ pooling.projection.weight.T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_gene_pooling_begins_alive(seed):
    """Every gene's number is positive for LayerNormed states of any cell: none has to be brought back to life."""
    torch.manual_seed(seed)
    pooling = GenePooling(64, N_GENES, LATENT_DIM)
    scalars = pooling.scalar(F.layer_norm(torch.randn(50, 200, 64), [64])).detach()
    assert (scalars > 0).float().mean() > 0.9 and scalars.mean().item() == pytest.approx(1.0, abs=0.05)


def test_gene_embedding_is_frozen_on_request():
    assert not rna_encoder(freeze_gene_embedding=True).gene_embedding.weight.requires_grad
    assert rna_encoder().gene_embedding.weight.requires_grad


def test_redrawn_features_depend_on_the_seed_alone():
    first, second = rna_encoder(), rna_encoder()
    before = [block.attention.features.clone() for block in first.blocks]
    second.redraw_features(77)  # another history
    torch.manual_seed(1)
    first.redraw_features(5)
    torch.manual_seed(2)
    second.redraw_features(5)
    features = [block.attention.features for block in first.blocks]
    for old, ours, theirs in zip(before, features, (b.attention.features for b in second.blocks), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.shape == old.shape
        assert not torch.isclose(ours, old).any()
    assert not torch.equal(features[0], features[1])
    second.redraw_features(6)
    assert not torch.isclose(second.blocks[0].attention.features, features[0]).any()


# ---------------------------------------------------------------------------------------------------- ATAC encoder


@torch.no_grad()
@pytest.mark.parametrize("patch_maps", ["shared", "own"])
@pytest.mark.parametrize(
    ("n_peaks", "n_patches", "patch_size"), [(96, 8, 12), (97, 8, 13), (10, 7, 2), (5, 8, 1), (8, 1, 8)]
)
def test_patch_embedding_is_the_dense_linear_map(n_peaks, n_patches, patch_size, patch_maps):
    """Of the zero-padded peak vector, cut into equal patches; patches may lie wholly behind the last peak."""
    encoder = jitter(ATACEncoder(replace(ATAC, n_patches=n_patches, patch_maps=patch_maps), n_peaks), scale=1.0)
    assert encoder.patch_size == patch_size
    dense = accessibility((n_peaks, n_peaks // 2, 0, 1), n_peaks)
    padded = F.pad(torch.from_numpy(dense), (0, n_patches * patch_size - n_peaks))
    patches, rows = padded.unflatten(1, (n_patches, patch_size)), encoder.peak_rows
    rows = rows.expand(n_patches, -1, -1) if patch_maps == "shared" else rows.unflatten(0, (n_patches, patch_size))
    expected = torch.einsum("bnp,npd->bnd", patches, rows) + encoder.patch_bias
    torch.testing.assert_close(encoder.embed_patches(ragged(dense)), expected, atol=1e-5, rtol=0)
    states, pooled = encoder(ragged(dense))
    assert states.shape == (4, 1 + n_patches, 16)
    torch.testing.assert_close(pooled, encoder.pooler(states[:, 0]).tanh())


@torch.no_grad()
def test_what_lies_in_hidden_patches_does_not_leak():
    encoder = jitter(ATACEncoder(ATAC, N_PEAKS))
    hidden = torch.zeros(5, 8, dtype=torch.bool)
    hidden[0, [1, 7]] = hidden[1, 0] = hidden[2, 3] = hidden[4, :] = True
    dense = accessibility()
    of_patch = torch.arange(N_PEAKS) // encoder.patch_size
    inside = hidden[:, of_patch].numpy()
    inverted = np.where(inside, 1 - dense, dense)
    assert (inverted != dense).any(1).tolist() == [True, True, True, False, True]
    states, pooled = encoder(ragged(dense), hidden)
    other_states, other_pooled = encoder(ragged(inverted), hidden)
    assert torch.equal(states, other_states)
    assert torch.equal(pooled, other_pooled)
    # What is shown does matter, and so does which patches are hidden.
    assert not torch.isclose(encoder(ragged(1 - dense), hidden)[0][:4], states[:4]).all(2).any()
    assert not torch.isclose(encoder(ragged(dense))[0][[0, 1, 2, 4]], states[[0, 1, 2, 4]]).all(2).any()
    torch.testing.assert_close(encoder(ragged(dense))[0][3], states[3])


@torch.no_grad()
def test_logits_and_truth_of_hidden_peaks():
    """In order of cell and patch; the filling behind the last peak counts as closed."""
    encoder = jitter(ATACEncoder(ATAC, N_PEAKS))
    head = jitter(PatchHead(encoder), scale=0.5)
    hidden = torch.zeros(5, 8, dtype=torch.bool)
    chosen = [[2, 7], [0, 1], [3, 4], [5, 6], [0, 7]]
    for cell, patches in zip(hidden, chosen, strict=True):
        cell[patches] = True
    dense = torch.from_numpy(accessibility())
    states = torch.randn(5, 8, 16)
    logits, is_open = head.masked_peaks(states, ragged(dense), hidden, 2)
    patches = F.pad(dense, (0, 7)).unflatten(1, (8, 13))
    for c, pair in enumerate(chosen):
        for row, patch in enumerate(pair):
            assert torch.equal(is_open[c, row], patches[c, patch])
            torch.testing.assert_close(logits[c, row], head.to_peaks.weight @ states[c, patch] + head.to_peaks.bias)
    assert is_open[-1, -1].tolist() == [1.0] * 6 + [0.0] * 7


# --------------------------------------------------------------------------------------------------------- student


@torch.no_grad()
@pytest.mark.parametrize("dense", [expression(), accessibility()], ids=["rna", "atac"])
def test_student_is_the_dense_formula(dense):
    student = jitter(Student(STUDENT, dense.shape[1], LATENT_DIM), scale=0.3)
    x = torch.from_numpy(dense) @ student.embed.weight + student.embed.bias
    x = F.gelu(F.layer_norm(x, x.shape[1:], student.norm.weight, student.norm.bias))
    expected = x @ student.to_latent.weight.T + student.to_latent.bias
    torch.testing.assert_close(student(ragged(dense)), expected, atol=1e-5, rtol=0)


def test_student_reads_continuous_values_and_drops_out_in_training_alone():
    student = Student(replace(STUDENT, student_dropout=0.5), N_GENES, LATENT_DIM)
    dense = expression()
    cells, shifted = ragged(dense), ragged(np.where(dense > 0, dense + 1e-2, 0))
    key = torch.arange(len(dense))
    assert torch.equal(student(cells, key), student(cells, key))
    assert not torch.equal(student(cells, key), student(cells, key + 1))
    with pytest.raises(ValueError, match="keys"):
        student(cells)
    student.eval()
    assert torch.equal(student(cells), student(cells, key))
    assert not torch.isclose(student(cells), student(shifted), atol=1e-6).all(1)[[0, 1, 3, 4]].any()


class Subject(nn.Module):
    """A module and the way from a minibatch to one output per cell, [B, …] of fixed shape."""

    def __init__(self, module: nn.Module, read):
        super().__init__()
        self.module, self.read = module, read

    def forward(self, batch) -> Tensor:
        return self.read(self.module, batch)


def rna_states(encoder, batch) -> Tensor:
    tokens = encoder.tokenize(batch.rna)
    return by_gene(encoder(tokens), tokens)


def sharpen(module: nn.Module) -> nn.Module:
    """Longer queries and keys, so that anything taken over the minibatch in attention would show."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                parameter *= 4
    return module


SUBJECTS = {
    "RNA states, all": lambda: Subject(jitter(rna_encoder("all")), rna_states),
    "RNA states, expressed": lambda: Subject(jitter(rna_encoder("expressed")), rna_states),
    "RNA latent, all": lambda: Subject(scmomer("all").towers["rna"], lambda m, b: m(b.rna)),
    "RNA latent, expressed": lambda: Subject(scmomer("expressed").towers["rna"], lambda m, b: m(b.rna)),
    "ATAC states": lambda: Subject(scmomer().towers["atac"].encoder, lambda m, b: m(b.atac)[0]),
    "ATAC latent": lambda: Subject(scmomer().towers["atac"], lambda m, b: m(b.atac)),
    "student of RNA": lambda: Subject(scmomer(missing="atac", other_modality="student").student, lambda m, b: m(b.rna)),
    "student of ATAC": lambda: Subject(
        scmomer(missing="rna", other_modality="student").student, lambda m, b: m(b.atac)
    ),
    "embedding, all": lambda: Subject(scmomer("all"), lambda m, b: m.embed(b)),
    "embedding, expressed": lambda: Subject(scmomer("expressed"), lambda m, b: m.embed(b)),
    "embedding, ATAC missing": lambda: Subject(
        scmomer("expressed", missing="atac", other_modality="student"), lambda m, b: m.embed(b)
    ),
    "embedding, RNA missing": lambda: Subject(
        scmomer(missing="rna", other_modality="student"), lambda m, b: m.embed(b)
    ),
    "embedding, ATAC zeros": lambda: Subject(
        scmomer("expressed", missing="atac", other_modality="zeros"), lambda m, b: m.embed(b)
    ),
}
subjects = pytest.mark.parametrize("subject", SUBJECTS)


@torch.no_grad()
@subjects
def test_a_cell_is_the_same_alone_and_in_any_minibatch(subject):
    module = sharpen(SUBJECTS[subject]())
    alone = torch.cat([module(minibatch(cells=[cell])) for cell in range(5)])
    assert alone.isfinite().all()
    assert alone.std(0).mean() > 1e-2  # cells do differ
    for cells in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0], [1, 4], [4, 2, 2], [3, 3]):
        torch.testing.assert_close(module(minibatch(cells=cells)), alone[cells], atol=1e-5, rtol=1e-5)


@subjects
def test_gradients_of_a_minibatch_are_the_sum_of_its_cells(subject):
    module = sharpen(SUBJECTS[subject]())

    def gradients_of(*minibatches: list[int]) -> dict[str, Tensor]:
        module.zero_grad()
        for cells in minibatches:
            module(minibatch(cells=cells)).sin().flatten(1).sum(1).sum().backward()
        return gradients(module)

    together = gradients_of([0, 1, 2, 3, 4])
    apart = gradients_of([0], [1], [2], [3], [4])
    in_pairs = gradients_of([3, 0], [2, 4, 1])
    assert together.keys() == apart.keys() == in_pairs.keys()
    assert len(together) > 4
    for name, gradient in together.items():
        assert gradient.isfinite().all(), name
        tolerance = 1e-5 * gradient.abs().max().clamp(min=1).item()
        torch.testing.assert_close(apart[name], gradient, atol=tolerance, rtol=1e-4, msg=name)
        torch.testing.assert_close(in_pairs[name], gradient, atol=tolerance, rtol=1e-4, msg=name)


@subjects
def test_empty_cells_have_finite_outputs_and_gradients(subject):
    module = SUBJECTS[subject]()
    rna, atac = np.zeros((2, N_GENES), dtype=np.float32), np.zeros((2, N_PEAKS), dtype=np.float32)
    out = module(minibatch(rna, atac))
    assert out.isfinite().all()
    out.sum().backward()
    for name, gradient in gradients(module).items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() < 1e6, name


# ---------------------------------------------------------------------------------------------------- joined model


@torch.no_grad()
@pytest.mark.parametrize("missing", ["atac", "rna"])
@pytest.mark.parametrize("other_modality", ["measured", "student", "zeros"])
def test_what_stands_in_the_place_of_the_other_modality(missing, other_modality):
    """A model reads the modalities it says it reads, and fuses [z_atac; z_rna] in this order."""
    model = scmomer("expressed", missing=missing, other_modality=other_modality)
    batch, present = minibatch(), other(missing)
    latent = {name: tower(batch[name]) for name, tower in model.towers.items()}
    if other_modality == "student":
        latent[missing] = model.student(batch[present])
    elif other_modality == "zeros":
        latent[missing] = torch.zeros(5, LATENT_DIM)
    both = torch.cat([latent["atac"], latent["rna"]], dim=1)
    expected = both @ model.fusion.linear.weight.T + model.fusion.linear.bias
    torch.testing.assert_close(model.embed(batch), expected)
    if other_modality == "measured":
        assert set(model.config.inputs) == {"rna", "atac"}
    else:
        assert model.config.inputs == (present,)
        torch.testing.assert_close(model.embed(replace(batch, **{missing: None})), expected)


@torch.no_grad()
def test_atac_latent_is_normalised_then_layer_normed():
    towers, batch = scmomer().towers, minibatch()
    pooled = towers["atac"].encoder(batch.atac)[1] @ towers["atac"].projection.weight.T
    unit = pooled / pooled.norm(dim=1, keepdim=True)
    expected = F.layer_norm(unit, (LATENT_DIM,), towers["atac"].norm.weight, towers["atac"].norm.bias)
    torch.testing.assert_close(towers["atac"](batch.atac), expected)


@torch.no_grad()
@pytest.mark.parametrize("other_modality", ["measured", "student", "zeros"])
def test_cell_types_are_read_off_the_embedding(other_modality):
    model = scmomer("expressed", classes=True, other_modality=other_modality)
    embedding, logits = model(minibatch())
    assert torch.equal(embedding, model.embed(minibatch()))
    first, last = model.head.layers[1], model.head.layers[4]
    hidden = (embedding @ first.weight.T + first.bias).relu()
    torch.testing.assert_close(logits, hidden @ last.weight.T + last.bias)


def test_tokens_can_be_given_by_hand():
    """Masking replaces bins in tokens, so a token says everything the encoder sees of a gene."""
    encoder = jitter(rna_encoder())
    tokens = encoder.tokenize(ragged(expression()))
    assert torch.equal(encoder(tokens), encoder(GeneTokens(tokens.bins.clone(), torch.arange(N_GENES), None)))
    other_bins = tokens.bins.clone()
    other_bins[0, 3] = MASK_TOKEN
    changed = (encoder(tokens._replace(bins=other_bins)) != encoder(tokens)).any(2)
    assert changed[0].all()
    assert not changed[1:].any()
