"""Heads: predictions from a cell embedding.

A head turns embeddings into outputs, outputs and targets into a loss, and outputs into named predictions. Its task
(`utils.train.tasks`) knows what the outputs mean to a user: class names, columns, scores.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.masking import KeyedDropout
from models.shapes import ClassifierConfig

LEAST_DEVIATION = 1e-4


class Head(nn.Module, ABC):
    """Cell embedding [B, latent_dim] → outputs [B, n_outputs], by one hidden layer. Subclasses add loss and decoding.

    Embeddings are standardised first, with the mean and deviation of the training cells before fine-tuning.
    Pretraining does not fix the spread of the embedding, and a head learns slowly where cells differ little. (MAE
    normalises before its linear probes for the same reason; He et al. 2022.)

    Attributes
    ----------
    loss_name : the loss in words, for the loss curve
    """

    loss_name = "loss"

    def __init__(self, latent_dim: int, n_outputs: int, hidden: int, dropout: float):
        super().__init__()
        self.register_buffer("mean", torch.zeros(latent_dim))
        self.register_buffer("deviation", torch.ones(latent_dim))
        self.layers = nn.Sequential(
            KeyedDropout(dropout, stream=6),
            nn.Linear(latent_dim, hidden),
            nn.ReLU(),
            KeyedDropout(dropout, stream=7),
            nn.Linear(hidden, n_outputs),
        )

    def standardise(self, embeddings: Tensor) -> None:
        """Take mean and standard deviation from embeddings [cells, latent_dim] of training cells."""
        self.mean.copy_(embeddings.mean(0))
        self.deviation.copy_(embeddings.std(0, correction=0).clamp(min=LEAST_DEVIATION))

    def forward(
        self, embedding: Tensor, key: Tensor | None = None, condition: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Outputs [B, n_outputs] of embeddings [B, latent_dim].

        Parameters
        ----------
        embedding : [B, latent_dim]
        key : [B] int64, seeds each cell's dropout in training
        condition : name → [B, …], as in `Minibatch.condition`; a head that depends on it overrides this method
        """
        x = (embedding - self.mean) / self.deviation
        for layer in self.layers:
            x = layer(x, key) if isinstance(layer, KeyedDropout) else layer(x)
        return x

    @abstractmethod
    def loss(self, outputs: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each cell [B] and metrics of each cell, name → [B].

        Parameters
        ----------
        outputs : [B, n_outputs] float32
        target : name → [B, …], as in `Minibatch.target`
        """

    @abstractmethod
    def decode(self, outputs: Tensor) -> dict[str, Tensor]:
        """Predictions, name → [B, …], of outputs [B, n_outputs]."""


class CellTypeHead(Head):
    """One logit per cell type; target `cell_type` [B] int64 is the class number.

    Attributes
    ----------
    class_weight : [n_classes] float32 factors on each class's loss while training, or None; not saved
    """

    loss_name = "cross-entropy of cell types (nats)"

    def __init__(self, config: ClassifierConfig, latent_dim: int, n_outputs: int):
        super().__init__(latent_dim, n_outputs, config.classifier_hidden, config.classifier_dropout)
        self.register_buffer("class_weight", None, persistent=False)

    def loss(self, outputs: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        label = target["cell_type"]
        loss = F.cross_entropy(outputs, label, weight=self.class_weight, reduction="none")
        return loss, {"accuracy": (outputs.argmax(1) == label).float()}

    def decode(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"logits": outputs}
