"""Flags that override what is inferred from a file; imported before the libraries that read files, which are slow."""

from dataclasses import dataclass
from typing import Literal

from utils.cli import flag
from utils.errors import UserError


@dataclass
class IngestConfig:
    """Overrides for what cannot be inferred from a file."""

    values: Literal["auto", "counts", "log1p", "log2", "cpm"] = flag(
        "what X holds, if detection is wrong; log1p is to an unknown base, log2 is log2(1 + x), as for bulk TPM", "auto"
    )
    species: Literal["auto", "human", "mouse", "other"] = flag(
        "species of the genes: human symbols are updated, those of mouse and other species are not", "auto"
    )
    genome: str | None = flag("genome build to check the peaks against: hg19, hg38, mm10 or mm39", None)
    min_gene_coverage: float = flag(
        "minimum share of the model's (or reference's) genes or peaks that the file must have", 0.3
    )
    min_count_coverage: float = flag("minimum share of the file's RNA counts that these genes must hold", 0.1)

    def __post_init__(self):
        for name in ("min_gene_coverage", "min_count_coverage"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)} must be between 0 and 1")
        if self.genome is not None:
            from utils.features.peaks import chrom_sizes  # imports pandas, which is slow

            chrom_sizes(self.genome)
