"""The sizes of all parts. The dataclasses are here, not beside their modules, so that a script knows its flags
without importing torch. A field's help is its flag's help."""

from dataclasses import dataclass, field
from typing import Literal

MODALITIES = ("rna", "atac")
FEATURES = {"rna": "genes", "atac": "peaks"}
"""What the features of each modality are called, in messages and in the file names of a model folder."""
OtherModality = Literal["student", "zeros", "measured", "none"]


def other(modality: str) -> str:
    """The modality that is not `modality`."""
    return MODALITIES[1 - MODALITIES.index(modality)]


@dataclass(frozen=True)
class RNAEncoderConfig:
    """Shape of the RNA encoder; the defaults are the published values."""

    dim: int = field(default=200, metadata={"help": "width of a gene's token"})
    depth: int = field(default=6, metadata={"help": "number of Performer blocks"})
    heads: int = field(default=10, metadata={"help": "attention heads per block"})
    dim_head: int = field(default=64, metadata={"help": "width of one attention head"})
    n_features: int = field(
        default=0, metadata={"help": "random features of attention per head; 0 means int(d ln d) with d = --dim_head"}
    )
    ff_mult: int = field(default=4, metadata={"help": "feed-forward width as a multiple of --dim"})
    tokens: Literal["all", "expressed"] = field(
        default="all",
        metadata={
            "help": "which genes are tokens: all of them, or only those with a bin above 0 (5-15 %% of the work)"
        },
    )
    freeze_gene_embedding: bool = field(
        default=False, metadata={"help": "never train the gene embedding; set when --gene_embedding_path is given"}
    )
    binning: Literal["floor", "round"] = field(
        default="floor", metadata={"help": "how log values become bins; round only for published weights"}
    )


@dataclass(frozen=True)
class ATACEncoderConfig:
    """Shape of the ATAC encoder; the defaults are the published values."""

    n_patches: int = field(
        default=128, metadata={"help": "number of patches: stretches of the genome with equally many peaks"}
    )
    dim: int = field(default=512, metadata={"help": "width of a patch's token"})
    depth: int = field(default=6, metadata={"help": "number of transformer layers"})
    heads: int = field(default=8, metadata={"help": "attention heads per layer"})
    dim_head: int = field(default=64, metadata={"help": "width of one attention head"})
    ff_mult: int = field(default=4, metadata={"help": "feed-forward width as a multiple of --dim"})
    patch_maps: Literal["shared", "own"] = field(
        default="shared",
        metadata={
            "help": "one linear map for all patches, as published, or one for each: --n_patches times the weights, and "
            "better on few cells, where attention does not learn to distinguish patches"
        },
    )


@dataclass(frozen=True)
class FusionConfig:
    """Shape of everything behind the encoders; the defaults are the published values."""

    latent_dim: int = field(default=128, metadata={"help": "width of a modality's latent and of the cell embedding"})
    pair_hidden: int = field(default=64, metadata={"help": "hidden width of the true/false pair discriminator"})


@dataclass(frozen=True)
class StudentConfig:
    """Shape of the student; the defaults are the published values."""

    student_hidden: int = field(default=256, metadata={"help": "hidden width of the student"})
    student_dropout: float = field(default=0.1, metadata={"help": "dropout of the student's hidden layer"})


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape of the head for cell types; the defaults are the published values."""

    classifier_hidden: int = field(default=64, metadata={"help": "hidden width of the classifier"})
    classifier_dropout: float = field(default=0.1, metadata={"help": "dropout before and after its hidden layer"})


@dataclass(frozen=True)
class ScMomerConfig:
    """Shape of the whole model, without its head; what is None is not part of it.

    Attributes
    ----------
    missing : the modality that the student replaces
    other_modality : what is used for `missing`: the student's latent, zeros, the measured modality, or none: then the
        model is scBERT's classifier, which knows RNA alone
    """

    rna: RNAEncoderConfig | None = None
    atac: ATACEncoderConfig | None = None
    fusion: FusionConfig = FusionConfig()
    student: StudentConfig | None = None
    missing: Literal["atac", "rna"] = "atac"
    other_modality: OtherModality = "measured"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The modalities a cell must have been measured in."""
        return MODALITIES if self.other_modality == "measured" else (other(self.missing),)
