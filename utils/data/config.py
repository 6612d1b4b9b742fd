"""How to understand a user's file; known before anything that reads files is imported."""

from dataclasses import dataclass
from typing import Literal

from utils.cli import flag
from utils.errors import UserError


@dataclass
class IntakeConfig:
    """How to understand a file, where it does not tell by itself."""

    values: Literal["auto", "counts", "log1p", "cpm"] = flag("what X holds, if it is not told right", "auto")
    species: Literal["auto", "human", "mouse"] = flag("whose genes: human symbols are updated, mouse's stay", "auto")
    genome: str | None = flag("build of the peaks: hg19, hg38, mm10 or mm39; they are checked against it", None)
    min_gene_coverage: float = flag("least share of the genes (or peaks) asked for that the file must have, 0 … 1", 0.3)

    def __post_init__(self):
        if not 0 <= self.min_gene_coverage <= 1:
            raise UserError(f"--min_gene_coverage {self.min_gene_coverage} is a share: give a number from 0 to 1")
        if self.genome is not None:
            from utils.data.peaks import chrom_sizes  # here, because pandas takes a while to import

            chrom_sizes(self.genome)
