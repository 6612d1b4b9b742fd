"""FAVOR+ attention for NVIDIA GPUs in five kernels, whose features never leave the chip.

The plain path (`models.favor`) writes the features of all tokens to memory and reads them several times; at the
published size that takes longer than the products. Each kernel here computes a tile of features, uses it and drops it.

    key_sums         C = φ(K)ᵀ [V 1], and the largest projection of the keys
    attend           A = U[:, :d] / U[:, d],  U = φ(Q) C
    query_gradients  dQ, and dU for the next one
    query_sums       dC = φ(Q)ᵀ dU
    key_gradients    dK and dV

Sums over tokens are kept per stretch of tokens and added in a fixed order afterwards, so results have the same bits in
each run. The formulas and their notation are those of `models.favor`.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.favor import FEATURE_EPS, TINY, add_weight_gradient, blocks

TOKENS, FEATURES = 64, 64
"""Tokens and features of a tile."""
STRETCH = 1024
"""Tokens whose sums one program takes."""
WIDTHS = (16, 32, 64, 128)
"""Widths of a head that the kernels can take."""


@triton.jit
def _tile(stride, length, valid, t, d, HAS_PADDING: tl.constexpr):
    """Places [T, D] of the tokens t of a cell and head, and which of the tokens there are."""
    there = t < length
    if HAS_PADDING:
        there = there & (tl.load(valid + t, mask=there, other=0) != 0)
    return t[:, None].to(tl.int64) * stride + d[None, :], there


@triton.jit
def _project(x, w, m, n_features, half_scale, PRECISION: tl.constexpr):
    """s·xWᵀ [T, M], -inf where there is no feature, and s²‖x‖²/2 [T]."""
    projected = tl.dot(x, tl.trans(w), input_precision=PRECISION)
    projected = tl.where((m < n_features)[None, :], projected, float("-inf"))
    full = x.to(tl.float32)
    return projected, tl.sum(full * full, 1) * half_scale


@triton.jit
def _key_sums(
    k, v, w, valid, sums, ones, tops, length, n_features, heads, stride_cell, stride, half_scale, stretch,
    D: tl.constexpr, M: tl.constexpr, T: tl.constexpr, HAS_PADDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cell, head = (row // heads).to(tl.int64), row % heads
    m, d = block * M + tl.arange(0, M), tl.arange(0, D)
    weights = tl.load(w + m[:, None] * D + d[None, :], mask=(m < n_features)[:, None], other=0.0)
    offset = cell * stride_cell + head * D
    top = float("-inf")
    of_values, of_ones = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32)
    for start in range(part * stretch, tl.minimum((part + 1) * stretch, length), T):
        t = start + tl.arange(0, T)
        places, there = _tile(stride, length, valid + cell * length, t, d, HAS_PADDING)
        x = tl.load(k + offset + places, mask=there[:, None], other=0.0)
        values = tl.load(v + offset + places, mask=there[:, None], other=0.0)
        projected, half = _project(x, weights, m, n_features, half_scale, PRECISION)
        projected = tl.where(there[:, None], projected, float("-inf"))
        highest = tl.maximum(top, tl.max(projected))
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        e = tl.exp(projected - (half + safe)[:, None])
        shrink = tl.exp(top - safe)
        of_values = of_values * shrink + tl.dot(tl.trans(e).to(values.dtype), values, input_precision=PRECISION)
        of_ones = of_ones * shrink + tl.sum(e, 0)
        top = highest
    out = (row * tl.num_programs(2) + part).to(tl.int64) * tl.num_programs(1) * M + m
    tl.store(sums + out[:, None] * D + d[None, :], of_values)
    tl.store(ones + out, of_ones)
    tl.store(tops + (row * tl.num_programs(2) + part) * tl.num_programs(1) + block, top)


@triton.jit
def _sums_of_queries(
    x, half, w, c, c_ones, c_total, ones_total, n_features, there,
    EPS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U of a tile: the sums over values [T, D] and over ones [T]; and the largest projection of each query [T]."""
    d = tl.arange(0, D)
    top = tl.full([T], float("-inf"), tl.float32)
    of_values, of_ones = tl.zeros([T, D], tl.float32), tl.zeros([T], tl.float32)
    for start in range(0, n_features, M):
        m = start + tl.arange(0, M)
        inside = m < n_features
        weights = tl.load(w + m[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        projected, _ = _project(x, weights, m, n_features, 0.0, PRECISION)
        highest = tl.maximum(top, tl.max(projected, 1))
        e, shrink = tl.exp(projected - highest[:, None]), tl.exp(top - highest)
        values = tl.load(c + m[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        ones = tl.load(c_ones + m, mask=inside, other=0.0)
        update = tl.dot(e.to(values.dtype), values, input_precision=PRECISION)
        of_values = of_values * shrink[:, None] + update
        of_ones = of_ones * shrink + tl.sum(e * ones[None, :], 1)
        top = highest
    weight = tl.where(there, tl.exp(-half), 0.0)
    of_values = of_values * weight[:, None] + EPS * tl.load(c_total + d)[None, :]
    return of_values, of_ones * weight + EPS * tl.load(ones_total), top


@triton.jit
def _attend(
    q, w, c, c_ones, c_total, ones_total, valid, attended, length, n_features, heads, stride_cell, stride, half_scale,
    EPS: tl.constexpr, TINY: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, T: tl.constexpr, HAS_PADDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start, row = tl.program_id(0) * T, tl.program_id(1)
    cell, head = (row // heads).to(tl.int64), row % heads
    t, d = start + tl.arange(0, T), tl.arange(0, D)
    places, there = _tile(stride, length, valid + cell * length, t, d, HAS_PADDING)
    x = tl.load(q + cell * stride_cell + head * D + places, mask=(t < length)[:, None], other=0.0)
    full = x.to(tl.float32)
    half = tl.sum(full * full, 1) * half_scale
    c, c_ones = c + row.to(tl.int64) * n_features * D, c_ones + row * n_features
    u, norm, _ = _sums_of_queries(
        x, half, w, c, c_ones, c_total + row * D, ones_total + row, n_features, there, EPS, D, M, T, PRECISION
    )
    out = u / tl.maximum(norm, TINY)[:, None]
    at = attended + (cell * length * heads + head) * D + t[:, None].to(tl.int64) * heads * D + d[None, :]
    tl.store(at, out.to(x.dtype), mask=(t < length)[:, None])


@triton.jit
def _query_gradients(
    q, w, c, c_ones, c_total, ones_total, valid, d_attended, attended, dq, du, du_ones, tops,
    length, n_features, heads, stride_cell, stride, half_scale,
    EPS: tl.constexpr, TINY: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, T: tl.constexpr, HAS_PADDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start, row = tl.program_id(0) * T, tl.program_id(1)
    cell, head = (row // heads).to(tl.int64), row % heads
    t, d = start + tl.arange(0, T), tl.arange(0, D)
    inside = t < length
    places, there = _tile(stride, length, valid + cell * length, t, d, HAS_PADDING)
    x = tl.load(q + cell * stride_cell + head * D + places, mask=inside[:, None], other=0.0)
    full = x.to(tl.float32)
    half = tl.sum(full * full, 1) * half_scale
    c, c_ones = c + row.to(tl.int64) * n_features * D, c_ones + row * n_features
    u, norm, top = _sums_of_queries(
        x, half, w, c, c_ones, c_total + row * D, ones_total + row, n_features, there, EPS, D, M, T, PRECISION
    )
    out = u / tl.maximum(norm, TINY)[:, None]
    at = (cell * length * heads + head) * D + t[:, None].to(tl.int64) * heads * D + d[None, :]
    tl.store(attended + at, out.to(x.dtype), mask=inside[:, None])
    gradient = tl.load(d_attended + at, mask=inside[:, None], other=0.0).to(tl.float32)
    is_sum = norm >= TINY  # not so in a cell of padding alone
    of_values = tl.where(is_sum[:, None], gradient / tl.maximum(norm, TINY)[:, None], 0.0)
    of_ones = -tl.sum(of_values * out, 1)
    tl.store(du + at, of_values.to(x.dtype), mask=inside[:, None])
    at_token = (cell * length + t) * heads + head
    tl.store(du_ones + at_token, of_ones, mask=inside)
    tl.store(tops + at_token, top, mask=inside)
    low = of_values.to(x.dtype)
    result, total = tl.zeros([T, D], tl.float32), tl.zeros([T], tl.float32)
    for begin in range(0, n_features, M):
        m = begin + tl.arange(0, M)
        known = m < n_features
        weights = tl.load(w + m[:, None] * D + d[None, :], mask=known[:, None], other=0.0)
        projected, _ = _project(x, weights, m, n_features, 0.0, PRECISION)
        e = tl.where(there[:, None], tl.exp(projected - (half + top)[:, None]), 0.0)
        values = tl.load(c + m[:, None] * D + d[None, :], mask=known[:, None], other=0.0)
        ones = tl.load(c_ones + m, mask=known, other=0.0)
        g = (tl.dot(low, tl.trans(values), input_precision=PRECISION) + of_ones[:, None] * ones[None, :]) * e
        result += tl.dot(g.to(x.dtype), weights, input_precision=PRECISION)
        total += tl.sum(g, 1)
    result -= total[:, None] * (2 * half_scale) * full
    tl.store(dq + at, result.to(x.dtype), mask=inside[:, None])


@triton.jit
def _query_sums(
    q, w, valid, du, du_ones, tops, sums, ones, length, n_features, heads, stride_cell, stride, half_scale, stretch,
    D: tl.constexpr, M: tl.constexpr, T: tl.constexpr, HAS_PADDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cell, head = (row // heads).to(tl.int64), row % heads
    m, d = block * M + tl.arange(0, M), tl.arange(0, D)
    weights = tl.load(w + m[:, None] * D + d[None, :], mask=(m < n_features)[:, None], other=0.0)
    of_values, of_ones = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32)
    for start in range(part * stretch, tl.minimum((part + 1) * stretch, length), T):
        t = start + tl.arange(0, T)
        offset = cell * stride_cell + head * D
        places, there = _tile(stride, length, valid + cell * length, t, d, HAS_PADDING)
        x = tl.load(q + offset + places, mask=there[:, None], other=0.0)
        at = (cell * length * heads + head) * D + t[:, None].to(tl.int64) * heads * D + d[None, :]
        values = tl.load(du + at, mask=there[:, None], other=0.0)
        at_token = (cell * length + t) * heads + head
        of_one = tl.load(du_ones + at_token, mask=there, other=0.0)
        top = tl.load(tops + at_token, mask=there, other=0.0)
        projected, half = _project(x, weights, m, n_features, half_scale, PRECISION)
        e = tl.where(there[:, None], tl.exp(projected - (half + top)[:, None]), 0.0)
        of_values += tl.dot(tl.trans(e).to(values.dtype), values, input_precision=PRECISION)
        of_ones += tl.sum(e * of_one[:, None], 0)
    out = (row * tl.num_programs(2) + part).to(tl.int64) * tl.num_programs(1) * M + m
    tl.store(sums + out[:, None] * D + d[None, :], of_values)
    tl.store(ones + out, of_ones)


@triton.jit
def _key_gradients(
    k, v, w, dc, dc_ones, dc_total, tops, valid, dk, dv,
    length, n_features, heads, stride_cell, stride, half_scale,
    EPS: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, T: tl.constexpr, HAS_PADDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start, row = tl.program_id(0) * T, tl.program_id(1)
    cell, head = (row // heads).to(tl.int64), row % heads
    t, d = start + tl.arange(0, T), tl.arange(0, D)
    offset = cell * stride_cell + head * D
    places, there = _tile(stride, length, valid + cell * length, t, d, HAS_PADDING)
    x = tl.load(k + offset + places, mask=there[:, None], other=0.0)
    values = tl.load(v + offset + places, mask=there[:, None], other=0.0)
    full, top = x.to(tl.float32), tl.load(tops + cell)
    half = tl.sum(full * full, 1) * half_scale
    dc, dc_ones = dc + row.to(tl.int64) * n_features * D, dc_ones + row * n_features
    of_keys, of_values, total = tl.zeros([T, D], tl.float32), tl.zeros([T, D], tl.float32), tl.zeros([T], tl.float32)
    for begin in range(0, n_features, M):
        m = begin + tl.arange(0, M)
        known = m < n_features
        weights = tl.load(w + m[:, None] * D + d[None, :], mask=known[:, None], other=0.0)
        projected, _ = _project(x, weights, m, n_features, 0.0, PRECISION)
        e = tl.where(there[:, None], tl.exp(projected - (half + top)[:, None]), 0.0)
        d_values = tl.load(dc + m[:, None] * D + d[None, :], mask=known[:, None], other=0.0)
        d_ones = tl.load(dc_ones + m, mask=known, other=0.0)
        of_values += tl.dot(e.to(x.dtype), d_values, input_precision=PRECISION)
        g = (tl.dot(values, tl.trans(d_values), input_precision=PRECISION) + d_ones[None, :]) * e
        of_keys += tl.dot(g.to(x.dtype), weights, input_precision=PRECISION)
        total += tl.sum(g, 1)
    of_keys -= total[:, None] * (2 * half_scale) * full
    of_values = tl.where(there[:, None], of_values + EPS * tl.load(dc_total + row * D + d)[None, :], 0.0)
    at = (cell * length * heads + head) * D + t[:, None].to(tl.int64) * heads * D + d[None, :]
    tl.store(dk + at, of_keys.to(x.dtype), mask=(t < length)[:, None])
    tl.store(dv + at, of_values.to(x.dtype), mask=(t < length)[:, None])


class Attention:
    """The kernels' view of a block of cells.

    Parameters
    ----------
    qkv : [b, l, 3·H·d] projections of queries, keys and values, of the precision of the products
    features : [m, d] random directions, float32
    valid : [b, l] bool, false for padding, or None
    """

    def __init__(self, qkv: Tensor, features: Tensor, valid: Tensor | None):
        self.n_features, self.dim = features.shape
        self.cells, self.length, width = qkv.shape
        self.heads = width // (3 * self.dim)
        self.rows, self.qkv = self.cells * self.heads, qkv.contiguous()
        self.q, self.k, self.v = self.qkv.split(width // 3, dim=2)
        self.weights = (self.dim**-0.25 * features).to(qkv.dtype).contiguous()
        self.valid = self.qkv if valid is None else valid.to(torch.uint8).contiguous()  # without padding it is not read
        self.place = (self.length, self.n_features, self.heads, self.length * width, width, self.dim**-0.5 / 2)
        exact = torch.get_float32_matmul_precision() == "highest"
        self.how = {
            "D": self.dim, "M": FEATURES, "T": TOKENS, "HAS_PADDING": valid is not None,
            "PRECISION": "ieee" if exact else "tf32",
        }  # fmt: skip
        self.n_blocks, self.n_stretches = -(-self.n_features // FEATURES), -(-self.length // STRETCH)
        self.by_token = (-(-self.length // TOKENS), self.rows)
        self.by_feature = (self.rows, self.n_blocks, self.n_stretches)

    def like_heads(self) -> Tensor:
        """[b, l, H·d]"""
        return self.qkv.new_empty(self.cells, self.length, self.heads * self.dim)

    def partial_sums(self) -> tuple[Tensor, Tensor]:
        """For each stretch of tokens, room for sums over values [rows, stretches, features, d] and over ones."""
        size = (self.rows, self.n_stretches, self.n_blocks * FEATURES)
        return self.qkv.new_empty(*size, self.dim, dtype=torch.float32), self.qkv.new_empty(*size, dtype=torch.float32)

    def joined(self, values: Tensor, ones: Tensor) -> Tensor:
        """Add up the stretches: [b, H, m, d + 1]."""
        joined = torch.cat([values.sum(1), ones.sum(1)[..., None]], -1)[:, : self.n_features]
        return joined.unflatten(0, (self.cells, self.heads))

    def parts(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[b, H, m, d + 1] as the kernels read it: over values, over ones, and the sums of both over the features."""
        values, ones = c[..., :-1], c[..., -1]
        whole = values.to(self.qkv.dtype), ones, values.sum(-2), ones.sum(-1)
        return tuple(part.contiguous() for part in whole)

    def total(self, values: Tensor, ones: Tensor) -> Tensor:
        """Sums over all tokens, of values [b, l, H·d] and ones [b, l, H]: [b, H, 1, d + 1] float32."""
        of_values = values.sum(1, dtype=torch.float32).unflatten(1, (self.heads, self.dim))
        return torch.cat([of_values, ones.sum(1, dtype=torch.float32)[..., None]], -1)[:, :, None]

    def key_sums(self) -> tuple[Tensor, Tensor]:
        """C [b, H, m, d + 1] with the ε in φ(K), and the largest projection of each cell's keys [b, 1, 1, 1]."""
        values, ones = self.partial_sums()
        tops = values.new_empty(self.rows, self.n_stretches, self.n_blocks)
        _key_sums[self.by_feature](
            self.k, self.v, self.weights, self.valid, values, ones, tops, *self.place, STRETCH, **self.how
        )
        top = tops.view(self.cells, -1).amax(1)
        factor = torch.exp(tops.view(self.cells, -1) - top.masked_fill(top.isinf(), 0.0)[:, None]).view_as(tops)
        factor = factor.repeat_interleave(FEATURES, 2)
        c = self.joined(values * factor[..., None], ones * factor)
        counted = self.valid if self.how["HAS_PADDING"] else self.v.new_ones(self.cells, self.length)
        total = self.total(self.v * counted[..., None], counted[..., None].expand(-1, -1, self.heads))
        return c.add_(total, alpha=FEATURE_EPS), top[:, None, None, None]

    def attend(self, c: Tensor) -> Tensor:
        """A [b, l, H·d]."""
        out = self.like_heads()
        _attend[self.by_token](
            self.q, self.weights, *self.parts(c), self.valid, out, *self.place, FEATURE_EPS, TINY, **self.how
        )
        return out

    def query_gradients(self, c: Tensor, d_attended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A and dQ [b, l, H·d], and dC [b, H, m, d + 1], from dA [b, l, H·d]."""
        attended, dq, du = self.like_heads(), self.like_heads(), self.like_heads()
        du_ones = self.qkv.new_empty(self.cells, self.length, self.heads, dtype=torch.float32)
        tops, parts = torch.empty_like(du_ones), self.parts(c)
        _query_gradients[self.by_token](
            self.q, self.weights, *parts, self.valid, d_attended.contiguous(), attended, dq, du, du_ones, tops,
            *self.place, FEATURE_EPS, TINY, **self.how,
        )  # fmt: skip
        values, ones = self.partial_sums()
        _query_sums[self.by_feature](
            self.q, self.weights, self.valid, du, du_ones, tops, values, ones, *self.place, STRETCH, **self.how
        )
        return attended, dq, self.joined(values, ones).add_(self.total(du, du_ones), alpha=FEATURE_EPS)

    def key_gradients(self, dc: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """dK and dV [b, l, H·d]."""
        dk, dv = self.like_heads(), self.like_heads()
        values, ones, total, _ = self.parts(dc)
        top = top.flatten().masked_fill(top.flatten().isinf(), 0.0).contiguous()
        _key_gradients[self.by_token](
            self.k,
            self.v,
            self.weights,
            values,
            ones,
            total,
            top,
            self.valid,
            dk,
            dv,
            *self.place,
            FEATURE_EPS,
            **self.how,
        )
        return dk, dv


class FusedFavor(torch.autograd.Function):
    """`models.favor.Favor` by these kernels."""

    @staticmethod
    def forward(ctx, x, to_q, to_k, to_v, to_out, bias, features, valid):
        weights, heads = torch.cat([to_q, to_k, to_v]), len(to_q) // features.shape[1]
        y, context, tops = x.new_empty(*x.shape[:2], len(to_out)), [], []
        for cells in blocks(x, heads, features)[0]:
            attention = Attention(x[cells] @ weights.mT, features, None if valid is None else valid[cells])
            c, top = attention.key_sums()
            y[cells] = F.linear(attention.attend(c), to_out, bias)
            context.append(c)
            tops.append(top)
        ctx.save_for_backward(x, weights, to_out, features, valid, torch.cat(context), torch.cat(tops))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        with torch.autocast(dy.device.type, enabled=False):
            return *_gradients(dy, *ctx.saved_tensors), None, None


def _gradients(dy, x, weights, to_out, features, valid, context, tops) -> tuple[Tensor, ...]:
    """Gradients of x and of the weights; `weights` [3·H·d, D] joins those of queries, keys and values."""
    dx, heads = torch.empty_like(x), to_out.shape[1] // features.shape[1]
    d_weights, d_out = (torch.zeros_like(weight, dtype=torch.float32) for weight in (weights, to_out))
    for cells in blocks(x, heads, features)[0]:
        part, d_part = x[cells], dy[cells]
        attention = Attention(part @ weights.mT, features, None if valid is None else valid[cells])
        attended, dq, dc = attention.query_gradients(context[cells], d_part @ to_out)
        d_qkv = torch.cat([dq, *attention.key_gradients(dc, tops[cells])], -1)
        add_weight_gradient(d_weights, d_qkv, part)
        add_weight_gradient(d_out, d_part, attended)
        dx[cells] = d_qkv @ weights
    gradients = (*d_weights.chunk(3), d_out, dy.sum((0, 1)))
    return dx, *(gradient.to(x.dtype) for gradient in gradients)
