"""FAVOR+ attention in blocks of tokens: queries, keys, values and features exist one block at a time.

    Q, K, V = x Wqᵀ, x Wkᵀ, x Wvᵀ                             [L, d] per head
    φ(x) = exp(s·xWᵀ − s²‖x‖²/2 − top) + ε,   s = d^-¼       φ [L, m]     (a factor m^-½ would cancel)
    C    = φ(K)ᵀ [V 1]                                       [m, d + 1]
    U    = φ(Q) C,   A = U[:, :d] / U[:, d],   y = A Woᵀ + b

`top` is the largest projection: of one query, or of all keys of a cell. It keeps exponentials below 1 and cancels in
the quotient (up to rounding and ε), so the gradient treats it as a constant. C is summed over blocks of keys with the
largest projection so far, and rescaled when a larger one comes. The backward pass computes each block a second time:

    dφ(Q) = dU Cᵀ     dC = φ(Q)ᵀ dU     dφ(K) = [V 1] dCᵀ     dV = φ(K) dC

Only the exponential has a gradient, so with G = dφ ∘ (φ − ε): dx = s·GW − s²·x·ΣG. W is not trained. The plain form,
which stores everything, is in tests/models/plain_favor.py.

A CPU takes blocks that fit into its cache, a GPU as many tokens and cells as its memory allows (`models.device`). Under
autocast to bfloat16, a GPU also multiplies features in bfloat16 and adds up in float32; exponents, exponentials and
normalisers are float32 everywhere.
"""

from collections.abc import Callable
from functools import lru_cache
from warnings import warn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.device import is_cpu, sizes_for

FUSED = True
"""Whether an NVIDIA GPU may use the kernels of `models.favor_kernels`."""
LARGEST_DIFFERENCE = 0.05
"""Between the kernels and the plain path on a small problem; in bfloat16, roundings alone give 0.02."""

FEATURE_EPS = 1e-4  # keeps every feature above zero, so that the normaliser never vanishes
TINY = torch.finfo(torch.float32).tiny


def favor_attention(
    x: Tensor,
    to_q: Tensor,
    to_k: Tensor,
    to_v: Tensor,
    to_out: Tensor,
    bias: Tensor,
    features: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """Attention of all tokens to all tokens, at a cost linear in their number.

    Parameters
    ----------
    x : [B, L, D]
    to_q, to_k, to_v : [H·d, D] weights
    to_out, bias : [D, H·d] and [D] weights
    features : [m, d] random directions W; d gives the number of heads H
    valid : [B, L] bool, false for padding, or None; queries do not see padding

    Returns
    -------
    [B, L, D]

    Notes
    -----
    Under autocast the projections have its precision. On a CPU the features are float32.
    The largest projection of the keys is taken per cell, never over the minibatch, so a cell's result does not depend
    on the other cells.
    """
    dtype = _precision(x)
    with torch.autocast(x.device.type, enabled=False):
        weights = (weight.to(dtype) for weight in (to_q, to_k, to_v, to_out, bias))
        function = fused_favor(x.device, dtype, features.shape[1]) or Favor
        return function.apply(x.to(dtype), *weights, features.float(), valid)


@torch.no_grad()
def add_favor_attention(x: Tensor, norm: Callable[[Tensor], Tensor], *weights: Tensor, valid: Tensor | None) -> None:
    """Add `favor_attention(norm(x), …)` to x itself, without gradients; nothing else is as large as x.

    Parameters
    ----------
    x : [B, L, D], changed in place
    norm : of each token by itself
    weights : to_q, to_k, to_v, to_out, bias and features of `favor_attention`
    valid : as there
    """
    dtype = _precision(x)
    with torch.autocast(x.device.type, enabled=False):
        *weights, features = weights
        read = lambda cells, tokens: norm(x[cells, tokens]).to(dtype)
        # A block's queries are read for the last time just before their sum is written.
        write = lambda cells, tokens, part: x[cells, tokens].add_(part)
        _attend(x, read, write, *(weight.to(dtype) for weight in weights), features.float(), valid)


def _precision(x: Tensor) -> torch.dtype:
    """The type of the projections: autocast's, or that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@lru_cache
def fused_favor(device: torch.device, dtype: torch.dtype, dim_head: int) -> type[torch.autograd.Function] | None:
    """The kernels of `models.favor_kernels`, if they can be used on a device; else None.

    They are tried once on a small problem. If that fails, or gives other numbers than the plain path, a warning says so
    and the plain path is used.
    """
    if device.type != "cuda" or not FUSED:
        return None
    try:
        from models.favor_kernels import WIDTHS, FusedFavor

        if dim_head not in WIDTHS:
            return None
        error = _difference(FusedFavor, device, dtype, dim_head)
    except Exception as failure:  # whatever a compiler, a driver or an old GPU may raise
        warn(
            f"attention by the plain path, which is slower: {type(failure).__name__}: {str(failure)[:200]}",
            stacklevel=2,
        )
        return None
    if error > LARGEST_DIFFERENCE:
        warn(f"attention by the plain path, which is slower: the kernels differ from it by {error:.1%}", stacklevel=2)
        return None
    return FusedFavor


def _difference(function, device: torch.device, dtype: torch.dtype, dim_head: int) -> float:
    """Relative difference of `function` from the plain path: the largest of the result's and the gradients'."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator).to(device, dtype)
    n_heads, width, n_features = 2, 32, 3 * dim_head + 5
    weights = [width**-0.5 * draw(n_heads * dim_head, width) for _ in range(3)]
    inputs = [draw(2, 150, width), *weights, draw(width, n_heads * dim_head) / width, draw(width)]
    features, valid = draw(n_features, dim_head).float(), torch.ones(2, 150, dtype=torch.bool, device=device)
    valid[1, 70:] = False
    found = []
    for path in (function, Favor):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            out = path.apply(*leaves, features, valid) * valid[..., None]
        found.append([out.detach(), *torch.autograd.grad(out.float().sin().sum(), leaves)])
    differences = [((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(*found, strict=True)]
    return max(differences, key=lambda value: value if value == value else float("inf"))


class Favor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, to_q, to_k, to_v, to_out, bias, features, valid):
        y = x.new_empty(*x.shape[:2], len(to_out))
        read = lambda cells, tokens: x[cells, tokens]
        write = lambda cells, tokens, part: y[cells, tokens].copy_(part)
        context, tops = _attend(x, read, write, to_q, to_k, to_v, to_out, bias, features, valid)
        ctx.save_for_backward(x, to_q, to_k, to_v, to_out, features, valid, context, tops)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        with torch.autocast(dy.device.type, enabled=False):
            return *_gradients(dy, *ctx.saved_tensors), None, None


def _attend(x, read, write, to_q, to_k, to_v, to_out, bias, features, valid) -> tuple[Tensor, Tensor]:
    """Read x block by block, and write the attention of each; return C [B, H, m, d + 1] and the tops [B, 1, 1, 1]."""
    heads, to_kv = len(to_q) // features.shape[1], torch.cat([to_k, to_v])
    shape = len(x), heads, len(features), features.shape[1] + 1
    context = x.new_zeros(shape, dtype=torch.float32)
    tops = x.new_full((len(x), 1, 1, 1), -torch.inf, dtype=torch.float32)
    block_cells, block_tokens = blocks(x, heads, features)
    for cells in block_cells:
        # First pass, over the keys: C = φ(K)ᵀ [V 1]. The last column sums φ(K), for the normaliser.
        c, top, bias_of_c = context[cells], tops[cells], torch.zeros_like(context[cells][:, :, :1])
        for tokens in block_tokens:
            pad = _padding(valid, cells, tokens)
            k, v = _heads(read(cells, tokens), to_kv, 2 * heads).split(heads, dim=1)
            values = _with_ones(v, pad)
            projected, half_norm = _project(k, features, pad)
            counted = projected if pad is None else projected.masked_fill(pad, -torch.inf)
            highest = torch.maximum(top, counted.amax((1, 2, 3), keepdim=True))
            safe = highest.masked_fill(highest.isinf(), 0.0)  # nothing but padding so far
            e = projected.sub_(half_norm + safe).exp_().to(k.dtype)
            c.mul_(torch.exp(top - safe)).add_(_bmm(e.mT, values))
            bias_of_c += values.sum(-2, keepdim=True, dtype=torch.float32)
            top.copy_(highest)
        c.add_(bias_of_c, alpha=FEATURE_EPS)  # the ε in φ(K), once for all keys
        # Second pass, over the queries, which need C alone.
        for tokens in block_tokens:
            part = read(cells, tokens)
            q = _heads(part, to_q, heads)
            u = _bmm_with_eps(_query_features(q, features, _padding(valid, cells, tokens)), c)
            attended = _merged(u[..., :-1] / u[..., -1:].clamp(min=TINY), part.dtype)
            write(cells, tokens, torch.baddbmm(bias, attended, to_out.mT.expand(len(attended), -1, -1)))
    return context, tops


def _gradients(dy, x, to_q, to_k, to_v, to_out, features, valid, context, tops) -> tuple[Tensor, ...]:
    """Gradients of x and of the weights; `context` [B, H, m, d + 1] is C, `tops` [B, 1, 1, 1]."""
    heads, to_kv = len(to_q) // features.shape[1], torch.cat([to_k, to_v])
    dx = torch.empty_like(x)
    d_q, d_kv, d_out = (torch.zeros_like(weight, dtype=torch.float32) for weight in (to_q, to_kv, to_out))
    block_cells, block_tokens = blocks(x, heads, features)
    for cells in block_cells:
        c, top = context[cells], tops[cells].masked_fill(tops[cells].isinf(), 0.0)
        dc = torch.zeros_like(c)
        for tokens in block_tokens:
            part, d_part = x[cells, tokens], dy[cells, tokens]
            q = _heads(part, to_q, heads)
            e = _query_features(q, features, _padding(valid, cells, tokens))
            u = _bmm_with_eps(e, c)
            norm = u[..., -1:].clamp(min=TINY)
            add_weight_gradient(d_out, d_part, _merged(u[..., :-1] / norm, x.dtype))
            du = (d_part @ to_out).unflatten(-1, (heads, -1)).transpose(1, 2).float()
            du = (du / norm).masked_fill(u[..., -1:] < TINY, 0.0)  # a cell of padding alone
            du = torch.cat([du, -(du * u[..., :-1]).sum(-1, keepdim=True) / norm], -1)
            dc += _bmm(e.mT, du).add_(du.sum(-2, keepdim=True), alpha=FEATURE_EPS)
            dq = _merged(_to_input(_bmm(du.to(q.dtype), c.mT).mul_(e), q, features), x.dtype)
            add_weight_gradient(d_q, dq, part)
            dx[cells, tokens] = dq @ to_q
        for tokens in block_tokens:
            part, pad = x[cells, tokens], _padding(valid, cells, tokens)
            k, v = _heads(part, to_kv, 2 * heads).split(heads, dim=1)
            values = _with_ones(v, pad)
            projected, half_norm = _project(k, features, pad)
            e = projected.sub_(half_norm + top).exp_().to(k.dtype)
            dv = _bmm_with_eps(e, dc)[..., :-1]
            dv = dv if pad is None else dv.masked_fill(pad, 0.0)
            dk = _to_input(_bmm(values, dc.mT).mul_(e), k, features)
            dkv = _merged(torch.cat([dk, dv], dim=1), x.dtype)
            add_weight_gradient(d_kv, dkv, part)
            dx[cells, tokens] += dkv @ to_kv
    d_k, d_v = d_kv.split(len(to_k))
    weights = (gradient.to(x.dtype) for gradient in (d_q, d_k, d_v, d_out, dy.sum((0, 1))))
    return dx, *weights


def blocks(x: Tensor, heads: int, features: Tensor) -> tuple[list[slice], list[slice]]:
    """Blocks of cells and blocks of tokens of [B, L, D]; a block has one cell only if all have.

    Libraries multiply one matrix by another algorithm than a batch of matrices. With such blocks a cell's numbers do
    not depend on how many others there are (unless a minibatch has one cell only).
    """
    sizes, per_token = sizes_for(x.device), heads * len(features)
    length = sizes.block_tokens or max(sizes.block_values // per_token, 1)
    tokens = [slice(start, start + length) for start in range(0, x.shape[1], length)]
    n = max(1, sizes.block_values // (per_token * max(min(x.shape[1], length), 1)))
    starts = list(range(0, len(x), n))
    if n > 1 and len(starts) > 1 and len(x) - starts[-1] == 1:
        starts.pop()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(x)], strict=True)], tokens


def _padding(valid: Tensor | None, cells: slice, tokens: slice) -> Tensor | None:
    """[b, 1, l, 1] bool, true for padding; None where there is none."""
    if valid is None:
        return None
    pad = ~valid[cells, None, tokens, None]
    return pad if not is_cpu(pad) or pad.any() else None


def _heads(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """[b, l, D] → [b, heads, l, d], one product per cell; float32 on a CPU, on a GPU as precise as x."""
    projected = torch.bmm(x, weight.mT.expand(len(x), -1, -1))
    projected = projected.unflatten(-1, (heads, -1)).transpose(1, 2)
    return projected.float() if is_cpu(x) else projected


def _merged(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[b, H, l, d] → [b, l, H·d]"""
    return x.to(dtype).transpose(1, 2).flatten(2)


def add_weight_gradient(total: Tensor, d_out: Tensor, x: Tensor) -> None:
    """Add a block's share of the gradient of the weight [out, in] between x [b, l, in] and [b, l, out]."""
    d_out, x = d_out.flatten(0, 1).mT, x.flatten(0, 1)
    total += d_out @ x if is_cpu(x) else _product(d_out[None], x[None])[0]


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """[b, H, n, i] · [b, H, i, o] → float32, one product per head and cell."""
    return _product(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[n, i, k] · [n, k, o] → float32; if one is bfloat16, so is the other, and the sums are float32."""
    if torch.bfloat16 not in (a.dtype, b.dtype):
        return torch.bmm(a, b)
    a, b = a.bfloat16(), b.bfloat16()
    # Only CUDA has this product. Elsewhere the same numbers are multiplied in float32.
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())


def _bmm_with_eps(e: Tensor, c: Tensor) -> Tensor:
    """(e + ε) · c, without a pass over e for the sum."""
    return _bmm(e, c).add_(c.sum(-2, keepdim=True), alpha=FEATURE_EPS)


def _project(x: Tensor, features: Tensor, pad: Tensor | None) -> tuple[Tensor, Tensor]:
    """s·xWᵀ [b, H, l, m] and s²‖x‖²/2 [b, H, l, 1], infinite for padding, whose exponential is then 0."""
    scale = x.shape[-1] ** -0.25
    weights = (scale * features.mT).to(x.dtype).expand(x.shape[0] * x.shape[1], -1, -1)
    projected = _product(x.flatten(0, 1), weights).unflatten(0, x.shape[:2])
    half_norm = x.float().square().sum(-1, keepdim=True).mul_(scale**2 / 2)
    return projected, half_norm if pad is None else half_norm.masked_fill(pad, torch.inf)


def _query_features(q: Tensor, features: Tensor, pad: Tensor | None) -> Tensor:
    """φ(Q) − ε [b, H, l, m], as precise as q."""
    projected, half_norm = _project(q, features, pad)
    return projected.sub_(half_norm + projected.amax(-1, keepdim=True)).exp_().to(q.dtype)


def _with_ones(values: Tensor, pad: Tensor | None) -> Tensor:
    """[V 1] [b, H, l, d + 1], 0 for padding."""
    values = torch.cat([values, torch.ones_like(values[..., :1])], -1)
    return values if pad is None else values.masked_fill_(pad, 0.0)


def _to_input(g: Tensor, x: Tensor, features: Tensor) -> Tensor:
    """Gradient of x [b, H, l, d] from G [b, H, l, m]."""
    scale = x.shape[-1] ** -0.25
    weights = (scale * features).to(x.dtype).expand(x.shape[0] * x.shape[1], -1, -1)
    dx = _product(g.flatten(0, 1), weights).unflatten(0, x.shape[:2])
    return dx.sub_(g.sum(-1, keepdim=True) * scale**2 * x)
