"""Cell types from the cell embedding."""

from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape of the classifier; the defaults are the published values."""

    classifier_hidden: int = field(default=64, metadata={"help": "hidden width of the classifier"})
    classifier_dropout: float = field(default=0.1, metadata={"help": "dropout before and behind its hidden layer"})


class Classifier(nn.Module):
    """Cell embedding [B, latent_dim] → logits [B, n_classes]."""

    def __init__(self, config: ClassifierConfig, latent_dim: int, n_classes: int):
        super().__init__()
        self.config = config
        self.layers = nn.Sequential(
            nn.Dropout(config.classifier_dropout),
            nn.Linear(latent_dim, config.classifier_hidden),
            nn.ReLU(),
            nn.Dropout(config.classifier_dropout),
            nn.Linear(config.classifier_hidden, n_classes),
        )

    def forward(self, embedding: Tensor) -> Tensor:
        return self.layers(embedding)
