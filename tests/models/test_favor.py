"""The attention that computes features in blocks equals the plain one, which stores them all; so do its gradients."""

import pytest
import torch
from torch import Tensor

from models import favor
from models.favor import favor_attention
from models.performer import orthogonal_features
from tests.models.plain_favor import plain_favor

SHAPES = [(1, 3, 700, 16), (3, 2, 300, 32), (5, 1, 30, 8), (2, 10, 257, 64), (4, 2, 1, 16)]


def draw(shape: tuple[int, ...], seed: int, padded: bool) -> tuple[list[Tensor], Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    qkv = [1.2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    features = orthogonal_features(3 * shape[-1], shape[-1], generator).double()
    lengths = torch.randint(1, shape[2] + 1, (shape[0], 1), generator=generator)
    return qkv, features, torch.arange(shape[2]) < lengths if padded else None


def results(function, qkv: list[Tensor], features: Tensor, valid: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Attention and its gradients; padded queries are asked for nothing, their results do not count."""
    inputs = [x.to(dtype).requires_grad_() for x in qkv]
    out = function(*inputs, features.to(dtype), valid)
    counted = torch.ones_like(out) if valid is None else valid[:, None, :, None].expand_as(out).to(dtype)
    gradients = torch.autograd.grad((out.sin() * counted).sum(), inputs)
    return [(out * counted).detach(), *gradients]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_the_plain_ones(shape, padded, seed):
    arguments = draw(shape, seed, padded)
    expected = results(plain_favor, *arguments, torch.float64)
    ours = results(favor_attention, *arguments, torch.float32)
    for found, truth, tolerance in zip(ours, expected, (1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        assert (found - truth).norm() <= tolerance * max(truth.norm(), expected[0].norm() * 1e-2)


@pytest.mark.parametrize("cut", [(7, 2**20), (256, 1), (1, 500)], ids=str)
def test_blocks_of_any_size_give_the_same(cut, monkeypatch):
    arguments = draw((3, 2, 60, 16), 3, padded=True)
    expected = results(favor_attention, *arguments, torch.float32)
    monkeypatch.setattr(favor, "BLOCK_TOKENS", cut[0])
    monkeypatch.setattr(favor, "BLOCK_VALUES", cut[1])
    for ours, theirs in zip(results(favor_attention, *arguments, torch.float32), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_long_keys_late_in_a_cell_do_not_overflow(monkeypatch):
    """The largest projection so far grows from block to block; sums taken before are scaled."""
    monkeypatch.setattr(favor, "BLOCK_TOKENS", 16)
    qkv, features, _ = draw((2, 2, 64, 16), 4, padded=False)
    qkv[1] = qkv[1] * torch.linspace(0.1, 12, 64, dtype=torch.float64)[:, None]
    expected = results(plain_favor, qkv, features, None, torch.float64)
    for ours, theirs in zip(results(favor_attention, qkv, features, None, torch.float32), expected, strict=True):
        assert ours.isfinite().all()
        assert (ours - theirs).norm() <= 1e-4 * max(theirs.norm(), expected[0].norm() * 1e-2)


def test_features_are_never_all_stored():
    """The largest tensor kept for the gradient is an input or the context."""
    kept = []
    qkv = [torch.randn(1, 2, 2000, 16, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        favor_attention(*qkv, orthogonal_features(64, 16))
    assert max(kept) == qkv[0].numel()


def test_half_precision_comes_back_as_it_came():
    (q, k, v), features, _ = draw((2, 2, 40, 16), 5, padded=False)
    half = [x.bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = favor_attention(*half, features.float())
    assert ours.dtype == torch.bfloat16
    expected = plain_favor(*[x.double() for x in half], features)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-2, atol=1e-2)
