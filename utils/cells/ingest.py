"""Find the counts in a file, and give them out in the columns that a model or an output file has.

`preprocess.py`, its `--check` and `predict_cell_type.py` all read new cells through this module. A file is read twice:
`ingest` looks at all values and sums them up, then `Ingested.blocks` yields the counts, a block of cells at a time, or
`Ingested.chosen` those of some cells.
"""

from collections.abc import Callable, Iterator
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
"""If the reference's genes hold a smaller share of a file's counts than this, the user is warned that the model sees
little of each cell. A model of a panel of a few hundred genes may still work. Below --min_count_coverage (by default
0.1) the run stops, because the genes are probably not those that these cells express."""


@dataclass
class Ingested:
    """One modality of a file: where its counts are, how they map to the output's columns, and their sums.

    Attributes
    ----------
    source : the modality in the file
    place : which of the source's matrices is read: X, raw or a layer
    values : what this matrix holds
    alignment : maps the file's columns to the output's
    totals : [cells] sum over the output's columns
    all_totals : [cells] sum over all the file's columns
    n_expressed : [cells] number of the file's features above zero
    column_sums : [n_in] sum of each of the file's columns over the cells
    config : user overrides
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
        """The modality's name, `rna` or `atac`."""
        return self.source.modality

    @property
    def barcodes(self) -> pd.Index:
        """[cells] barcodes of all cells, in the file's order."""
        return self.source.obs.index

    @property
    def genome(self) -> str | None:
        """Genome build of the peaks: the one given by --genome, else the only one that fits, else None."""
        fitting = self.alignment.genomes
        return self.config.genome or (fitting[0] if len(fitting) == 1 else None)

    @property
    def measured(self) -> np.ndarray:
        """[cells] bool, whether the cell has a count in the output's columns."""
        return self.totals > 0

    @property
    def count_coverage(self) -> float:
        """Share of the file's counts that lie in columns which the output keeps."""
        return float(self.column_sums[self.alignment.used].sum() / max(self.column_sums.sum(), 1e-30))

    @property
    def warnings(self) -> list[str]:
        """Reasons to doubt the result, a line each."""
        if self.modality == "rna" and self.alignment.by_reference and self.count_coverage < LOW_COUNT_COVERAGE:
            return [
                f"the reference's genes hold only {self.count_coverage:.1%} of the file's counts; the most expressed "
                f"genes are not among them{listed(self.alignment.most_expressed_unused(self.column_sums), 3)}"
            ]
        return []

    def blocks(self, keep: np.ndarray | None = None, progress: bool = False) -> Iterator[csr_matrix]:
        """Yield the counts in the output's columns, a block of cells at a time.

        Parameters
        ----------
        keep : [cells] bool, cells to yield, in the file's order; None for all
        progress : show a progress bar

        Yields
        ------
        [cells of the block, features] float32 CSR; where counts cannot be recovered, values proportional to them
        """
        matrix, _ = self.source.matrices[self.place]
        for start, block in _blocks_with_progress(matrix, f"{self.modality}: writing", progress):
            aligned = self._aligned(block)
            yield aligned if keep is None else aligned[keep[start : start + block.shape[0]]]

    def chosen(self, cells: np.ndarray) -> Iterator[csr_matrix]:
        """Yield the counts of chosen cells, in the order asked for; as `blocks` does otherwise.

        Parameters
        ----------
        cells : [n] numbers of cells of the file; in rising order they are read fastest
        """
        matrix, _ = self.source.matrices[self.place]
        chosen = matrix.take(cells)
        for start in range(0, max(len(cells), 1), chosen.block_rows):
            yield self._aligned(chosen.rows(start, start + chosen.block_rows))

    def _aligned(self, block: csr_matrix) -> csr_matrix:
        """Return a block of the file as counts in the output's columns, with sorted indices."""
        counts, _ = to_counts(block, self.values)
        # [cells, n_in] @ [n_in, n_out]: duplicates are summed, and unknown columns are dropped.
        aligned = (counts @ self.alignment.projection).tocsr()
        aligned.sort_indices()
        return aligned

    def report(self) -> list[str]:
        """Report what was found, changed and left out, a line each."""
        alignment, genes = self.alignment, self.alignment.genes
        features = FEATURES[self.modality]
        size = f"{len(self.barcodes):,} cells × {len(alignment.ids):,} {features}"
        lines = [f"{self.modality}: {size}; {self.values} in {self.place}"]
        if genes:
            lines.append(_gene_report(alignment))
        elif alignment.genomes:
            lines.append(f"  peaks fit the genome build {' or '.join(alignment.genomes)}")
        else:
            lines.append(f"  peaks fit none of the genome builds {', '.join(CHROM_SIZES)}")
        lines += [f"  {note}" for note in alignment.notes]
        if alignment.by_reference:
            how = f" {alignment.how}" if alignment.how else ""
            lines.append(
                f"  {alignment.n_found:,} of the {len(alignment.features):,} {features} of the reference are in the "
                f"file{how} ({alignment.coverage:.1%}) and hold {self.count_coverage:.1%} of its counts; "
                f"{(~alignment.used).sum():,} of its {features} are dropped"
            )
        lines += [f"  warning: {warning}" for warning in self.warnings]
        if not self.measured.all():
            lines.append(f"  {count((~self.measured).sum(), 'cell')} without a count in these {features}")
        return lines


def _gene_report(alignment: Alignment) -> str:
    """Report how the genes were named, in one line."""
    genes = alignment.genes
    species = f"{genes.species} species:" if genes.species in ("unknown", "other") else genes.species
    words = [f"{species} {genes.id_type}" + ("" if genes.column == "index" else f" in var['{genes.column}']")]
    words += [f"{genes.known.mean():.1%} known"] if genes.species in ("human", "mouse") else []
    words.append(f"{len(genes.updated):,} updated{listed([f'{old} → {new}' for old, new in genes.updated.items()], 3)}")
    if genes.repaired:
        words.append(f"dates repaired: {', '.join(f'{old} → {new}' for old, new in genes.repaired.items())}")
    if genes.ambiguous:
        meanings = [f"{gene}: {' or '.join(symbols)}" for gene, symbols in genes.ambiguous.items()]
        words.append(f"{len(meanings):,} ambiguous and unchanged{listed(meanings, 3)}")
    merged = [f"{symbol} from {' and '.join(ids)}" for symbol, ids in genes.merged.items()]
    words.append(f"{count(genes.n_duplicates, 'duplicate')} summed{listed(merged, 2)}")
    if genes.species == "unknown":
        words.append("no symbol is updated, because the species is unclear; name it with --species")
    return "  " + "; ".join(words)


def count(n: int, noun: str) -> str:
    """Write a number with its noun: `1 gene`, `2 genes`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def listed(items: list[str], n: int) -> str:
    """Write the first `n` items in parentheses after a space, ` (a, b, …)`; an empty string if there are none."""
    return f" ({', '.join(items[:n])}{', …' if len(items) > n else ''})" if items else ""


def not_copied(source: Source) -> list[str]:
    """Name the layers, embeddings and other entries of the input that preprocessing does not copy: one line or none."""
    return [f"  not copied to the output:{listed(source.others, 6)}"] if source.others else []


def ingest(
    source: Source,
    config: IngestConfig,
    reference: np.ndarray | None = None,
    progress: bool = False,
    in_turn: Callable = map,
) -> Ingested:
    """Find a modality's counts, match its features to the output's, and read all its cells once.

    Parameters
    ----------
    source : the modality in the file
    config : user overrides for what is otherwise inferred from the file
    reference : [n_out] names of the genes or peaks of a model or reference, or None for all the file's
    progress : show a progress bar
    in_turn : applies a function to each block, as `map` does; `Runtime.in_turn` shares the blocks among processes

    Returns
    -------
    The modality's place, alignment and sums; no counts are kept in memory

    Raises
    ------
    UserError
        If no matrix holds usable values, or too few of the reference's features are there.
    """
    place, values = source.choose(config.values)
    _, var = source.matrices[place]
    if source.modality == "rna":
        alignment = align_genes(var, config.species, reference, source.path)
    else:
        alignment = align_peaks(var, config.genome, reference, source.path)
    ingested = _sum_up(source, place, values, alignment, config, progress, in_turn)
    # `values` was detected in a sample. If another cell has no whole counts, all cells are read as shares instead.
    if values.exact and not ingested.values.exact:
        ingested = _sum_up(source, place, ingested.values, alignment, config, progress, in_turn)
    check_coverage(alignment, ingested.column_sums, config.min_gene_coverage, source.path)
    if ingested.warnings and ingested.count_coverage < config.min_count_coverage:
        raise UserError(
            f"{source.path}: has {alignment.coverage:.1%} of the reference's genes, but they hold only "
            f"{ingested.count_coverage:.1%} of its counts (--min_count_coverage is {config.min_count_coverage:g}); use "
            "a model that was trained on such cells, or lower --min_count_coverage; most expressed unmatched genes: "
            + ", ".join(alignment.most_expressed_unused(ingested.column_sums))
        )
    if not ingested.measured.any():
        raise UserError(
            f"{source.path}: no cell has a count in the {FEATURES[source.modality]} that are used; give a file of "
            "cells with counts in them"
        )
    return ingested


def _sum_up(
    source: Source,
    place: str,
    values: Values,
    alignment: Alignment,
    config: IngestConfig,
    progress: bool,
    in_turn: Callable,
) -> Ingested:
    """Read all cells once, check every value, and sum over cells and over features.

    Parameters
    ----------
    values : what the matrix is expected to hold; the result says `exact=False` if a cell has no whole counts

    Raises
    ------
    UserError
        If a value is invalid, or a matrix of whole counts has a fraction in a cell outside the sample.
    """
    matrix, _ = source.matrices[place]
    # [n_in] number of output columns that each input column goes to, so the output's totals need no projection here.
    weight = np.diff(alignment.projection.indptr).astype(np.float64)

    def sums_of(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, bool]:
        block = matrix.rows(start, min(start + matrix.block_rows, matrix.shape[0]))
        source.check_values(place, block, start)
        counts, whole = to_counts(block, values)
        is_exact = whole is None or bool(whole.all())
        if values.kind == "counts" and values.exact and not is_exact and config.values != "counts":
            row = int(np.flatnonzero(~whole)[0])
            value = next(v for v in block[row].data if v != np.floor(v))
            raise UserError(
                f"{source.path}: {place} of {source.modality} holds whole counts, except for {value:g} in cell "
                f"{source.obs.index[start + row]}; save the raw counts in layers['counts'], or use --values cpm for "
                "proportions of a cell's total, or --values counts for estimated counts"
            )
        per_cell = counts @ weight, np.asarray(counts.sum(1)).ravel(), np.diff(counts.indptr)
        return *per_cell, np.asarray(counts.sum(0)).ravel(), is_exact

    column_sums, per_cell, exact = np.zeros(matrix.shape[1]), [], True
    with progress_bar(matrix.shape[0], f"{source.modality}: reading", shown=progress, leave=False) as bar:
        for *found, columns, is_exact in in_turn(sums_of, range(0, matrix.shape[0], matrix.block_rows)):
            per_cell.append(found)
            column_sums += columns
            exact &= is_exact
            bar.update(len(found[0]))
    return Ingested(
        source,
        place,
        values if exact else replace(values, exact=False),
        alignment,
        *(np.concatenate(part) for part in zip(*per_cell, strict=True)),
        column_sums,
        config,
    )


def _blocks_with_progress(matrix, title: str, progress: bool) -> Iterator[tuple[int, csr_matrix]]:
    """Yield the first row and the rows of each block of a matrix, with a progress bar over its cells."""
    with progress_bar(matrix.shape[0], title, shown=progress, leave=False) as bar:
        for start, block in matrix.blocks():
            yield start, block
            bar.update(block.shape[0])
