"""Match the columns of a file to the genes or peaks that a model reads, and measure how much of each is found.

Columns with the same gene symbol are summed; so are the columns that overlap a peak of the model. Both are a product
with a sparse matrix of 0 and 1, the projection, so a file of any size is matched one block of cells at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from utils.errors import UserError
from utils.features.gene_ids import GeneNames, name_genes, translate
from utils.features.gene_symbols import share_gene_like
from utils.features.peaks import format_peaks, genome_order, parse_peaks, place_peaks

LEAST_GENE_LIKE = 0.01
"""Least share of gene-like ids in a file that names genes. Of made-up names like f3 or G12, up to 0.9 % are aliases of
some gene. Of the genes of other vertebrates, tens of percent share their symbols with human or mouse."""


@dataclass
class Alignment:
    """How the columns of a file become those of the output.

    Attributes
    ----------
    features : [n_out] names of the output's genes or peaks, in order
    projection : [n_in, n_out] float32 of 0 and 1; counts [cells, n_in] @ projection are the output's counts
    ids : [n_in] the file's names, for messages
    n_found : number of the output's features that the file has
    by_reference : whether the output's features were given (by a model or a list), not taken from the file
    genes : how the genes were named, or None for peaks
    genomes : genome assemblies that the peaks fit
    notes : for peaks, a line on each kind of peak that lies outside the genome or its chromosomes
    how : for peaks, `by name` or `by overlap`
    """

    features: np.ndarray
    projection: csr_matrix
    ids: np.ndarray
    n_found: int
    by_reference: bool
    genes: GeneNames | None = None
    genomes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    how: str = ""

    @property
    def coverage(self) -> float:
        """Share of the output's features that the file has."""
        return self.n_found / max(len(self.features), 1)

    @property
    def used(self) -> np.ndarray:
        """[n_in] bool, columns that belong to any of the output's features."""
        return np.diff(self.projection.indptr) > 0

    def most_expressed_unused(self, sums: np.ndarray, n: int = 10) -> list[str]:
        """Return the file's names of the columns that are not used.

        Parameters
        ----------
        sums : [n_in] total of each column; the largest come first
        n : number of names
        """
        lost = np.flatnonzero(~self.used)
        return list(self.ids[lost[np.argsort(-sums[lost], kind="stable")[:n]]])


def align_genes(var: pd.DataFrame, species: str, reference: Sequence[str] | None, path: str | Path) -> Alignment:
    """Match genes by their current symbols.

    Parameters
    ----------
    var : annotation of the file's genes
    species : human, mouse, other, or auto to infer it
    reference : symbols of the output, or None for all genes of the file in alphabetical order
    path : the file, for messages

    Raises
    ------
    UserError
        If the genes are only numbered, every symbol occurs twice or more, or the ids are not those of genes.
    """
    genes = name_genes(var, species, reference)
    symbols = genes.symbols
    if genes.id_type == "row numbers":
        raise UserError(
            f"{path}: names its genes by numbers ({', '.join(symbols[:3])} …) that are not Entrez ids; put symbols or "
            "Ensembl ids into var_names"
        )
    if len(symbols) > 1 and pd.Series(symbols).duplicated(keep=False).all():
        raise UserError(
            f"{path}: every one of its {len(symbols):,} genes shares its symbol with another ({', '.join(symbols[:3])} "
            "…), as if tables had been joined side by side; keep one of them"
        )
    is_unchecked = (species, genes.species, reference) == ("auto", "unknown", None)
    if is_unchecked and share_gene_like(genes.ids) < LEAST_GENE_LIKE:
        raise UserError(
            f"{path}: fewer than 1% of its {len(symbols):,} ids are genes of a known species "
            f"({', '.join(genes.ids[:3])} …); put gene symbols or Ensembl ids into var_names, or give "
            "--species other if they are genes of another species"
        )
    features = np.unique(symbols) if reference is None else np.asarray(reference, dtype=str)
    position = pd.Index(features).get_indexer(pd.Index(symbols))
    projection = _projection(np.flatnonzero(position >= 0), position[position >= 0], len(symbols), len(features))
    found = len(np.unique(position[position >= 0]))
    return Alignment(features, projection, np.asarray(var.index), found, reference is not None, genes)


def align_peaks(var: pd.DataFrame, genome: str | None, reference: Sequence[str] | None, path: str | Path) -> Alignment:
    """Match peaks by name if one set is part of the other, or else by overlap.

    Parameters
    ----------
    var : annotation of the file's peaks
    genome : name of the assembly, or None to infer it
    reference : names of the output's peaks, or None for all peaks of the file in genome order
    path : the file, for messages

    Raises
    ------
    UserError
        If peaks cannot be read as intervals, or too many lie outside the genome.
    """
    try:
        intervals = parse_peaks(var.index, var)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    placed = place_peaks(intervals, genome, path)
    kept, intervals = np.flatnonzero(placed.kept), placed.intervals[placed.kept].reset_index(drop=True)
    names, ids = format_peaks(intervals), np.asarray(var.index)
    found = {"genomes": placed.genomes, "notes": placed.notes}
    if reference is None:
        features, first, column = np.unique(names, return_index=True, return_inverse=True)
        order = genome_order(intervals.iloc[first])
        position = np.empty(len(order), dtype=np.int64)  # the inverse of `order`: name → its column in the output
        position[order] = np.arange(len(order))
        projection = _projection(kept, position[column], len(ids), len(features))
        return Alignment(features[order], projection, ids, len(features), False, **found)
    features = np.asarray(reference, dtype=str)
    position = pd.Index(features).get_indexer(pd.Index(names))
    n_named = len(np.unique(position[position >= 0]))
    if n_named in (len(features), len(set(names))):  # the file has all peaks of the model, or no others
        rows, columns, how = np.flatnonzero(position >= 0), position[position >= 0], "by name"
    else:
        rows, columns = _overlap(intervals, parse_peaks(features))
        how = "by overlap"
    projection = _projection(kept[rows], columns, len(ids), len(features))
    return Alignment(features, projection, ids, len(np.unique(columns)), True, how=how, **found)


def _overlap(peaks: pd.DataFrame, reference: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers of all pairs of half-open intervals that share a base, found by bioframe."""
    import bioframe  # here, because it takes a second to import, and only peaks need it

    if not set(peaks["chrom"]) & set(reference["chrom"]):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    pairs = bioframe.overlap(peaks, reference, how="inner", return_input=False, return_index=True)
    return pairs["index"].to_numpy(np.int64), pairs["index_"].to_numpy(np.int64)


def _projection(rows: np.ndarray, columns: np.ndarray, n_in: int, n_out: int) -> csr_matrix:
    """Return [n_in, n_out] with 1 at each pair of row and column."""
    return csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(n_in, n_out))


def check_coverage(alignment: Alignment, sums: np.ndarray, least: float, path: str | Path) -> None:
    """Check that a file has enough of the reference's features.

    Parameters
    ----------
    alignment : of the file
    sums : [n_in] total of each of the file's columns
    least : least share of the reference's features, from 0 to 1
    path : the file, for messages

    Raises
    ------
    UserError
        If the file has fewer; the message gives a likely reason.
    """
    if not alignment.by_reference or (alignment.coverage >= least and alignment.n_found):
        return
    what = "genes" if alignment.genes else "peaks"
    top = alignment.most_expressed_unused(sums)
    raise UserError(
        f"{path}: has {alignment.n_found:,} of the {len(alignment.features):,} {what} of the reference "
        f"({alignment.coverage:.1%}; --min_gene_coverage is {least:g}); {_reason(alignment)}"
        + (f"; most {'expressed' if alignment.genes else 'often open'} unmatched: {', '.join(top)}" if len(top) else "")
    )


def _reason(alignment: Alignment) -> str:
    """Return the most likely reason for a low coverage, and what the user can do."""
    wanted = ", ".join(alignment.features[:3])
    if alignment.genes is None:
        return f"peaks like {wanted} are expected: another build or species? Lift the peaks over, or call them again"
    genes, expected = alignment.genes, translate(alignment.features)
    if genes.species != expected.species and "unknown" not in (genes.species, expected.species):
        return (
            f"the file has {genes.species} genes, but {expected.species} genes are expected; use a model of "
            f"{genes.species} genes"
        )
    if genes.id_type == "Ensembl ids" and expected.id_type == "symbols":
        return f"the file has Ensembl ids, but symbols like {wanted} are expected; put symbols into var_names"
    if genes.known.mean() > 0.8:
        return (
            f"the file is a panel: it has only {len(alignment.ids):,} genes, nearly all of them known; lower "
            "--min_gene_coverage if so few genes are enough, or train a model on such a panel"
        )
    return f"its gene ids are not recognised; put gene symbols like {wanted} into var_names"
