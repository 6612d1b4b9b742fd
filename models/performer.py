"""Performer: attention whose cost grows linearly with the number of tokens (FAVOR+, Choromanski et al. 2021).

Softmax attention weighs a value by exp(q·k/√d). FAVOR+ writes that exponential as an expectation over random
directions W, exp(q·k/√d) = E[φ(q)·φ(k)], so one sum over the keys serves all queries:

    attention(q, K, V) = φ(q) (φ(K)ᵀ V) / (φ(q) Σ φ(K))                    (models/favor.py)
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.device import is_cpu, sizes_for
from models.favor import add_favor_attention, favor_attention


def n_features_for(dim_head: int) -> int:
    """Number of random features that approximates the softmax kernel well: int(d · ln d) (Choromanski et al. 2021)."""
    return int(dim_head * math.log(dim_head))


def orthogonal_features(n_features: int, dim_head: int, generator: torch.Generator | None = None) -> Tensor:
    """Random directions, orthogonal within blocks of `dim_head`, with the lengths of independent Gaussian vectors.

    Returns
    -------
    [n_features, dim_head] float32
    """
    blocks = []
    for start in range(0, n_features, dim_head):
        q, r = torch.linalg.qr(torch.randn(dim_head, dim_head, generator=generator))
        q = q * r.diagonal().sign()  # without this, LAPACK's signs favour some directions (Mezzadri 2007)
        blocks.append(q.T[: n_features - start])
    lengths = torch.randn(n_features, dim_head, generator=generator).norm(dim=1, keepdim=True)
    return torch.cat(blocks) * lengths


class FavorAttention(nn.Module):
    """Multi-head FAVOR+ self-attention over [B, L, dim]; q, k, v without bias, output with bias."""

    def __init__(self, dim: int, heads: int, dim_head: int, n_features: int | None = None):
        super().__init__()
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_v = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)
        self.register_buffer("features", orthogonal_features(n_features or n_features_for(dim_head), dim_head))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        return favor_attention(x, *self._weights, valid)

    def add_to(self, x: Tensor, norm: nn.Module, valid: Tensor | None = None) -> None:
        """Add the attention of norm(x) to x itself, without gradients."""
        add_favor_attention(x, norm, *self._weights, valid=valid)

    @property
    def _weights(self) -> tuple[Tensor, ...]:
        layers = self.to_q, self.to_k, self.to_v, self.to_out
        return *(layer.weight for layer in layers), self.to_out.bias, self.features


class PerformerBlock(nn.Module):
    """Pre-LayerNorm attention and feed-forward, each with a residual connection.

    Without gradients, a CPU changes the input itself: an atlas is labelled with one copy of a cell's states in memory.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, ff_mult: int = 4, n_features: int | None = None):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = FavorAttention(dim, heads, dim_head, n_features)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, dim * ff_mult), nn.GELU(), nn.Linear(dim * ff_mult, dim))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        # The feed-forward's hidden layer is a block's largest tensor: made in parts, or again for the gradient.
        sizes = sizes_for(x.device)
        if not torch.is_grad_enabled():
            if is_cpu(x):
                self.attention.add_to(x, self.attention_norm, valid)
            else:
                x = x + self.attention(self.attention_norm(x), valid)
            # Of about equal size: a last part of a few tokens would be multiplied by another route.
            for part in x.tensor_split(max(1, -(-x.shape[1] // sizes.feed_tokens)), dim=1):
                part += self._feed(part)
            return x
        x = x + self.attention(self.attention_norm(x), valid)
        if x.numel() > sizes.recompute_values:
            return x + checkpoint(self._feed, x, use_reentrant=False, preserve_rng_state=False)
        return x + self._feed(x)

    def _feed(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.feed_forward_norm(x))
