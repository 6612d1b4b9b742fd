"""Cell types from the cell embedding."""

import torch
from torch import Tensor, nn

from models.masking import KeyedDropout
from models.shapes import ClassifierConfig

LEAST_DEVIATION = 1e-4


class Classifier(nn.Module):
    """Cell embedding [B, latent_dim] → logits [B, n_classes].

    Embeddings are standardised first, by what the training cells were like before fine-tuning: pretraining asks for no
    spread in particular, and cells that differ little would be separated slowly (for the same reason MAE's linear
    probes begin with a normalisation; He et al. 2022).
    """

    def __init__(self, config: ClassifierConfig, latent_dim: int, n_classes: int):
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(latent_dim))
        self.register_buffer("deviation", torch.ones(latent_dim))
        self.layers = nn.Sequential(
            KeyedDropout(config.classifier_dropout, stream=6),
            nn.Linear(latent_dim, config.classifier_hidden),
            nn.ReLU(),
            KeyedDropout(config.classifier_dropout, stream=7),
            nn.Linear(config.classifier_hidden, n_classes),
        )

    def standardise(self, embeddings: Tensor) -> None:
        """Take mean and standard deviation from embeddings [cells, latent_dim] of training cells."""
        self.mean.copy_(embeddings.mean(0))
        self.deviation.copy_(embeddings.std(0, correction=0).clamp(min=LEAST_DEVIATION))

    def forward(self, embedding: Tensor, key: Tensor | None = None) -> Tensor:
        """Embeddings [B, latent_dim], and the cells' keys [B], which dropout needs while training → [B, n_classes]."""
        x = (embedding - self.mean) / self.deviation
        for layer in self.layers:
            x = layer(x, key) if isinstance(layer, KeyedDropout) else layer(x)
        return x
