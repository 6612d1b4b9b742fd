"""Masks: pure functions of a cell's key, with the shares they promise."""

import pytest
import torch
from torch import Tensor

from models.masking import (
    KeyedDropout,
    count_hidden,
    drop_features,
    mask_genes,
    mask_patches,
    mix,
    most_hidden,
    places,
    uniform,
)
from models.rna_encoder import MASK_TOKEN
from tests.models.helpers import N_GENES, expression, ragged, rna_encoder

KEYS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789])


def masks_by_gene(tokens_kind: str, key: Tensor, cells) -> tuple[Tensor, Tensor]:
    """Target and hidden [B, n_genes] of dense cells, tokenised either way."""
    tokens = rna_encoder(tokens_kind).tokenize(ragged(cells))
    expressed = (tokens.bins > 0) & (tokens.bins != MASK_TOKEN)
    out = []
    for mask in mask_genes(key, tokens.genes, expressed):
        if tokens.valid is not None:
            assert not (mask & ~tokens.valid).any()
            dense = torch.zeros(len(cells), N_GENES, dtype=torch.bool)
            cell, place = mask.nonzero(as_tuple=True)
            dense[cell, tokens.genes[cell, place]] = True
            mask = dense
        out.append(mask)
    return out[0], out[1]


def test_a_mask_depends_on_the_key_and_the_expressed_genes_alone():
    """Neither on the minibatch, nor on its order, nor on which genes are tokens."""
    cells = expression((60, 7, 25, 1, 40, 33))
    reference = masks_by_gene("all", KEYS, cells)
    assert reference[0].sum() > 20
    for kind in ("all", "expressed"):
        for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [2], [3, 1], [4, 4]):
            masks = masks_by_gene(kind, KEYS[order], cells[order])
            for mask, expected in zip(masks, reference, strict=True):
                assert torch.equal(mask, expected[order])


def test_other_keys_give_other_masks():
    same_cell = expression((50,)).repeat(len(KEYS), axis=0)
    target, _ = masks_by_gene("all", KEYS, same_cell)
    assert len({tuple(row.tolist()) for row in target}) == len(KEYS)


@pytest.mark.parametrize("ratio", [0.15, 0.4])
def test_number_of_targets(ratio):
    n_expressed = torch.arange(401)
    n_genes = 400
    expressed = uniform(n_expressed, torch.arange(n_genes), stream=9).argsort(1).argsort(1) < n_expressed[:, None]
    assert torch.equal(expressed.sum(1), n_expressed)
    target, hidden = mask_genes(n_expressed + 17, torch.arange(n_genes), expressed, ratio)
    assert not (target & ~expressed).any()
    assert not (hidden & ~target).any()
    for n, found in zip(n_expressed.tolist(), target.sum(1).tolist(), strict=True):
        halfway = abs(n * ratio % 1 - 0.5) < 1e-6  # may be rounded either way
        wanted = {int(n * ratio), int(n * ratio) + 1} if halfway else {round(n * ratio)}
        assert found in ({max(1, w) for w in wanted} if n else {0}), n


def test_cells_without_expressed_genes_have_no_targets():
    target, hidden = mask_genes(KEYS, torch.arange(30), torch.zeros(len(KEYS), 30, dtype=torch.bool))
    assert target.shape == hidden.shape == (len(KEYS), 30)
    assert not target.any()
    assert not hidden.any()


@pytest.mark.parametrize("first_key", [0, -(2**62)])
def test_targets_fall_on_all_genes_alike_and_nine_in_ten_are_hidden(first_key):
    """Keys that follow one another are the hardest case for a hash."""
    n_cells, n_genes = 5000, 40
    key = torch.arange(n_cells) + first_key
    target, hidden = mask_genes(key, torch.arange(n_genes), torch.ones(n_cells, n_genes, dtype=torch.bool))
    assert (target.sum(1) == 6).all()
    z = (target.sum(0) - n_cells * 0.15) / (n_cells * 0.15 * 0.85) ** 0.5
    assert z.abs().max() < 4
    assert 0.5 < z.square().mean() < 1.6
    n_targets = 6 * n_cells
    assert abs(hidden.sum().item() / n_targets - 0.9) < 4 * (0.09 / n_targets) ** 0.5
    by_gene = (hidden.sum(0) / target.sum(0) - 0.9) / (0.09 / target.sum(0)) ** 0.5
    assert by_gene.abs().max() < 4
    # Which genes of a cell are targets together is chance, too.
    pairs = target.float().T.cov()
    assert (pairs - pairs.diagonal().diag()).abs().mean() < 0.02


def test_uniform_numbers_are_uniform():
    n_cells, n_items = 1000, 300
    numbers = uniform(torch.arange(n_cells), torch.arange(n_items))
    n = n_cells * n_items
    assert numbers.shape == (n_cells, n_items)
    assert numbers.dtype == torch.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.double().mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / n) ** 0.5)
    assert numbers.double().var().item() == pytest.approx(1 / 12, abs=4 * (1 / 180 / n) ** 0.5)
    counts = torch.histc(numbers, 100, 0, 1)
    assert 60 < ((counts - n / 100).square() / (n / 100)).sum() < 145  # χ² with 99 degrees of freedom
    # 24-bit numbers repeat by chance: n² / 2 / 2^24 pairs.
    expected = n**2 / 2 / 2**24
    assert abs((n - numbers.unique().numel()) - expected) < 6 * expected**0.5 + 0.01 * expected


@pytest.mark.parametrize(
    ("left", "right"),
    [
        pytest.param((0, 0, 0), (0, 0, 1), id="streams 0 and 1"),
        pytest.param((0, 0, 0), (0, 0, 2), id="streams 0 and 2"),
        pytest.param((0, 0, 1), (0, 0, 2), id="streams 1 and 2"),
        pytest.param((0, 0, 0), (1, 0, 0), id="neighbouring keys"),
        pytest.param((0, 0, 0), (0, 1, 0), id="neighbouring items"),
        pytest.param((0, 0, 0), (1, 0, 1), id="keys and streams"),
        pytest.param((0, 0, 1), (1, 0, 0), id="streams and keys"),
    ],
)
def test_draws_are_independent(left, right):
    def draw(key_shift: int, item_shift: int, stream: int) -> Tensor:
        return uniform(torch.arange(500) + key_shift, torch.arange(200) + item_shift, stream).flatten()

    a, b = draw(*left), draw(*right)
    n = len(a)
    assert (a == b).sum() < 10
    for x, y in ((a, b), ((a - 0.5).abs(), (b - 0.5).abs())):
        assert torch.corrcoef(torch.stack([x, y]))[0, 1].abs() < 4 / n**0.5


def test_items_may_differ_between_cells():
    items = torch.tensor([[3, 1, 7], [2, 2, 0]])
    numbers = uniform(KEYS[:2], items)
    all_items = uniform(KEYS[:2], torch.arange(8))
    assert torch.equal(numbers, all_items.gather(1, items))


def test_mix_is_splitmix64():
    """First outputs of the published generator, seeded with 1234567 (its n-th state is seed + n · gamma)."""
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + n * gamma) % 2**64 for n in range(5)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    outputs = [out % 2**64 for out in mix(signed).tolist()]
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize(("n_patches", "n_hidden"), [(1, 1), (2, 1), (5, 1), (8, 1), (16, 2), (128, 19)])
def test_number_of_hidden_patches(n_patches, n_hidden):
    hidden = mask_patches(torch.arange(50), n_patches)
    assert hidden.shape == (50, n_patches)
    assert (hidden.sum(1) == n_hidden).all()


def test_patches_are_hidden_alike_and_by_key_alone():
    keys = torch.arange(5000)
    hidden = mask_patches(keys, 20)
    z = (hidden.sum(0) - 5000 * 0.15) / (5000 * 0.15 * 0.85) ** 0.5
    assert z.abs().max() < 4
    assert torch.equal(mask_patches(keys[[70, 3]], 20), hidden[[70, 3]])
    # Patch i is not hidden because gene i is.
    target, _ = mask_genes(keys, torch.arange(20), torch.ones(5000, 20, dtype=torch.bool))
    assert (target & hidden).float().mean().item() == pytest.approx(0.15**2, abs=4 * (0.0225 / 1e5) ** 0.5)


def test_dropped_features_are_a_function_of_cell_and_feature():
    """The minibatch does not matter, and a larger share also drops what a smaller one drops."""
    cells = expression((60, 30, 0, 45), seed=3)
    whole = drop_features(KEYS[:4], ragged(cells), 0.4).dense()
    for b in range(4):
        assert torch.equal(drop_features(KEYS[b : b + 1], ragged(cells[b : b + 1]), 0.4).dense()[0], whole[b])
    assert torch.equal(whole[whole > 0], torch.from_numpy(cells)[whole > 0])
    more = drop_features(KEYS[:4], ragged(cells), 0.7).dense()
    assert ((more > 0) <= (whole > 0)).all() and (more > 0).sum() < (whole > 0).sum()


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_the_share_of_dropped_features(ratio):
    cells = ragged(expression((60,) * 400))
    keys = mix(torch.arange(400))
    kept = len(drop_features(keys, cells, ratio).indices) / len(cells.indices)
    assert kept == pytest.approx(1 - ratio, abs=0.01)


def test_dropout_is_a_function_of_the_cells_key_in_any_minibatch():
    layer, x = KeyedDropout(0.3, stream=5), torch.ones(500, 64)
    key = mix(torch.arange(500))
    out = layer(x, key)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 32_000) ** 0.5)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:123]
    assert torch.equal(layer(x[order], key[order]), out[order])
    assert not torch.equal(KeyedDropout(0.3, stream=6)(x, key), out)
    assert torch.equal(layer.eval()(x), x)


def test_places_are_the_true_ones_in_order():
    mask = torch.tensor([[False, True, True, False, True], [False] * 5, [True] * 5])
    found, valid = places(mask, 5)
    assert [row[is_true].tolist() for row, is_true in zip(found, valid, strict=True)] == [
        [1, 2, 4],
        [],
        [0, 1, 2, 3, 4],
    ]
    assert found[~valid].tolist() == [0] * 7
    assert places(torch.zeros(2, 0, dtype=torch.bool), 0)[0].shape == (2, 0)


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5, 1.0])
def test_no_cell_hides_more_than_the_most(ratio):
    n_hidden = [int(count_hidden(torch.tensor(n), ratio)) for n in range(200)]
    assert n_hidden == sorted(n_hidden)
    assert n_hidden == [most_hidden(n, ratio) for n in range(200)]
    assert n_hidden[:2] == [0, 1]
    assert n_hidden[-1] == max(round(199 * ratio), 1)
