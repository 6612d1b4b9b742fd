"""Joining the two modalities: towers that end in comparable latents, their fusion, and the discriminator of pairs.

scBERT's classifier has one modality and nothing to join: its tower's latent is the cell embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.atac_encoder import ATACEncoder
from models.minibatch import Ragged
from models.rna_encoder import GenePooling, RNAEncoder
from models.shapes import ATACEncoderConfig, RNAEncoderConfig


class RNATower(nn.Module):
    """RNA of B cells → latents [B, latent_dim], L2-normalised, then LayerNormed."""

    def __init__(self, config: RNAEncoderConfig, n_genes: int, latent_dim: int):
        super().__init__()
        self.encoder = RNAEncoder(config, n_genes)
        self.pooling = GenePooling(config.dim, n_genes, latent_dim)
        self.norm = nn.LayerNorm(latent_dim)

    def forward(self, rna: Ragged) -> Tensor:
        tokens = self.encoder.tokenize(rna)
        if tokens.presence is None:
            pooled = self.pooling(self.encoder(tokens), tokens)
        else:
            # A gene's own number in the pooling is nearly all that its removal changes. Its effect on the states of
            # other genes is left out: a gradient through the encoder predicts removal less well, and needs memory.
            with torch.no_grad():
                states, absent = self.encoder(tokens), None
                if tokens.valid is None:
                    absent = self.encoder(tokens._replace(bins=torch.zeros_like(tokens.bins[:1])))
            pooled = self.pooling(states, tokens, absent)
        return self.norm(F.normalize(pooled.float(), dim=-1))


class ScBERTTower(nn.Module):
    """RNA of B cells → first hidden layer [B, latent_dim] of scBERT's classifier: linear over genes with bias, ReLU."""

    def __init__(self, config: RNAEncoderConfig, n_genes: int, latent_dim: int):
        super().__init__()
        self.encoder = RNAEncoder(config, n_genes)
        self.pooling = GenePooling(config.dim, n_genes, latent_dim, bias=True)

    def forward(self, rna: Ragged) -> Tensor:
        tokens = self.encoder.tokenize(rna)
        return self.pooling(self.encoder(tokens), tokens).relu()


class ATACTower(nn.Module):
    """ATAC of B cells → latents [B, latent_dim], L2-normalised, then LayerNormed."""

    def __init__(self, config: ATACEncoderConfig, n_peaks: int, latent_dim: int):
        super().__init__()
        self.encoder = ATACEncoder(config, n_peaks)
        self.projection = nn.Linear(config.dim, latent_dim, bias=False)
        self.norm = nn.LayerNorm(latent_dim)

    def forward(self, atac: Ragged) -> Tensor:
        _, pooled = self.encoder(atac)
        return self.norm(F.normalize(self.projection(pooled).float(), dim=-1))


class Fusion(nn.Module):
    """[z_atac; z_rna] → cell embedding, one linear layer."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.linear = nn.Linear(2 * latent_dim, latent_dim)

    def forward(self, latent: dict[str, Tensor]) -> Tensor:
        """latent: modality → [B, latent_dim]; returns [B, latent_dim]."""
        return self.linear(torch.cat([latent["atac"], latent["rna"]], dim=-1))


class OneModality(nn.Module):
    """The only latent, as the cell embedding: in the place of `Fusion` where a model knows one modality."""

    def forward(self, latent: dict[str, Tensor]) -> Tensor:
        """latent: modality → [B, latent_dim], one entry; returns [B, latent_dim]."""
        (embedding,) = latent.values()
        return embedding


class PairDiscriminator(nn.Module):
    """Cell embedding → logits of (false pair, true pair)."""

    def __init__(self, latent_dim: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def forward(self, embedding: Tensor) -> Tensor:
        return self.layers(embedding)
