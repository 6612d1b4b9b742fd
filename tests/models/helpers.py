"""Small cells and models that the tests of `models/` share."""

from dataclasses import replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from models.atac_encoder import ATACEncoder, ATACEncoderConfig
from models.heads import CellTypeHead
from models.minibatch import Minibatch, Ragged
from models.objectives import FineTuning, MaskedATAC, MaskedRNA
from models.rna_encoder import RNAEncoder, RNAEncoderConfig
from models.scmomer import ScMomer, ScMomerConfig
from models.shapes import ClassifierConfig, FusionConfig
from models.student import StudentConfig

N_GENES, N_PEAKS, N_CLASSES, LATENT_DIM = 60, 97, 4, 12
LENGTHS = (60, 7, 0, 25, 1)  # expressed genes of the five cells below: all, few, none, some, one
ATAC = ATACEncoderConfig(n_patches=8, dim=16, depth=3, heads=2, dim_head=8, ff_mult=2)  # 8 · 13 = 97 + 7 of filling
FUSION = FusionConfig(latent_dim=LATENT_DIM, pair_hidden=6)
STUDENT = StudentConfig(student_hidden=10, student_dropout=0.0)
CLASSIFIER = ClassifierConfig(classifier_hidden=6, classifier_dropout=0.0)


def rna_config(tokens: str = "all") -> RNAEncoderConfig:
    return RNAEncoderConfig(dim=16, depth=3, heads=2, dim_head=8, ff_mult=2, tokens=tokens)


def ragged(dense: np.ndarray | Tensor) -> Ragged:
    """The non-zero entries of dense cells [B, width]."""
    csr = sparse.csr_matrix(np.asarray(dense, dtype=np.float32))
    as_int = lambda values: torch.from_numpy(values.astype(np.int64))
    return Ragged(as_int(csr.indices), torch.from_numpy(csr.data), as_int(csr.indptr), csr.shape[1])


def expression(lengths: tuple[int, ...] = LENGTHS, n_genes: int = N_GENES, seed: int = 0) -> np.ndarray:
    """Log values [B, n_genes] of cells with the given numbers of expressed genes, all with a bin above 0."""
    rng = np.random.default_rng(seed)
    cells = np.zeros((len(lengths), n_genes), dtype=np.float32)
    for cell, length in zip(cells, lengths, strict=True):
        cell[rng.choice(n_genes, length, replace=False)] = rng.uniform(1, 6.5, length)
    return cells


def accessibility(lengths: tuple[int, ...] = (30, 5, 11, 0, 97), n_peaks: int = N_PEAKS, seed: int = 1) -> np.ndarray:
    """Binary peaks [B, n_peaks] of cells with the given numbers of open peaks."""
    return (expression(lengths, n_peaks, seed) > 0).astype(np.float32)


def minibatch(rna: np.ndarray | None = None, atac: np.ndarray | None = None, cells: list[int] | None = None, **parts):
    """A minibatch of dense cells; what is not given is made up as a function of the cell's number.

    Parameters
    ----------
    rna, atac : dense cells; the five default ones when None
    cells : numbers of the cells to take, in this order; all when None
    parts : other parts of the minibatch, for all cells
    """
    rna = expression() if rna is None else rna
    atac = accessibility(n_peaks=N_PEAKS) if atac is None else atac
    row = torch.arange(len(rna)) if cells is None else torch.tensor(cells, dtype=torch.int64)
    latent = torch.Generator().manual_seed(5)
    made_up = {
        "key": torch.arange(len(rna)) * 7919 + 13,
        "weight": torch.ones(len(rna)),
        "target": {"cell_type": torch.arange(len(rna)) % N_CLASSES},
        "true_pair": torch.arange(len(rna)) % 2 == 0,
        "latent": {name: torch.randn(len(rna), LATENT_DIM, generator=latent) for name in ("rna", "atac")},
    }
    pick = lambda part: {name: values[row] for name, values in part.items()} if isinstance(part, dict) else part[row]
    return Minibatch(
        row=row,
        step_cells=len(row),
        rna=ragged(np.asarray(rna)[row.numpy()]),
        atac=ragged(np.asarray(atac)[row.numpy()]),
        **{name: pick(values) for name, values in (made_up | parts).items()},
    )


def jitter(module: nn.Module, seed: int = 0, scale: float = 0.1) -> nn.Module:
    """Move every parameter off its initial value, so that no zero bias or unit norm hides a mistake; no dropout."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def rna_encoder(tokens: str = "all", freeze_gene_embedding: bool = False) -> RNAEncoder:
    torch.manual_seed(3)
    return RNAEncoder(replace(rna_config(tokens), freeze_gene_embedding=freeze_gene_embedding), N_GENES)


def type_head(latent_dim: int) -> CellTypeHead:
    return CellTypeHead(CLASSIFIER, latent_dim, N_CLASSES)


def scmomer(tokens: str = "all", classes: bool = False, freeze_gene_embedding: bool = False, **options) -> ScMomer:
    """A small model; with `other_modality="student"` it has a student, with `classes` a head for cell types."""
    torch.manual_seed(4)
    config = ScMomerConfig(
        rna=replace(rna_config(tokens), freeze_gene_embedding=freeze_gene_embedding),
        atac=ATAC,
        fusion=FUSION,
        student=STUDENT if options.get("other_modality") == "student" else None,
        **options,
    )
    return jitter(ScMomer(config, N_GENES, N_PEAKS, type_head if classes else None))


def one_tower(name: str, tokens: str = "all") -> ScMomer:
    """A small model of stage II that knows one modality alone."""
    torch.manual_seed(5)
    config = ScMomerConfig(**{name: rna_config(tokens) if name == "rna" else ATAC}, fusion=FUSION)
    return jitter(ScMomer(config, N_GENES * (name == "rna"), N_PEAKS * (name == "atac")))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients by name."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def by_gene(states: Tensor, tokens) -> Tensor:
    """Token states [B, L, D] → [B, n_genes, D], zero for genes that are no token."""
    if tokens.valid is None:
        return states
    out = states.new_zeros(len(states), N_GENES, states.shape[-1])
    cell, place = tokens.valid.nonzero(as_tuple=True)
    out[cell, tokens.genes[cell, place]] = states[cell, place]
    return out


def masked_rna(tokens: str = "all", seed: int = 0) -> MaskedRNA:
    return jitter(MaskedRNA(rna_encoder(tokens), seed))


def masked_atac() -> MaskedATAC:
    torch.manual_seed(6)
    return jitter(MaskedATAC(ATACEncoder(ATAC, N_PEAKS)))


def celltypes(
    other_modality: str = "student",
    missing: str = "atac",
    trainable_blocks: int = 2,
    train_student: bool = False,
    tokens: str = "expressed",
    class_weight: Tensor | None = None,
) -> FineTuning:
    model = scmomer(tokens, classes=True, other_modality=other_modality, missing=missing)
    model.head.class_weight = class_weight
    return FineTuning(model, trainable_blocks, train_student)
