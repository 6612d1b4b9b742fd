"""Performer: attention whose cost grows linearly with the number of tokens (FAVOR+, Choromanski et al. 2021).

Softmax attention weighs a value by exp(q·k/√d). FAVOR+ writes that exponential as an expectation over random
directions W, exp(q·k/√d) = E[φ(q)·φ(k)], so the sum over keys is taken once, before any query asks for it:

    attention(q, K, V) = φ(q) (φ(K)ᵀ V) / (φ(q) Σ φ(K))
"""

import math

import torch
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
        gaussian = torch.randn(dim_head, dim_head, generator=generator)
        blocks.append(torch.linalg.qr(gaussian).Q.T[: n_features - start])
    lengths = torch.randn(n_features, dim_head, generator=generator).norm(dim=1, keepdim=True)
    return torch.cat(blocks) * lengths


def softmax_features(x: Tensor, features: Tensor, stabiliser_dims: tuple[int, ...], valid: Tensor | None) -> Tensor:
    """Positive random features of the softmax kernel, φ(x) in MODEL.md's notation.

    Parameters
    ----------
    x : [B, H, L, d] queries or keys
    features : [m, d]
    stabiliser_dims : axes whose largest projection is subtracted: (-1,) for queries; heads, tokens and features
        of one cell for keys, never the minibatch, so that a cell's result is the same in any company
    valid : [B, L] bool or None; tokens that are padding get φ = 0 and do not count for the maximum

    Returns
    -------
    [B, H, L, m] float32, positive at valid tokens
    """
    scale = x.shape[-1] ** -0.25
    projected = (x * scale) @ features.T  # [B, H, L, m]
    half_norm = x.square().sum(-1, keepdim=True) * (scale**2 / 2)
    padding = None if valid is None else ~valid[:, None, :, None]
    top = projected.detach()
    if padding is not None:
        top = top.masked_fill(padding, -torch.inf)
    top = top.amax(stabiliser_dims, keepdim=True)
    if padding is None:
        phi = torch.exp(projected - half_norm - top) + FEATURE_EPS
    else:
        top = top.masked_fill(top.isinf(), 0.0)  # where there is nothing but padding
        exponent = (projected - half_norm - top).masked_fill(padding, 0.0)
        phi = (torch.exp(exponent) + FEATURE_EPS).masked_fill(padding, 0.0)
    return phi * features.shape[0] ** -0.5


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
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731  [B, L, H·d] → [B, H, L, d]
        q, k, v = split(self.to_q(x)), split(self.to_k(x)), split(self.to_v(x))
        # Exponentials lose too much in bfloat16; the sums below are linear in L, so float32 costs little.
        with torch.autocast(x.device.type, enabled=False):
            phi_q = softmax_features(q.float(), self.features, (-1,), valid)
            phi_k = softmax_features(k.float(), self.features, (1, 2, 3), valid)
            keys_values = phi_k.transpose(-1, -2) @ v.float()  # [B, H, m, d]
            normaliser = phi_q @ phi_k.sum(2)[..., None]  # [B, H, L, 1]
            out = (phi_q @ keys_values) / normaliser.clamp(min=torch.finfo(torch.float32).tiny)
        return self.to_out(out.transpose(1, 2).flatten(2).to(v.dtype))


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
