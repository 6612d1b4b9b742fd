"""scMomer: an RNA tower and an ATAC tower, joined; a student for the missing one; a classifier on top.

RNA  ──► RNATower  ──► z_rna ──┐
                               ├─► Fusion ──► cell embedding ──► decoders, pair discriminator, classifier
ATAC ──► ATACTower ──► z_atac ─┘
                         ▲
RNA ──► Student ─────────┘   when ATAC is missing (and the mirror image when RNA is)
"""

import torch
from torch import Tensor, nn

from models.classifier import Classifier
from models.fusion import ATACTower, Fusion, PairDiscriminator, RNATower
from models.minibatch import Minibatch
from models.shapes import ScMomerConfig, other
from models.student import Student

ATAC_JOINT_OPEN_WEIGHT = 5.0  # of an open peak in the loss of the ATAC decoder


class ScMomer(nn.Module):
    """The composed model.

    Parameters
    ----------
    config : ScMomerConfig
    n_genes, n_peaks : sizes of the two vocabularies
    n_classes : number of cell types, 0 without a classifier
    """

    def __init__(self, config: ScMomerConfig, n_genes: int, n_peaks: int, n_classes: int = 0):
        super().__init__()
        self.config = config
        width = {"rna": n_genes, "atac": n_peaks}
        latent_dim = config.fusion.latent_dim
        self.towers = nn.ModuleDict()
        if "rna" in config.inputs or not config.classifier:
            self.towers["rna"] = RNATower(config.rna, n_genes, latent_dim)
        if "atac" in config.inputs or not config.classifier:
            self.towers["atac"] = ATACTower(config.atac, n_peaks, latent_dim)
        self.fusion = Fusion(latent_dim)
        if config.student:
            self.student = Student(config.student, width[other(config.missing)], latent_dim)
        if config.classifier:
            self.classifier = Classifier(config.classifier, latent_dim, n_classes)
        else:
            self.decoders = nn.ModuleDict({name: nn.Linear(latent_dim, size) for name, size in width.items()})
            self.pair_head = PairDiscriminator(latent_dim, config.fusion.pair_hidden)

    @torch.no_grad()
    def start_decoders_at_mean(self, mean_expression: Tensor, open_share: Tensor, blank: bool = False) -> None:
        """Let the decoders begin with what is true of all cells, so that training is about what differs between them.
        Parameters
        ----------
        mean_expression : [n_genes] mean log-normalised value of the training cells
        open_share : [n_peaks] share of the training cells in which a peak is open; its bias becomes the logit at which
            the weighted cross-entropy of a constant is least, log(w p / (1 - p))
        blank : whether their weights begin at zero; drawn at random, those of rare peaks stay as noise
        """
        share = open_share.clamp(1e-4, 1 - 1e-4)
        for decoder in self.decoders.values() if blank else ():
            decoder.weight.zero_()
        self.decoders["rna"].bias.copy_(mean_expression)
        self.decoders["atac"].bias.copy_((ATAC_JOINT_OPEN_WEIGHT * share / (1 - share)).log())

    def latents(self, batch: Minibatch) -> dict[str, Tensor]:
        """modality → [B, latent_dim], with the stand-in where `other_modality` says so."""
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
        """Cell embeddings [B, latent_dim] and cell type logits [B, n_classes]."""
        embedding = self.embed(batch)
        return embedding, self.classifier(embedding, batch.key)
