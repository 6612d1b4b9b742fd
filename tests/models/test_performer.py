"""FAVOR+: an approximation of softmax attention that gets better with more features, and knows no neighbours."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.lib.bench import random_cells
from models import performer
from models.device import ON_CPU
from models.performer import FavorAttention, PerformerBlock, n_features_for, orthogonal_features
from models.rna_encoder import RNAEncoder
from models.shapes import RNAEncoderConfig

DIM, HEADS, DIM_HEAD = 32, 2, 16


def draw(n_features: int, seed: int, dim_head: int = DIM_HEAD) -> Tensor:
    return orthogonal_features(n_features, dim_head, torch.Generator().manual_seed(seed))


def attention(n_features: int | None = None) -> FavorAttention:
    torch.manual_seed(0)
    return FavorAttention(DIM, HEADS, DIM_HEAD, n_features).requires_grad_(False)


def softmax_attention(layer: FavorAttention, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """What `layer` approximates, from the same weights."""
    q, k, v = (to(x).unflatten(-1, (HEADS, DIM_HEAD)).transpose(1, 2) for to in (layer.to_q, layer.to_k, layer.to_v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(DIM_HEAD)  # [B, H, L, L]
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None, :], -torch.inf)
    return layer.to_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("padded", [False, True])
def test_more_features_come_closer_to_softmax_attention(padded):
    """The error falls as m^-½, as that of a Monte Carlo estimate without bias.

    It is measured against what attention adds to the plain mean of the values, at norms where FEATURE_EPS is small.
    """
    layer, x = attention(), 0.6 * torch.randn(2, 24, DIM, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(24) < torch.tensor([[24], [15]])
    judged = valid if padded else torch.ones_like(valid)
    exact = softmax_attention(layer, x, judged)
    share = judged.float() / judged.sum(1, keepdim=True)
    plain_mean = layer.to_out((layer.to_v(x) * share[..., None]).sum(1, keepdim=True))
    scale = (exact - plain_mean)[judged].square().mean().sqrt()

    def error(n_features: int, draws: int = 8) -> float:
        squares = []
        for seed in range(draws):
            layer.features = draw(n_features, seed)
            squares.append((layer(x, valid if padded else None) - exact)[judged].square().mean())
        return (torch.stack(squares).mean().sqrt() / scale).item()

    errors = [error(n) for n in (32, 512, 8192)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.13, errors
    slope = math.log(errors[2] / errors[0]) / math.log(8192 / 32)
    assert -0.6 < slope < -0.42, errors


def test_equal_keys_give_the_mean_of_the_values():
    """The normaliser makes weights that sum to one, however few features there are."""
    layer = attention(8)
    layer.to_k.weight.zero_()
    x = torch.randn(2, 11, DIM, generator=torch.Generator().manual_seed(2))
    mean = layer.to_out(layer.to_v(x).mean(1, keepdim=True)).expand(-1, 11, -1)
    torch.testing.assert_close(layer(x), mean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_outputs_stay_among_the_values_and_finite(scale):
    layer = attention()
    layer.to_out.weight.copy_(torch.eye(DIM))
    layer.to_out.bias.zero_()
    x = scale * torch.randn(2, 20, DIM, generator=torch.Generator().manual_seed(3))
    out, values = layer(x), layer.to_v(x)
    assert out.isfinite().all()
    assert (out <= values.amax(1, keepdim=True) + 1e-4 * scale).all()
    assert (out >= values.amin(1, keepdim=True) - 1e-4 * scale).all()


@pytest.mark.parametrize("with_padding", [False, True])
def test_a_cells_attention_and_gradient_know_no_neighbours(with_padding):
    """Also where keys of another cell are far longer: the maximum subtracted is the cell's own."""
    torch.manual_seed(5)
    block = PerformerBlock(DIM, HEADS, DIM_HEAD)
    small, large = torch.randn(1, 9, DIM), 8 * torch.randn(1, 9, DIM)
    block.attention_norm = torch.nn.Identity()  # so that the neighbour's keys do get longer
    if with_padding:
        batch = torch.cat([torch.cat([small, 50 * torch.ones(1, 6, DIM)], 1), torch.randn(1, 15, DIM) * 8])
        valid = torch.arange(15) < torch.tensor([[9], [15]])
    else:
        batch, valid = torch.cat([small, large]), None

    def run(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        out = block(x, valid)[0, :9]
        out.sin().sum().backward()
        return out.detach(), x.grad[0]

    alone, alone_gradient = run(small, None)
    together, gradient = run(batch, valid)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient[:9], alone_gradient[:9], atol=1e-5, rtol=1e-4)
    assert (gradient[9:] == 0).all()


def test_a_hidden_layer_computed_twice_changes_nothing(monkeypatch):
    torch.manual_seed(6)
    block, x = PerformerBlock(DIM, HEADS, DIM_HEAD), torch.randn(2, 9, DIM)

    def results() -> list[Tensor]:
        out = block(x)
        return [out, *torch.autograd.grad(out.sin().sum(), list(block.parameters()))]

    expected = results()
    monkeypatch.setattr(performer, "sizes_for", lambda device: replace(ON_CPU, recompute_values=0))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape[-1]) or x, lambda x: x):
        out = block(x)
    assert 4 * DIM not in kept  # the width of the hidden layer
    for ours, theirs in zip(results(), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(out, expected[0])


@pytest.mark.parametrize("tokens", ["all", "expressed"])
def test_without_gradients_one_tensor_holds_the_states_and_they_are_the_same(tokens):
    config = RNAEncoderConfig(dim=20, depth=2, heads=2, dim_head=8, tokens=tokens)
    encoder = RNAEncoder(config, 4000)
    cells = encoder.tokenize(random_cells("rna", 4000, 3000, 3).rna)
    expected = encoder(cells).detach()
    made = set()

    class Large(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.update(x.data_ptr() for x in [out] if isinstance(x, Tensor) and x.numel() >= expected.numel())
            return out

    with torch.no_grad(), Large():
        states = encoder(cells)
    assert made == {states.data_ptr()}
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


def test_a_cell_of_padding_alone_is_finite():
    layer = attention().requires_grad_(True)
    x = torch.randn(2, 5, DIM, requires_grad=True)
    out = layer(x, torch.tensor([[False] * 5, [True] * 5]))
    assert out.isfinite().all()
    (1e3 * out.sum()).backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(("n_features", "dim_head"), [(266, 64), (44, 16), (16, 16), (5, 16)])
def test_features_are_orthogonal_within_each_block(n_features, dim_head):
    features = draw(n_features, 0, dim_head)
    assert features.shape == (n_features, dim_head)
    for block in features.split(dim_head):
        cosines = torch.nn.functional.normalize(block, dim=1)
        torch.testing.assert_close(cosines @ cosines.T, torch.eye(len(block)), atol=1e-5, rtol=0)


def test_feature_lengths_are_those_of_gaussian_vectors():
    lengths = draw(64 * 100, 1, 64).norm(dim=1)
    assert lengths.mean().item() == pytest.approx(math.sqrt(2) * math.gamma(32.5) / math.gamma(32), rel=4e-3)
    assert lengths.mean().item() == pytest.approx(math.sqrt(64), rel=5e-3)
    assert lengths.square().mean().item() == pytest.approx(64, rel=5e-3)
    assert lengths.std().item() == pytest.approx(0.5**0.5, rel=0.05)


def test_features_point_in_all_directions_alike():
    """Mean 0 and covariance 1, for every row of a block: else the kernel is estimated with a bias."""
    n_blocks = 4000
    blocks = draw(16 * n_blocks, 2).unflatten(0, (n_blocks, 16))  # [n, row, d]
    assert blocks.mean(0).abs().max() < 5 / math.sqrt(n_blocks)  # 256 means of unit variance
    rows = blocks.flatten(0, 1)
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.eye(16), atol=0.03, rtol=0)


def test_features_depend_on_the_generator_alone():
    torch.manual_seed(8)
    first = draw(44, 3)
    torch.manual_seed(9)
    assert torch.equal(first, draw(44, 3))
    assert not torch.equal(first, draw(44, 4))


def test_default_number_of_features_is_the_published_one():
    assert n_features_for(64) == 266
    assert FavorAttention(20, 2, 64).features.shape == (266, 64)
