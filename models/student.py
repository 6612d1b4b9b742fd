"""The student: predicts the teacher's latent of the missing modality from the measured one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.masking import KeyedDropout
from models.minibatch import Ragged
from models.shapes import StudentConfig


class RaggedLinear(nn.Module):
    """A linear layer on sparse cells: the weighted sum of the weight rows of the non-zero features, plus a bias."""

    def __init__(self, n_features: int, out_dim: int):
        super().__init__()
        bound = n_features**-0.5
        self.weight = nn.Parameter(torch.empty(n_features, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_dim).uniform_(-bound, bound))

    def forward(self, cells: Ragged) -> Tensor:
        values = cells.values if cells.presence is None else cells.values * cells.presence
        sums = F.embedding_bag(cells.indices, self.weight, cells.offsets[:-1], mode="sum", per_sample_weights=values)
        return sums + self.bias


class Student(nn.Module):
    """Measured modality of B cells → predicted latent [B, latent_dim] of the missing modality.

    RNA enters as continuous log-normalised values, ATAC as open peaks.
    """

    def __init__(self, config: StudentConfig, n_features: int, latent_dim: int):
        super().__init__()
        self.config = config
        self.embed = RaggedLinear(n_features, config.student_hidden)
        self.norm = nn.LayerNorm(config.student_hidden)
        self.dropout = KeyedDropout(config.student_dropout, stream=5)
        self.to_latent = nn.Linear(config.student_hidden, latent_dim)

    def forward(self, measured: Ragged, key: Tensor | None = None) -> Tensor:
        """Measured values of B cells → [B, latent_dim]; `key` [B] seeds each cell's dropout in training."""
        return self.to_latent(self.dropout(F.gelu(self.norm(self.embed(measured))), key))
