"""The attention that computes features in blocks equals the plain one, which stores them all; so do its gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import favor
from models.device import ON_CPU
from models.favor import favor_attention
from models.performer import orthogonal_features
from tests.models.plain_favor import plain_attention
from tests.pretend_gpu import PretendGPU

SHAPES = [(1, 3, 700, 16), (3, 2, 300, 32), (5, 1, 30, 8), (2, 10, 257, 64), (4, 2, 1, 16)]


def draw(shape: tuple[int, ...], seed: int, padded: bool) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Stream and weights of `shape` [B, H, L, d], features, padding."""
    n_cells, heads, n_tokens, dim_head = shape
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)
    width, inner = 20, heads * dim_head
    to_q, to_k, to_v = (1.2 * width**-0.5 * normal(inner, width) for _ in range(3))
    inputs = [normal(n_cells, n_tokens, width), to_q, to_k, to_v, inner**-0.5 * normal(width, inner), normal(width)]
    features = orthogonal_features(3 * dim_head, dim_head, generator).double()
    lengths = torch.randint(1, n_tokens + 1, (n_cells, 1), generator=generator)
    return inputs, features, torch.arange(n_tokens) < lengths if padded else None


def results(function, inputs: list[Tensor], features: Tensor, valid: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Attention and its gradients; padded queries are asked for nothing, their results do not count."""
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    out = function(*inputs, features.to(dtype), valid)
    counted = torch.ones_like(out) if valid is None else valid[:, :, None].expand_as(out).to(dtype)
    gradients = torch.autograd.grad((out.sin() * counted).sum(), inputs)
    return [(out * counted).detach(), *gradients]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_the_plain_ones(shape, padded, seed):
    arguments = draw(shape, seed, padded)
    expected = results(plain_attention, *arguments, torch.float64)
    ours = results(favor_attention, *arguments, torch.float32)
    for found, truth, tolerance in zip(ours, expected, (1e-5, *[1e-4] * 6), strict=True):
        assert (found - truth).norm() <= tolerance * max(truth.norm(), expected[0].norm() * 1e-2)


def cut_into(monkeypatch, tokens: int, values: int) -> None:
    """Blocks of `tokens` tokens and about `values` features."""
    sizes = replace(ON_CPU, block_tokens=tokens, block_values=values)
    monkeypatch.setattr(favor, "sizes_for", lambda device: sizes)


@pytest.mark.parametrize("cut", [(7, 2**20), (256, 1), (1, 500), (0, 2**20), (0, 500)], ids=str)
def test_blocks_of_any_size_give_the_same(cut, monkeypatch):
    arguments = draw((3, 2, 60, 16), 3, padded=True)
    expected = results(favor_attention, *arguments, torch.float32)
    cut_into(monkeypatch, *cut)
    for ours, theirs in zip(results(favor_attention, *arguments, torch.float32), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_long_keys_late_in_a_cell_do_not_overflow(monkeypatch):
    """The largest projection so far grows from block to block; sums taken before are scaled."""
    cut_into(monkeypatch, 16, 2**21)
    inputs, features, _ = draw((2, 2, 64, 16), 4, padded=False)
    inputs[0] = inputs[0] * torch.linspace(0.1, 8, 64, dtype=torch.float64)[:, None]
    inputs[1] = inputs[1] / 8  # the queries stay short
    expected = results(plain_attention, inputs, features, None, torch.float64)
    for ours, theirs in zip(results(favor_attention, inputs, features, None, torch.float32), expected, strict=True):
        assert ours.isfinite().all()
        assert (ours - theirs).norm() <= 1e-4 * max(theirs.norm(), expected[0].norm() * 1e-2)


def test_nothing_larger_than_the_stream_is_kept_or_made():
    """Not the features, nor queries, keys and values: four heads of 16 are wider than the stream of 20."""
    inputs, features, _ = draw((1, 4, 4000, 16), 0, padded=False)
    inputs, kept = [x.float().requires_grad_() for x in inputs], []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x),
        Largest() as made,
    ):
        favor_attention(*inputs, features.float()).sum().backward()
    assert max(kept) == inputs[0].numel() == 4000 * 20
    assert made.values <= max(4000 * 20, 4 * 48 * 256)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.values = max([self.values, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("device", ["cpu", "pretend"])
def test_autocast_projects_in_half_precision(device):
    """A GPU multiplies the features in half precision as well."""
    inputs, features, _ = draw((2, 2, 40, 16), 5, padded=False)
    with PretendGPU():
        ours = [x.float().to(device).requires_grad_() for x in inputs]
        with torch.autocast(device, torch.bfloat16):
            out = favor_attention(*ours, features.float().to(device))
        assert out.dtype == torch.bfloat16
        found = [out.detach(), *torch.autograd.grad(out.float().sin().sum(), ours)]
        found = [tensor.cpu() for tensor in found]
    expected = results(plain_attention, inputs, features, None, torch.float64)
    assert all(gradient.dtype == torch.float32 for gradient in found[1:])
    for half, truth in zip(found, expected, strict=True):
        assert (half.double() - truth).norm() <= 2e-2 * truth.norm()


@pytest.mark.parametrize("n_cells", [2, 3, 5, 9])
@pytest.mark.parametrize("per_block", [1, 2, 4])
def test_no_cell_is_left_alone(n_cells, per_block, monkeypatch):
    """The last cell joins the block before: alone it would be multiplied by another route."""
    cut_into(monkeypatch, 256, per_block * 10 * 8)
    blocks, _ = favor.blocks(torch.zeros(n_cells, 10, 3), 1, torch.zeros(8, 4))
    covered = [cell for block in blocks for cell in range(n_cells)[block]]
    assert covered == list(range(n_cells))
    sizes = {block.stop - block.start for block in blocks}
    assert sizes == {1} if per_block == 1 else 1 not in sizes
