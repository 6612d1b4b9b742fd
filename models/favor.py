"""FAVOR+ attention in blocks of tokens: the random features of a block live in the cache and are never all stored.

    φ(x) = exp(s·xWᵀ − s²‖x‖²/2 − top) + ε,   s = d^-¼       φ [L, m]     (a factor m^-½ would cancel)
    C    = φ(K)ᵀ [V 1]                                       [m, d + 1]
    U    = φ(Q) C,   attention = U[:, :d] / U[:, d]          [L, d + 1]

`top`, the largest projection (of a query; of all keys of a cell), is a constant of the quotient but for rounding and
for ε; it is treated as one in the gradient. C is summed over blocks of keys with the largest projection so far, and
scaled when a larger one comes. The gradient computes the features a second time, block by block:

    dφ(Q) = dU Cᵀ     dC = φ(Q)ᵀ dU     dφ(K) = [V 1] dCᵀ     dV = φ(K) dC

and, since the exponential alone has a gradient, with G = dφ ∘ (φ − ε): dx = s·GW − s²·x·ΣG. W is not trained. The plain
form, which stores everything, is in tests/models/plain_favor.py.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FEATURE_EPS = 1e-4  # keeps every feature above zero, so that the normaliser never vanishes
BLOCK_TOKENS = 256
"""Tokens per block. Fixed, so that sums are taken in the same order however many cells there are."""
BLOCK_VALUES = 2**20
"""Features that are held at a time, about."""


def favor_attention(q: Tensor, k: Tensor, v: Tensor, features: Tensor, valid: Tensor | None = None) -> Tensor:
    """Attention of all queries to all keys, at a cost linear in their number.

    Parameters
    ----------
    q, k, v : [B, H, L, d]
    features : [m, d] random directions W
    valid : [B, L] bool or None; padding is no key

    Returns
    -------
    [B, H, L, d] in the dtype of `v`, computed in float32. The largest projection of the keys is taken per cell, never
    over the minibatch: a cell's result is the same in any company.
    """
    # Exponentials lose too much in bfloat16.
    with torch.autocast(v.device.type, enabled=False):
        return _Favor.apply(q, k, v, features.float(), valid)


class _Favor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, features, valid):
        out = torch.empty_like(v)
        context = v.new_zeros(*v.shape[:2], len(features), v.shape[-1] + 1, dtype=torch.float32)  # [B, H, m, d + 1]
        tops = v.new_full((len(v), 1, 1, 1), -torch.inf, dtype=torch.float32)
        for cells in _cells(q, features):
            c, top, bias = context[cells], tops[cells], torch.zeros_like(context[cells][:, :, :1])
            for tokens in _tokens(q):
                x, pad = k[cells, :, tokens].float(), _padding(valid, cells, tokens)
                values = _with_ones(v[cells, :, tokens], pad)
                projected, half_norm = _project(x, features, pad)
                counted = projected if pad is None else projected.masked_fill(pad, -torch.inf)
                highest = torch.maximum(top, counted.amax((1, 2, 3), keepdim=True))
                safe = highest.masked_fill(highest.isinf(), 0.0)  # nothing but padding so far
                c.mul_(torch.exp(top - safe)).add_(_bmm(projected.sub_(half_norm + safe).exp_().mT, values))
                bias += values.sum(-2, keepdim=True)
                top.copy_(highest)
            c.add_(bias, alpha=FEATURE_EPS)
            for tokens in _tokens(q):
                e = _query_features(q[cells, :, tokens], features, _padding(valid, cells, tokens))
                u = _bmm_with_eps(e, c)
                out[cells, :, tokens] = u[..., :-1] / u[..., -1:].clamp(min=torch.finfo(torch.float32).tiny)
        ctx.save_for_backward(q, k, v, features, valid, context, tops)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        with torch.autocast(d_out.device.type, enabled=False):
            return _gradients(d_out, *ctx.saved_tensors)


def _gradients(d_out, q, k, v, features, valid, context, tops) -> tuple[Tensor | None, ...]:
    """Gradients of everything `forward` is given; `context` [B, H, m, d + 1] is C, `tops` [B, 1, 1, 1]."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for cells in _cells(q, features):
        c, top = context[cells], tops[cells].masked_fill(tops[cells].isinf(), 0.0)
        dc = torch.zeros_like(c)
        for tokens in _tokens(q):
            x, pad = q[cells, :, tokens].float(), _padding(valid, cells, tokens)
            e = _query_features(x, features, pad)
            u, du = _bmm_with_eps(e, c), d_out[cells, :, tokens].float()
            tiny = torch.finfo(torch.float32).tiny
            norm = u[..., -1:].clamp(min=tiny)
            du = (du / norm).masked_fill(u[..., -1:] < tiny, 0.0)  # a cell of padding alone
            du = torch.cat([du, -(du * u[..., :-1]).sum(-1, keepdim=True) / norm], -1)
            dc += _bmm(e.mT, du).add_(du.sum(-2, keepdim=True), alpha=FEATURE_EPS)
            dq[cells, :, tokens] = _to_input(_bmm(du, c.mT).mul_(e), x, features)
        for tokens in _tokens(q):
            x, pad = k[cells, :, tokens].float(), _padding(valid, cells, tokens)
            values = _with_ones(v[cells, :, tokens], pad)
            projected, half_norm = _project(x, features, pad)
            e = projected.sub_(half_norm + top).exp_()
            d_values = _bmm_with_eps(e, dc)[..., :-1]
            dv[cells, :, tokens] = d_values if pad is None else d_values.masked_fill(pad, 0.0)
            dk[cells, :, tokens] = _to_input(_bmm(values, dc.mT).mul_(e), x, features)
    return dq, dk, dv, None, None


def _tokens(x: Tensor) -> Iterator[slice]:
    """Blocks of tokens of [B, H, L, d]."""
    return (slice(start, start + BLOCK_TOKENS) for start in range(0, x.shape[2], BLOCK_TOKENS))


def _cells(x: Tensor, features: Tensor) -> Iterator[slice]:
    """Blocks of cells whose features of one block of tokens fit.

    With one head all cells are a block: libraries multiply a single matrix by another route than several.
    """
    n = max(1, BLOCK_VALUES // (x.shape[1] * min(x.shape[2], BLOCK_TOKENS) * len(features)))
    n = n if x.shape[1] > 1 else max(len(x), 1)
    return (slice(start, start + n) for start in range(0, len(x), n))


def _padding(valid: Tensor | None, cells: slice, tokens: slice) -> Tensor | None:
    """[b, 1, l, 1] bool, true for padding."""
    return None if valid is None else ~valid[cells, None, tokens, None]


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """[b, H, n, i] · [b, H, i, o], each head of each cell by itself."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _bmm_with_eps(e: Tensor, c: Tensor) -> Tensor:
    """(e + ε) · c, without a pass over e for the sum."""
    return _bmm(e, c).add_(c.sum(-2, keepdim=True), alpha=FEATURE_EPS)


def _project(x: Tensor, features: Tensor, pad: Tensor | None) -> tuple[Tensor, Tensor]:
    """s·xWᵀ [b, H, l, m] and s²‖x‖²/2 [b, H, l, 1], infinite for padding, whose exponential is then 0."""
    scale = x.shape[-1] ** -0.25
    weights = (scale * features.mT).expand(x.shape[0] * x.shape[1], -1, -1)
    projected = torch.bmm(x.flatten(0, 1), weights).unflatten(0, x.shape[:2])
    half_norm = x.square().sum(-1, keepdim=True).mul_(scale**2 / 2)
    return projected, half_norm if pad is None else half_norm.masked_fill(pad, torch.inf)


def _query_features(x: Tensor, features: Tensor, pad: Tensor | None) -> Tensor:
    """φ(Q) − ε [b, H, l, m]."""
    projected, half_norm = _project(x.float(), features, pad)
    return projected.sub_(half_norm + projected.amax(-1, keepdim=True)).exp_()


def _with_ones(values: Tensor, pad: Tensor | None) -> Tensor:
    """[V 1] [b, H, l, d + 1] in float32, 0 for padding."""
    values = torch.cat([values.float(), torch.ones_like(values[..., :1], dtype=torch.float32)], -1)
    return values if pad is None else values.masked_fill_(pad, 0.0)


def _to_input(g: Tensor, x: Tensor, features: Tensor) -> Tensor:
    """Gradient of x [b, H, l, d] from G [b, H, l, m]."""
    scale = x.shape[-1] ** -0.25
    weights = (scale * features).expand(x.shape[0] * x.shape[1], -1, -1)
    dx = torch.bmm(g.flatten(0, 1), weights).unflatten(0, x.shape[:2])
    return dx.sub_(g.sum(-1, keepdim=True) * scale**2 * x)
