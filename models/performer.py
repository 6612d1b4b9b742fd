"""Performer: attention whose cost grows linearly with the number of tokens (FAVOR+, Choromanski et al. 2021).

Softmax attention weighs a value by exp(q·k/√d). FAVOR+ writes that exponential as an expectation over random
directions W, exp(q·k/√d) = E[φ(q)·φ(k)], so the sum over keys is taken once, before any query asks for it:

    attention(q, K, V) = φ(q) (φ(K)ᵀ V) / (φ(q) Σ φ(K))
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

FEATURE_EPS = 1e-4  # keeps every feature above zero, so that the normaliser never vanishes


def n_features_for(dim_head: int) -> int:
    """Number of random features that approximates the softmax kernel well: int(d · ln d) (Choromanski et al. 2021)."""
    return int(dim_head * math.log(dim_head))


def orthogonal_features(n_features: int, dim_head: int, generator: torch.Generator | None = None) -> Tensor:
    """Random directions in orthogonal blocks, with the lengths that independent Gaussian vectors would have.

    Returns
    -------
    [n_features, dim_head] float32
    """
    blocks = []
    for start in range(0, n_features, dim_head):
        q, r = torch.linalg.qr(torch.randn(dim_head, dim_head, generator=generator))
        q = q * r.diagonal().sign()  # else LAPACK's choice of signs favours some directions (Mezzadri 2007)
        blocks.append(q.T[: n_features - start])
    lengths = torch.randn(n_features, dim_head, generator=generator).norm(dim=1, keepdim=True)
    return torch.cat(blocks) * lengths


def softmax_features(x: Tensor, features: Tensor, per_cell: bool, valid: Tensor | None) -> Tensor:
    """Positive random features of the softmax kernel, φ(x) in MODEL.md's notation.

    The largest projection is subtracted in the exponent. It is a constant of the quotient that attention takes, so any
    choice is right but for rounding and for FEATURE_EPS.

    Parameters
    ----------
    x : [B, H, L, d] queries or keys
    features : [m, d]
    per_cell : subtract the maximum over heads, tokens and features of a cell (keys), or over features (queries). Never
        over the minibatch: a cell's result is the same in any company
    valid : [B, L] bool or None; padding does not count for the maximum, and its features are all FEATURE_EPS / √m

    Returns
    -------
    [B, H, L, m] float32, positive
    """
    scale = x.shape[-1] ** -0.25
    projected = F.linear(x * scale, features)  # [B, H, L, m]
    half_norm = x.square().sum(-1, keepdim=True) * (scale**2 / 2)  # [B, H, L, 1]
    top = projected.detach().amax(-1, keepdim=True)  # [B, H, L, 1]
    if valid is not None:
        padding = ~valid[:, None, :, None]
        top = top.masked_fill(padding, -torch.inf)
        half_norm = half_norm.masked_fill(padding, torch.inf)
    if per_cell:
        top = top.amax((1, 2), keepdim=True)
    top = top.masked_fill(top.isinf(), 0.0)  # where there is nothing but padding
    return (torch.exp(projected - (half_norm + top)) + FEATURE_EPS) * features.shape[0] ** -0.5


class FavorAttention(nn.Module):
    """Multi-head FAVOR+ self-attention over [B, L, dim]; q, k, v without bias, output with bias."""

    def __init__(self, dim: int, heads: int, dim_head: int, n_features: int | None = None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_v = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)
        self.register_buffer("features", orthogonal_features(n_features or n_features_for(dim_head), dim_head))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b l (h d) -> b h l d", h=self.heads) for project in (self.to_q, self.to_k, self.to_v)
        )
        # Exponentials lose too much in bfloat16; the sums below are linear in L, so float32 costs little.
        with torch.autocast(x.device.type, enabled=False):
            phi_q = softmax_features(q.float(), self.features, per_cell=False, valid=valid)
            phi_k = softmax_features(k.float(), self.features, per_cell=True, valid=valid)
            # A column of ones beside the values makes the normaliser φ(q) Σ φ(K) the last column of the result.
            values = torch.cat([v.float(), torch.ones_like(v[..., :1], dtype=torch.float32)], dim=-1)
            if valid is not None:
                values = values * valid[:, None, :, None]
            out = phi_q @ (phi_k.transpose(-1, -2) @ values)  # [B, H, L, m] · [B, H, m, d + 1]
            out = out[..., :-1] / out[..., -1:].clamp(min=torch.finfo(torch.float32).tiny)
        return self.to_out(rearrange(out.to(v.dtype), "b h l d -> b l (h d)"))


class PerformerBlock(nn.Module):
    """Pre-LayerNorm attention and feed-forward, each added to the stream."""

    def __init__(self, dim: int, heads: int, dim_head: int, ff_mult: int = 4, n_features: int | None = None):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = FavorAttention(dim, heads, dim_head, n_features)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, dim * ff_mult), nn.GELU(), nn.Linear(dim * ff_mult, dim))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), valid)
        return x + self.feed_forward(self.feed_forward_norm(x))
