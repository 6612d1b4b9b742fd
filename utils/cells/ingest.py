"""The one way in: what a file holds becomes counts in the columns that are wanted, and all of it is reported.

`preprocess.py`, its doctor and `predict_cell_type.py` all take their cells in here. A file is passed over twice: once
to see what it holds (`ingest`), once to hand out its counts, a block of cells at a time (`Ingested.blocks`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from models.shapes import FEATURES
from utils.cells.config import IngestConfig
from utils.errors import UserError
from utils.features.count_detection import Values, to_counts
from utils.features.match import Alignment, align_genes, align_peaks, check_coverage
from utils.features.peaks import CHROM_SIZES
from utils.files.source import Source
from utils.progress import progress_bar

LOW_COUNT_COVERAGE = 0.3
"""Share of a file's counts below which a user is warned that a model looks at little of each cell. A model of a panel
of some hundred genes may work there; below --min_count_coverage (by default a tenth) it is more likely that its genes
are others than those that these cells express."""


@dataclass
class Ingested:
    """One modality of a file, understood.

    Attributes
    ----------
    source : where it lies
    place, values : which of its matrices is read, and what that holds
    alignment : how its columns become the output's
    totals : [cells] sum of the output's columns
    all_totals : [cells] sum of all the file's columns
    n_expressed : [cells] features above zero
    column_sums : [n_in] total of each of the file's columns
    config : the user's word
    """

    source: Source
    place: str
    values: Values
    alignment: Alignment
    totals: np.ndarray
    all_totals: np.ndarray
    n_expressed: np.ndarray
    column_sums: np.ndarray
    config: IngestConfig

    @property
    def modality(self) -> str:
        """Rna or atac."""
        return self.source.modality

    @property
    def barcodes(self) -> pd.Index:
        """[cells] of the file, in its order."""
        return self.source.obs.index

    @property
    def genome(self) -> str | None:
        """Build of the peaks, if it was stated or only one fits."""
        fitting = self.alignment.genomes
        return self.config.genome or (fitting[0] if len(fitting) == 1 else None)

    @property
    def measured(self) -> np.ndarray:
        """[cells] bool, whether the cell has anything in the output's columns."""
        return self.totals > 0

    @property
    def count_coverage(self) -> float:
        """Share of the file's counts that the output keeps."""
        return float(self.column_sums[self.alignment.used].sum() / max(self.column_sums.sum(), 1e-30))

    @property
    def warnings(self) -> list[str]:
        """What makes the result doubtful, a line each."""
        if self.modality == "rna" and self.alignment.by_reference and self.count_coverage < LOW_COUNT_COVERAGE:
            return [
                f"the genes asked for hold only {self.count_coverage:.1%} of the file's counts; what its cells express "
                f"most is not looked at{listed(self.alignment.most_expressed_unused(self.column_sums), 3)}"
            ]
        return []

    def blocks(self, keep: np.ndarray | None = None, progress: bool = False) -> Iterator[csr_matrix]:
        """Counts (or values in proportion to them) in the output's columns, float32, a block of cells at a time.

        Parameters
        ----------
        keep : [cells] bool, cells to hand out, in the file's order; None for all
        progress : show a bar
        """
        matrix, _ = self.source.matrices[self.place]
        for start, block in _passing(matrix, f"{self.modality}: writing", progress):
            counts, _ = to_counts(block, self.values)
            aligned = (counts @ self.alignment.projection).tocsr()
            aligned.sort_indices()
            yield aligned if keep is None else aligned[keep[start : start + block.shape[0]]]

    def report(self) -> list[str]:
        """What was found, done and lost, a line each."""
        alignment, genes = self.alignment, self.alignment.genes
        what = FEATURES[self.modality]
        size = f"{len(self.barcodes):,} cells × {len(alignment.ids):,} {what}"
        lines = [f"{self.modality}: {size}; {self.values} in {self.place}"]
        if genes:
            lines.append(_gene_report(self))
        elif alignment.genomes:
            lines.append(f"  peaks fit the genome build {' or '.join(alignment.genomes)}")
        else:
            lines.append(f"  peaks fit none of the genome builds {', '.join(CHROM_SIZES)}")
        lines += [f"  {note}" for note in alignment.notes]
        if alignment.by_reference:
            how = f" {alignment.how}" if alignment.how else ""
            lines.append(
                f"  {alignment.n_found:,} of the {len(alignment.features):,} {what} asked for are in the file{how} "
                f"({alignment.coverage:.1%}) and hold {self.count_coverage:.1%} of its counts; "
                f"{(~alignment.used).sum():,} of its {what} are dropped"
            )
        lines += [f"  warning: {warning}" for warning in self.warnings]
        if not self.measured.all():
            lines.append(f"  {(~self.measured).sum():,} cells without a count in these {what}")
        return lines


def _gene_report(intake: Ingested) -> str:
    genes = intake.alignment.genes
    species = f"{genes.species} species:" if genes.species in ("unknown", "other") else genes.species
    words = [f"{species} {genes.id_type}" + ("" if genes.column == "index" else f" in var['{genes.column}']")]
    words += [f"{genes.known.mean():.1%} known"] if genes.species in ("human", "mouse") else []
    words.append(f"{len(genes.updated):,} updated{listed([f'{old} → {new}' for old, new in genes.updated.items()], 3)}")
    if genes.repaired:
        words.append(f"dates repaired: {', '.join(f'{old} → {new}' for old, new in genes.repaired.items())}")
    if genes.ambiguous:
        meanings = [f"{gene}: {' or '.join(symbols)}" for gene, symbols in genes.ambiguous.items()]
        words.append(f"{len(meanings):,} ambiguous and left{listed(meanings, 3)}")
    merged = [f"{symbol} from {' and '.join(ids)}" for symbol, ids in genes.merged.items()]
    words.append(f"{count(genes.n_duplicates, 'duplicate')} summed{listed(merged, 2)}")
    if genes.species == "unknown":
        words.append("the species is not clear, no symbol is updated: state it by --species")
    return "  " + "; ".join(words)


def count(n: int, what: str) -> str:
    """`1 gene`, `2 genes`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def listed(items: list[str], n: int) -> str:
    """` (a, b, …)`, or nothing for an empty list."""
    return f" ({', '.join(items[:n])}{', …' if len(items) > n else ''})" if items else ""


def not_carried(source: Source) -> list[str]:
    """What preprocessing leaves behind, in words."""
    return [f"  stay in the input only:{listed(source.others, 6)}"] if source.others else []


def ingest(
    source: Source, config: IngestConfig, reference: np.ndarray | None = None, progress: bool = False
) -> Ingested:
    """Find a modality's counts, name its features, and pass over all its cells once.

    Parameters
    ----------
    source : the modality
    config : the user's word, where the file is not to be believed
    reference : [n_out] names of the genes or peaks wanted, or None for all the file's
    progress : show a bar

    Raises
    ------
    UserError
        If there are no usable values, or too few of the features wanted; the message names the way out.
    """
    place, values = source.choose(config.values)
    _, var = source.matrices[place]
    if source.modality == "rna":
        alignment = align_genes(var, config.species, reference, source.path)
    else:
        alignment = align_peaks(var, config.genome, reference, source.path)
    intake = _survey(source, place, values, alignment, config, progress)
    if values.exact and not intake.values.exact:  # some cell further down has no whole counts
        intake = _survey(source, place, intake.values, alignment, config, progress)
    check_coverage(alignment, intake.column_sums, config.min_gene_coverage, source.path)
    if intake.warnings and intake.count_coverage < config.min_count_coverage:
        raise UserError(
            f"{source.path}: has {alignment.coverage:.1%} of the genes asked for, but they hold only "
            f"{intake.count_coverage:.1%} of its counts (--min_count_coverage is {config.min_count_coverage:g}); use a "
            "model that was trained on such cells, or lower --min_count_coverage; most expressed unmatched: "
            + ", ".join(alignment.most_expressed_unused(intake.column_sums))
        )
    if not intake.measured.any():
        raise UserError(f"{source.path}: no cell has a count in {source.modality}; there is nothing to learn or label")
    return intake


def _survey(
    source: Source, place: str, values: Values, alignment: Alignment, config: IngestConfig, progress: bool
) -> Ingested:
    """Pass over all cells, check every value, and sum."""
    matrix, _ = source.matrices[place]
    weight = np.diff(alignment.projection.indptr).astype(np.float64)
    sums = np.zeros(matrix.shape[1])
    totals, all_totals, n_expressed, exact = [], [], [], True
    for start, block in _passing(matrix, f"{source.modality}: reading", progress):
        source.check_values(place, block, start)
        counts, whole = to_counts(block, values)
        exact &= whole is None or bool(whole.all())
        if values.kind == "counts" and values.exact and not exact and config.values != "counts":
            row = int(np.flatnonzero(~whole)[0])
            value = next(v for v in block[row].data if v != np.floor(v))
            raise UserError(
                f"{source.path}: {place} of {source.modality} holds counts, but {value:g} in cell "
                f"{source.obs.index[start + row]} is none; save the raw counts in layers['counts'], use the values "
                "as shares of a cell by --values cpm, or take them as estimated counts by --values counts"
            )
        totals.append(counts @ weight)
        all_totals.append(np.asarray(counts.sum(1)).ravel())
        n_expressed.append(np.diff(counts.indptr))
        sums += np.asarray(counts.sum(0)).ravel()
    return Ingested(
        source,
        place,
        values if exact else replace(values, exact=False),
        alignment,
        *(np.concatenate(part) for part in (totals, all_totals, n_expressed)),
        sums,
        config,
    )


def _passing(matrix, what: str, progress: bool) -> Iterator[tuple[int, csr_matrix]]:
    """The blocks of a matrix, with a bar over its cells."""
    with progress_bar(matrix.shape[0], what, shown=progress, leave=False) as bar:
        for start, block in matrix.blocks():
            yield start, block
            bar.update(block.shape[0])
