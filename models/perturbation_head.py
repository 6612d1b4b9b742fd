"""The change of expression that perturbed genes cause, from a control cell's embedding and the genes' vectors."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.heads import Head

NO_GENE = -1
"""Pads the perturbed genes of a cell to the largest number in the file."""
COMMON_PENALTY = 1e-3
"""Penalty on the common effect at the start: hardly any."""


@dataclass(frozen=True)
class PerturbationConfig:
    """Shape of the head.

    Attributes
    ----------
    genes : the perturbed genes that have an id, separated by commas; a condition holds their numbers in this list
    vector_dim : width of a perturbed gene's vector; 0 without vectors
    rank : number of profiles of change whose weighted sums the head can predict
    hidden : hidden width of the dependence on the control cell
    """

    genes: str = ""
    vector_dim: int = 0
    rank: int = 10
    hidden: int = 8


class PerturbationHead(Head):
    """Control cell's embedding and perturbed genes → change of expression [B, n_genes].

    Each perturbed gene has an effect: a common one, a linear map of its vector, and its own, which stays zero for a
    gene that training never saw. The effects are summed. Two genes together may do more or less than the sum, by a
    factor for each profile, and so may each control cell. Both factors are 1 at the start.

    Target `change` [B, n_genes] float32: a perturbed cell's values minus the mean of the control cells of its line.
    """

    loss_name = "squared error of the change (log2 units)"

    def __init__(self, config: PerturbationConfig, latent_dim: int, n_outputs: int):
        super().__init__(latent_dim, config.rank, config.hidden, dropout=0.0)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)
        n_perturbed = len(config.genes.split(","))
        self.register_buffer("vectors", torch.zeros(n_perturbed, config.vector_dim))
        self.common = nn.Parameter(torch.zeros(config.rank))
        self.own = nn.Parameter(torch.zeros(n_perturbed, config.rank))
        self.map = nn.Parameter(torch.zeros(config.vector_dim, config.rank))
        self.together = nn.Parameter(torch.zeros(config.rank))
        self.profiles = nn.Parameter(torch.zeros(config.rank, n_outputs))

    def forward(
        self, embedding: Tensor, key: Tensor | None = None, condition: dict[str, Tensor] | None = None
    ) -> Tensor:
        genes = condition["genes"]  # [B, K], padded
        there = (genes != NO_GENE)[..., None].to(embedding.dtype)
        rows = genes.clamp(min=0)
        effect = self.common + self.own[rows] + (self.vectors @ self.map)[rows]  # [B, K, rank]
        several = (there.sum(1) > 1).to(embedding.dtype)  # [B, 1]
        weight = (effect * there).sum(1) * (1 + several * self.together)
        return (weight * (1 + super().forward(embedding, key))) @ self.profiles

    def loss(self, outputs: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return (outputs - target["change"]).square().mean(1), {}

    def decode(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"change": outputs}

    @torch.no_grad()
    def start(
        self, genes: Tensor, change: Tensor, own_penalty: float, map_penalty: float, evenness: float = 0.0
    ) -> "PerturbationHead":
        """Take the effects from the mean changes of training conditions, by ridge regression of reduced rank.

        Training then starts near the common effect with large penalties, and near the measured sums with small ones.

        Parameters
        ----------
        genes : [conditions, K] int64, padded
        change : [conditions, n_genes] mean change
        own_penalty, map_penalty : penalties on a gene's own effect and on the map of vectors
        evenness : 0 weighs squared errors alike, so that conditions with large changes decide; 1 divides them by the
            size of the condition's change, 2 by its square
        """
        n, width = len(self.own), self.vectors.shape[1]
        counts = torch.zeros(len(genes), n + 1, dtype=torch.float64)
        counts.scatter_add_(1, torch.where(genes == NO_GENE, n, genes), torch.ones(genes.shape, dtype=torch.float64))
        counts = counts[:, :n]  # [conditions, perturbed genes], without the padding
        x = torch.cat([counts.sum(1, keepdim=True), counts @ self.vectors.double(), counts], 1)
        change = change.double()
        size = change.norm(dim=1, keepdim=True).clamp(min=1e-6)
        weight = (size.mean() / size) ** (evenness / 2)
        x, change = x * weight, change * weight
        penalty = [COMMON_PENALTY] + [map_penalty] * width + [own_penalty] * n
        scaled = x / torch.tensor(penalty, dtype=torch.float64)
        # The dual form has as many equations as there are conditions.
        dual = torch.linalg.solve(scaled @ x.T + torch.eye(len(x), dtype=torch.float64), change)
        directions = torch.linalg.svd(x @ (scaled.T @ dual), full_matrices=False)[2][: len(self.profiles)]
        weights = (scaled.T @ dual) @ directions.T  # [1 + width + n, at most rank]
        found = len(directions)
        self.profiles[:found].copy_(directions)
        self.common[:found].copy_(weights[0])
        self.map[:, :found].copy_(weights[1 : 1 + width])
        self.own[:, :found].copy_(weights[1 + width :])
        return self
