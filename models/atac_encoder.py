"""ATAC encoder: a transformer over patches, stretches of the genome with equally many peaks (after scCLIP)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.device import is_cpu
from models.masking import places
from models.minibatch import Ragged
from models.shapes import ATACEncoderConfig


class ViTBlock(nn.Module):
    """Pre-LayerNorm softmax attention and feed-forward, each with a residual connection."""

    def __init__(self, config: ATACEncoderConfig):
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.dim, eps=1e-12)
        self.to_qkv = nn.Linear(config.dim, 3 * inner)
        self.to_out = nn.Linear(inner, config.dim)
        self.feed_forward_norm = nn.LayerNorm(config.dim, eps=1e-12)
        hidden = config.dim * config.ff_mult
        self.feed_forward = nn.Sequential(nn.Linear(config.dim, hidden), nn.GELU(), nn.Linear(hidden, config.dim))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.attention_norm(x))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = x + self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        return x + self.feed_forward(self.feed_forward_norm(x))


class ATACEncoder(nn.Module):
    """Open peaks → states of the patches and a pooled vector.

    Parameters
    ----------
    config : ATACEncoderConfig
    n_peaks : number of peaks, in genome order; the last patch is padded with peaks that are never open
    """

    def __init__(self, config: ATACEncoderConfig, n_peaks: int):
        super().__init__()
        self.config = config
        self.n_peaks = n_peaks
        self.patch_size = -(-n_peaks // config.n_patches)
        # One row per peak: the embedding of a patch is the sum of the rows of its open peaks.
        n_rows = self.patch_size * (config.n_patches if config.patch_maps == "own" else 1)
        self.peak_rows = nn.Parameter(torch.empty(n_rows, config.dim).uniform_(-1, 1) * self.patch_size**-0.5)
        self.patch_bias = nn.Parameter(torch.zeros(config.dim))
        self.mask_token = nn.Parameter(torch.zeros(config.dim))
        self.cls_token = nn.Parameter(torch.randn(config.dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(config.n_patches + 1, config.dim) * 0.02)
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-12)
        self.pooler = nn.Linear(config.dim, config.dim)

    def embed_patches(self, atac: Ragged) -> Tensor:
        """[B, n_patches, dim]: the linear embedding of patches, computed from the open peaks alone."""
        # One bag per patch of each cell: the rows of its open peaks are summed.
        bag = atac.rows * self.config.n_patches + atac.indices // self.patch_size  # [nnz] increasing
        offsets = torch.searchsorted(bag, torch.arange(len(atac) * self.config.n_patches, device=bag.device))
        weights = atac.presence
        if weights is None and not is_cpu(bag):
            weights = atac.values  # 0 for peaks that are left out
        rows = atac.indices % len(self.peak_rows)
        sums = F.embedding_bag(rows, self.peak_rows, offsets, mode="sum", per_sample_weights=weights)
        return sums.unflatten(0, (len(atac), -1)) + self.patch_bias

    def forward(self, atac: Ragged, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode cells.

        Parameters
        ----------
        atac : open peaks of B cells
        hidden : [B, n_patches] bool or None, patches replaced by the mask token

        Returns
        -------
        states [B, 1 + n_patches, dim] (CLS first), pooled [B, dim] = tanh(linear(CLS))
        """
        x = self.embed_patches(atac)
        if hidden is not None:
            x = torch.where(hidden[..., None], self.mask_token, x)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1) + self.positions  # [B, 1 + N, D]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x, torch.tanh(self.pooler(x[:, 0]))


class PatchHead(nn.Module):
    """Final state of a patch → logits of its peaks."""

    def __init__(self, encoder: ATACEncoder):
        super().__init__()
        self.patch_size = encoder.patch_size
        self.to_peaks = nn.Linear(encoder.config.dim, encoder.patch_size)

    def masked_peaks(self, states: Tensor, atac: Ragged, hidden: Tensor, n_hidden: int) -> tuple[Tensor, Tensor]:
        """Logits and truth of the peaks in the hidden patches.

        Parameters
        ----------
        states : [B, n_patches, dim] without CLS
        atac : true open peaks
        hidden : [B, n_patches] bool, equally many in each cell
        n_hidden : how many

        Returns
        -------
        logits and is_open [B, n_hidden, patch_size], the second float32; the padding after the last peak counts as
        closed, as in the published loss
        """
        patch, _ = places(hidden, n_hidden)
        logits = self.to_peaks(states.gather(1, patch[..., None].expand(-1, -1, states.shape[-1])))
        slot = torch.where(hidden, hidden.cumsum(1) - 1, n_hidden)  # number of a hidden patch; one more for the others
        row, at = atac.rows, atac.indices // self.patch_size
        is_open = logits.new_zeros(len(hidden), n_hidden + 1, self.patch_size, dtype=torch.float32)
        is_open[row, slot[row, at], atac.indices % self.patch_size] = 1.0
        return logits, is_open[:, :-1]
