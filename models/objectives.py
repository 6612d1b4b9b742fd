"""One objective per stage: `loss [B], metrics = objective(batch)`.

A loss is a mean *within* a cell, so it does not depend on the other cells of the minibatch, and the loop may cut an
optimiser step into micro-batches and processes in any way. A metric is a pair (sum, count), which adds up over them.
Each objective owns exactly the parameters that its stage trains or reads.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.atac_encoder import ATACEncoder, PatchHead
from models.heads import Head
from models.masking import drop_features, mask_genes, mask_patches, most_hidden, places
from models.minibatch import Minibatch
from models.peak_loss import decoded_peak_bce
from models.rna_encoder import MASK_TOKEN, N_TOKENS, RNAEncoder
from models.scmomer import ATAC_JOINT_OPEN_WEIGHT, ScMomer
from models.shapes import MODALITIES, other

Metrics = dict[str, tuple[Tensor, Tensor]]

ATAC_STAGE_1_OPEN_WEIGHT = 20.0
FALSE_PAIR_SHARE = 0.5
FEATURE_REDRAW_STEPS = 1000
DROP_STREAMS = {"rna": 3, "atac": 4}  # streams of random numbers, see models/masking.py


def weighted(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of per-cell values [B]; repeats that pad the minibatch have weight 0."""
    return (values.detach().float() * weight).sum(), weight.sum()


def freeze(module: nn.Module) -> None:
    """Exclude all parameters of `module` from training."""
    module.requires_grad_(False)


def unfreeze_last_blocks(encoder: nn.Module, n_blocks: int) -> None:
    """Train only the final norm and the last blocks of an encoder; a negative number trains the whole encoder.

    The pooler is trained with the final norm: stage I gives it no gradient, so it would stay random. A gene embedding
    from a file stays frozen in any case.
    """
    encoder.requires_grad_(n_blocks < 0)
    encoder.norm.requires_grad_(True)
    if isinstance(encoder, ATACEncoder):
        encoder.pooler.requires_grad_(True)
        encoder.mask_token.requires_grad_(False)
    elif encoder.config.freeze_gene_embedding:
        encoder.gene_embedding.weight.requires_grad_(False)
    for block in encoder.blocks[max(len(encoder.blocks) - n_blocks, 0) :] if n_blocks > 0 else []:
        block.requires_grad_(True)


class Objective(nn.Module):
    """Base of all objectives: `loss [B], metrics = objective(batch)`.

    Attributes
    ----------
    embedding : [B, D] embedding of the last minibatch's cells, if the stage makes one; the loop watches its spread for
        a collapse
    loss_name : the loss in words, for the loss curve
    """

    embedding: Tensor | None = None
    loss_name = "loss"

    def before_step(self, step: int) -> None:
        """Called by the loop before optimiser step `step`, which counts from 0 over all epochs."""

    def parameter_groups(self) -> list[dict]:
        """Parameter groups for the optimiser; `scale` multiplies the learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "scale": 1.0}]

    def leave_out(self, batch: Minibatch, share: float) -> Minibatch:
        """While training, the cells without a random share of their expressed genes and open peaks."""
        if not (self.training and share):
            return batch
        parts = {name: batch[name] for name in MODALITIES if batch[name] is not None}
        return replace(
            batch, **{name: drop_features(batch.key, part, share, DROP_STREAMS[name]) for name, part in parts.items()}
        )


class MaskedRNA(Objective):
    """Stage I: predict the bins of hidden expressed genes by cross-entropy."""

    loss_name = "cross-entropy of masked bins (nats)"

    def __init__(self, encoder: RNAEncoder, seed: int, mask_ratio: float = 0.15):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.dim, N_TOKENS)
        self.seed = seed
        self.mask_ratio = mask_ratio

    def before_step(self, step: int) -> None:
        if step and step % FEATURE_REDRAW_STEPS == 0:
            self.encoder.redraw_features(seed=(self.seed * 1_000_003 + step) % 2**63)

    def forward(self, batch: Minibatch) -> tuple[Tensor, Metrics]:
        tokens = self.encoder.tokenize(batch.rna)
        expressed = (tokens.bins > 0) & (tokens.bins != MASK_TOKEN)  # [B, L]
        target, hidden = mask_genes(batch.key, tokens.genes, expressed, self.mask_ratio)
        states = self.encoder(tokens._replace(bins=tokens.bins.masked_fill(hidden, MASK_TOKEN)))
        at, is_target = places(target, most_hidden(target.shape[1], self.mask_ratio))  # [B, K]
        chosen = states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
        logits, truth = self.head(chosen).float(), tokens.bins.gather(1, at)
        ce = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none").view_as(truth)
        n_targets = is_target.sum(1).clamp(min=1)
        loss = ce.masked_fill(~is_target, 0.0).sum(1) / n_targets
        hits = ((logits.argmax(2) == truth) & is_target).sum(1) / n_targets
        return loss, {"accuracy": weighted(hits, batch.weight)}


class MaskedATAC(Objective):
    """Stage I: predict which peaks of hidden patches are open, by cross-entropy with open peaks weighted."""

    loss_name = "weighted cross-entropy of masked peaks (nats)"

    def __init__(self, encoder: ATACEncoder, mask_ratio: float = 0.15):
        super().__init__()
        self.encoder = encoder
        self.head = PatchHead(encoder)
        self.mask_ratio = mask_ratio
        freeze(encoder.pooler)  # this loss does not use it

    def forward(self, batch: Minibatch) -> tuple[Tensor, Metrics]:
        hidden = mask_patches(batch.key, self.encoder.config.n_patches, self.mask_ratio)  # [B, N]
        states, _ = self.encoder(batch.atac, hidden)
        n_hidden = most_hidden(hidden.shape[1], self.mask_ratio)
        logits, is_open = self.head.masked_peaks(states[:, 1:], batch.atac, hidden, n_hidden)  # [B, n_hidden, P]
        open_weight = logits.new_full((), ATAC_STAGE_1_OPEN_WEIGHT, dtype=torch.float32)
        bce = F.binary_cross_entropy_with_logits(logits.float(), is_open, pos_weight=open_weight, reduction="none")
        loss = bce.mean((1, 2))
        # The share of open probability mass that falls on open peaks: 1 is perfect, the share of open peaks is chance.
        probability = logits.detach().float().sigmoid()
        on_open, everywhere = (probability * is_open).sum((1, 2)), probability.sum((1, 2))
        return loss, {"expected_precision": ((on_open * batch.weight).sum(), (everywhere * batch.weight).sum())}


class JointPairs(Objective):
    """Stage II: reconstruct true pairs from their joint embedding, and separate true pairs from false ones.

    Parameters
    ----------
    model : ScMomer without a head
    trainable_blocks : how many of the encoders' last blocks are trained; negative for everything
    feature_dropout : share of a cell's expressed genes and open peaks hidden from the towers while training; the loss
        still reconstructs the whole cell
    alone_weight : weight of the same reconstruction from each modality's latent alone. At 0, as published, the tower
        with the richer measurements may do all the work, and the other latent may mean nothing
    pair_weight : weight of separating true pairs from false ones. At 1, as published, its gradients are many times
        larger than the reconstruction's, and with few cells they are mostly noise
    """

    def __init__(
        self,
        model: ScMomer,
        trainable_blocks: int = 2,
        feature_dropout: float = 0.0,
        alone_weight: float = 0.0,
        pair_weight: float = 1.0,
    ):
        super().__init__()
        self.feature_dropout, self.alone_weight, self.pair_weight = feature_dropout, alone_weight, pair_weight
        self.towers, self.fusion = model.towers, model.fusion
        self.decoders, self.pair_head = model.decoders, model.pair_head
        for tower in self.towers.values():
            unfreeze_last_blocks(tower.encoder, trainable_blocks)
        self.loss_name = f"reconstruction + {pair_weight:g} × pairs" + of_each_alone(alone_weight)

    def forward(self, batch: Minibatch) -> tuple[Tensor, Metrics]:
        shown = self.leave_out(batch, self.feature_dropout)
        latents = {name: tower(shown[name]) for name, tower in self.towers.items()}
        embedding = self.fusion(latents)
        self.embedding = embedding.detach()
        names = list(self.towers) if self.alone_weight else []
        embeddings = [embedding, *(self.fusion(alone(latents, name)) for name in names)]
        (rna_mse, *rna_alone), (atac_bce, *atac_alone) = reconstruction(self.decoders, embeddings, batch)
        pair_logits = self.pair_head(embedding).float()
        is_true = batch.true_pair.long()
        pair_ce = F.cross_entropy(pair_logits, is_true, reduction="none")
        # Only true pairs are reconstructed. Dividing by their expected share, not by their number in this
        # minibatch, gives each of them the same weight in every minibatch.
        loss = is_true * (rna_mse + atac_bce) / (1 - FALSE_PAIR_SHARE) + self.pair_weight * pair_ce
        pair_hits = (pair_logits.argmax(1) == is_true).float()
        metrics = {
            "rna_mse": weighted(rna_mse, batch.weight * is_true),
            "atac_bce": weighted(atac_bce, batch.weight * is_true),
            "pair_accuracy": weighted(pair_hits, batch.weight),
        }
        for name, rna_mse, atac_bce in zip(names, rna_alone, atac_alone, strict=True):
            loss = loss + self.alone_weight * is_true * (rna_mse + atac_bce) / (1 - FALSE_PAIR_SHARE)
            metrics[f"rna_mse_of_{name}"] = weighted(rna_mse, batch.weight * is_true)
        return loss, metrics


class Denoising(Objective):
    """Stage II where cells have one modality: reconstruct the cell from a part of its features.

    Parameters
    ----------
    model : ScMomer without a head, with one tower
    trainable_blocks, feature_dropout : as in `JointPairs`
    """

    loss_name = "reconstruction"

    def __init__(self, model: ScMomer, trainable_blocks: int = 2, feature_dropout: float = 0.0):
        super().__init__()
        self.feature_dropout = feature_dropout
        self.towers, self.fusion, self.decoders = model.towers, model.fusion, model.decoders
        ((self.name, tower),) = self.towers.items()
        unfreeze_last_blocks(tower.encoder, trainable_blocks)

    def forward(self, batch: Minibatch) -> tuple[Tensor, Metrics]:
        latent = self.towers[self.name](self.leave_out(batch, self.feature_dropout)[self.name])
        embedding = self.fusion({self.name: latent, other(self.name): torch.zeros_like(latent)})
        self.embedding = embedding.detach()
        loss = of_modality(self.decoders, self.name, embedding, batch)
        return loss, {"rna_mse" if self.name == "rna" else "atac_bce": weighted(loss, batch.weight)}


def of_modality(decoders: nn.ModuleDict, name: str, embedding: Tensor, batch: Minibatch) -> Tensor:
    """Reconstruction loss [..., B] of one modality: mean squared error of RNA, or cross-entropy of ATAC."""
    if name == "rna":
        return (decoders["rna"](embedding).float() - batch.rna.dense()).square().mean(-1)
    return decoded_peak_bce(decoders["atac"], embedding, batch.atac, ATAC_JOINT_OPEN_WEIGHT)


def alone(latents: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The latents [B, latent_dim], set to zero for all modalities but `name`."""
    return {key: latent if key == name else torch.zeros_like(latent) for key, latent in latents.items()}


def of_each_alone(weight: float) -> str:
    """The end of a loss's name where a single latent must reconstruct the cell."""
    return f"\n+ {weight:g} × reconstruction from one latent" if weight else ""


def reconstruction(decoders: nn.ModuleDict, embeddings: list[Tensor], batch: Minibatch) -> tuple[Tensor, Tensor]:
    """Mean squared error of RNA and cross-entropy of ATAC, [k, B] each, decoded from k embeddings [B, D] of the cells.

    All are decoded at once: with few cells, most of the time goes to reading and writing the decoders' weights.
    """
    stacked = torch.stack(embeddings)
    return of_modality(decoders, "rna", stacked, batch), of_modality(decoders, "atac", stacked, batch)


class Distillation(Objective):
    """Stage III: the student learns the teacher's latent; fusion and decoders adapt to the student's predictions.

    The towers are frozen, so the latent of the measured modality is a constant; it comes with the minibatch.

    Parameters
    ----------
    model : ScMomer with a student
    feature_dropout : share of the measured modality's features hidden from the student while training
    alone_weight : weight of reconstructing the cell from the student's latent alone, as in `JointPairs`
    teacher_weight : weight of the teacher's latent; at 0 there is no teacher, and the student is a denoiser
    missing_weight : weight of the missing modality in each reconstruction
    """

    def __init__(
        self,
        model: ScMomer,
        feature_dropout: float = 0.0,
        alone_weight: float = 0.0,
        teacher_weight: float = 1.0,
        missing_weight: float = 1.0,
    ):
        super().__init__()
        self.teacher_weight, self.missing_weight = teacher_weight, missing_weight
        self.missing, self.feature_dropout, self.alone_weight = model.config.missing, feature_dropout, alone_weight
        self.student, self.fusion, self.decoders = model.student, model.fusion, model.decoders
        self.loss_name = "latent + reconstruction" + of_each_alone(alone_weight)

    def forward(self, batch: Minibatch) -> tuple[Tensor, Metrics]:
        present = other(self.missing)
        stand_in = self.student(self.leave_out(batch, self.feature_dropout)[present], batch.key).float()
        self.embedding = stand_in.detach()
        teacher = batch.latent[self.missing]
        latent_mse = (stand_in - teacher).square().mean(1)
        latents = {present: batch.latent[present], self.missing: stand_in}
        rna_weight, atac_weight = (self.missing_weight if name == self.missing else 1.0 for name in MODALITIES)
        embeddings = [self.fusion(latents)]
        if self.alone_weight:
            embeddings.append(self.fusion(alone(latents, self.missing)))
        (rna_mse, *rna_alone), (atac_bce, *atac_alone) = reconstruction(self.decoders, embeddings, batch)
        loss = self.teacher_weight * latent_mse + rna_weight * rna_mse + atac_weight * atac_bce
        metrics = {
            "latent_mse": weighted(latent_mse, batch.weight),
            "latent_cosine": weighted(F.cosine_similarity(stand_in, teacher), batch.weight),
            "rna_mse": weighted(rna_mse, batch.weight),
            "atac_bce": weighted(atac_bce, batch.weight),
        }
        for rna_mse, atac_bce in zip(rna_alone, atac_alone, strict=True):
            loss = loss + self.alone_weight * (rna_weight * rna_mse + atac_weight * atac_bce)
            metrics["rna_mse_of_student"] = weighted(rna_mse, batch.weight)
        return loss, metrics


class FineTuning(Objective):
    """Fine-tuning: the loss of the model's head, from the modalities that the model reads.

    Parameters
    ----------
    model : ScMomer with a head
    trainable_blocks : number of last encoder blocks to train; negative for the whole encoder
    train_student : whether to train the student as well
    feature_dropout : share of a cell's expressed genes and open peaks that are left out at random while training
    pretrained_lr_scale : learning rate of all but the head, as a multiple of the head's
    """

    def __init__(
        self,
        model: ScMomer,
        trainable_blocks: int = 2,
        train_student: bool = False,
        feature_dropout: float = 0.0,
        pretrained_lr_scale: float = 1.0,
    ):
        super().__init__()
        self.model, self.feature_dropout, self.pretrained_lr_scale = model, feature_dropout, pretrained_lr_scale
        self.loss_name = model.head.loss_name
        for tower in model.towers.values():
            unfreeze_last_blocks(tower.encoder, trainable_blocks)
        if model.config.student:
            model.student.requires_grad_(train_student)

    def parameter_groups(self) -> list[dict]:
        new = {id(p) for p in self.model.head.parameters()}
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if id(p) in new], "scale": 1.0},
            {"params": [p for p in trained if id(p) not in new], "scale": self.pretrained_lr_scale},
        ]

    def forward(self, batch: Minibatch) -> tuple[Tensor, Metrics]:
        embedding, outputs = self.model(self.leave_out(batch, self.feature_dropout))
        self.embedding = embedding.detach()
        loss, metrics = self.model.head.loss(outputs.float(), batch.target)
        return loss, {name: weighted(values, batch.weight) for name, values in metrics.items()}


class OnEmbeddings(Objective):
    """The loss of a head on cell embeddings that were computed before: the model that made them does not change.

    Parameters
    ----------
    head : reads `latent["cell"]` [B, latent_dim] of a minibatch, and its condition
    """

    def __init__(self, head: Head):
        super().__init__()
        self.head, self.loss_name = head, head.loss_name

    def forward(self, batch: Minibatch) -> tuple[Tensor, Metrics]:
        outputs = self.head(batch.latent["cell"], batch.key, batch.condition)
        loss, metrics = self.head.loss(outputs.float(), batch.target)
        return loss, {name: weighted(values, batch.weight) for name, values in metrics.items()}
