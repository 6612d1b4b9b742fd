"""RNA encoder: a Performer with one token per gene, embedded by gene and by expression bin (after scBERT)."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.device import sizes_for
from models.minibatch import Ragged
from models.performer import PerformerBlock, orthogonal_features
from models.shapes import RNAEncoderConfig

N_BINS = 6  # floor(log2(1 + normalised counts)), clipped to 0 … 5
MASK_TOKEN = 6  # also stands for padding
N_TOKENS = 7


class GeneTokens(NamedTuple):
    """bins [B, L] int64; genes [L] or [B, L] int64; valid [B, L] bool, or None when nothing is padding.

    presence [B, L] float32 as in `Ragged`, or None.
    """

    bins: Tensor
    genes: Tensor
    valid: Tensor | None
    presence: Tensor | None = None


class RNAEncoder(nn.Module):
    """Gene tokens → contextual gene states.

    Parameters
    ----------
    config : RNAEncoderConfig
    n_genes : number of genes in the vocabulary
    """

    def __init__(self, config: RNAEncoderConfig, n_genes: int):
        super().__init__()
        self.config = config
        self.n_genes = n_genes
        self.token_embedding = nn.Embedding(N_TOKENS, config.dim)
        self.gene_embedding = nn.Embedding(n_genes, config.dim)
        self.gene_embedding.weight.requires_grad_(not config.freeze_gene_embedding)
        self.blocks = nn.ModuleList(
            PerformerBlock(config.dim, config.heads, config.dim_head, config.ff_mult, config.n_features or None)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim)

    def tokenize(self, rna: Ragged) -> GeneTokens:
        """Tokens with the bins of the log-normalised values, for all genes or for the expressed ones only."""
        bins = (rna.values.round() if self.config.binning == "round" else rna.values.floor()).clamp(0, N_BINS - 1)
        binned = replace(rna, values=bins)
        if self.config.tokens == "all":
            all_bins = binned.dense().long()
            presence = None if rna.presence is None else 1 + replace(rna, values=rna.presence - 1).dense()
            return GeneTokens(all_bins, torch.arange(self.n_genes, device=bins.device), None, presence)
        expressed = binned.keep(bins > 0)
        genes, padded_bins, valid = expressed.padded()
        valid = valid & (padded_bins > 0)
        presence = None
        if rna.presence is not None:
            presence = replace(expressed, values=expressed.presence).padded()[1]
        return GeneTokens(padded_bins.long().masked_fill(~valid, MASK_TOKEN), genes, valid, presence)

    def forward(self, tokens: GeneTokens) -> Tensor:
        """[B, L, dim] final states of the tokens."""
        x = self.token_embedding(tokens.bins)  # [B, L, D]
        if torch.is_grad_enabled():
            x = x + self.gene_embedding(tokens.genes)
            for block in self.blocks:
                x = block(x, tokens.valid)
            return self.norm(x)
        # Without gradients, some tokens at a time: no second tensor is as large as x.
        n = min(sizes_for(x.device).feed_tokens, x.shape[1])
        for part, genes in zip(x.split(n, 1), tokens.genes.split(n, -1), strict=True):
            part += self.gene_embedding(genes)
        for block in self.blocks:
            x = block(x, tokens.valid)
        for part in x.split(n, 1):
            part.copy_(self.norm(part))
        return x

    @torch.no_grad()
    def redraw_features(self, seed: int) -> None:
        """Draw new random directions for every block, from `seed` alone."""
        generator = torch.Generator().manual_seed(seed)
        for block in self.blocks:
            features = block.attention.features
            features.copy_(orthogonal_features(*features.shape, generator))


class GenePooling(nn.Module):
    """Gene states → one number per gene (ReLU of an affine map) → linear map over genes, without bias as published.

    The numbers start around 1, so that the latent starts as the plain sum over the token genes. When they started
    around 0, they fell below 0 for all genes within the first epochs of stage II. ReLU has no gradient there: the tower
    then gave all cells the same latent and could not recover.
    """

    def __init__(self, dim: int, n_genes: int, latent_dim: int, bias: bool = False):
        super().__init__()
        self.scalar = nn.Linear(dim, 1)
        nn.init.ones_(self.scalar.bias)
        self.projection = nn.Linear(n_genes, latent_dim, bias=bias)

    def forward(self, states: Tensor, tokens: GeneTokens, absent: Tensor | None = None) -> Tensor:
        """states [B, L, dim] → [B, latent_dim]; genes that are no token contribute nothing.

        `absent` [1, L, dim] are the states of genes that are not expressed, where these are tokens, too.
        """
        scalars = self.scalar(states).squeeze(-1).relu()  # [B, L]
        if tokens.presence is not None:
            least = 0.0 if absent is None else self.scalar(absent).squeeze(-1).relu()
            scalars = least + tokens.presence * (scalars - least)
        if tokens.valid is not None:
            n_genes = self.projection.in_features
            genes = tokens.genes.masked_fill(~tokens.valid, n_genes)  # padding goes to a column that is cut off
            scalars = scalars.new_zeros(len(scalars), n_genes + 1).scatter(1, genes, scalars)[:, :n_genes]
        return self.projection(scalars)
