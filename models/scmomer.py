"""scMomer: an RNA tower and an ATAC tower, joined; a student for the missing one; a head on top.

RNA  ──► RNATower  ──► z_rna ──┐
                               ├─► Fusion ──► cell embedding ──► decoders, pair discriminator, or a head
ATAC ──► ATACTower ──► z_atac ─┘
                         ▲
RNA ──► Student ─────────┘   when ATAC is missing (and the mirror image when RNA is)
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.fusion import ATACTower, Fusion, OneModality, PairDiscriminator, RNATower, ScBERTTower
from models.heads import Head
from models.minibatch import Minibatch
from models.shapes import MODALITIES, ScMomerConfig, other
from models.student import Student

ATAC_JOINT_OPEN_WEIGHT = 5.0  # weight of an open peak in the loss of the ATAC decoder


class ScMomer(nn.Module):
    """The composed model.

    With a head the model keeps only what leads from the cell to the head: the towers of the modalities it reads, no
    decoders, no pair discriminator. Without a head it has a tower and a decoder for each encoder of the configuration.

    Parameters
    ----------
    config : ScMomerConfig
    n_genes, n_peaks : sizes of the two vocabularies
    make_head : latent_dim → head, or None for a model that reconstructs
    """

    def __init__(
        self, config: ScMomerConfig, n_genes: int, n_peaks: int, make_head: Callable[[int], Head] | None = None
    ):
        super().__init__()
        self.config = config
        width = {"rna": n_genes, "atac": n_peaks}
        latent_dim = config.fusion.latent_dim
        self.towers = nn.ModuleDict()
        names = config.inputs if make_head else [name for name in MODALITIES if getattr(config, name)]
        if "rna" in names:
            rna_tower = ScBERTTower if config.other_modality == "none" else RNATower
            self.towers["rna"] = rna_tower(config.rna, n_genes, latent_dim)
        if "atac" in names:
            self.towers["atac"] = ATACTower(config.atac, n_peaks, latent_dim)
        self.fusion = OneModality() if config.other_modality == "none" else Fusion(latent_dim)
        if config.student:
            self.student = Student(config.student, width[other(config.missing)], latent_dim)
        if make_head:
            self.head = make_head(latent_dim)  # last: a head's size does not change the initial weights of the others
        else:
            self.decoders = nn.ModuleDict({name: nn.Linear(latent_dim, width[name]) for name in names})
            if len(names) > 1:
                self.pair_head = PairDiscriminator(latent_dim, config.fusion.pair_hidden)

    @torch.no_grad()
    def start_decoders_at_mean(self, means: dict[str, Tensor], blank: bool = False) -> None:
        """Set the decoders' biases to the training cells' means, so that training is about what differs between cells.

        Parameters
        ----------
        means : rna → [n_genes] mean log-normalised value of the training cells; atac → [n_peaks] share p of the
            training cells in which a peak is open. The latter's bias becomes log(w p / (1 - p)), the constant logit
            with the least weighted cross-entropy
        blank : start the weights at zero; rare peaks give so little gradient that random weights would stay as noise
        """
        for name, decoder in self.decoders.items():
            if blank:
                decoder.weight.zero_()
            share = means[name].clamp(1e-4, 1 - 1e-4)
            odds = ATAC_JOINT_OPEN_WEIGHT * share / (1 - share)
            decoder.bias.copy_(means[name] if name == "rna" else odds.log())

    def latents(self, batch: Minibatch) -> dict[str, Tensor]:
        """modality → [B, latent_dim]; that of the missing modality is what `other_modality` says: absent for none."""
        latent = {modality: self.towers[modality](batch[modality]) for modality in self.config.inputs}
        if self.config.other_modality == "student":
            latent[self.config.missing] = self.student(batch[other(self.config.missing)], batch.key)
        elif self.config.other_modality == "zeros":
            latent[self.config.missing] = torch.zeros_like(latent[other(self.config.missing)])
        return latent

    def embed(self, batch: Minibatch) -> Tensor:
        """[B, latent_dim] cell embeddings."""
        return self.fusion(self.latents(batch))

    def forward(self, batch: Minibatch) -> tuple[Tensor, Tensor]:
        """Cell embeddings [B, latent_dim] and the head's outputs [B, n_outputs]."""
        embedding = self.embed(batch)
        return embedding, self.head(embedding, batch.key, batch.condition)
