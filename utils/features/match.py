"""From a file's columns to a model's: which of them belong together, how much is found, how much is lost.

For genes, columns of one symbol are summed; for peaks, columns that overlap one of the model's peaks. Both are a sparse
matrix of 0 and 1 that a block of counts is multiplied with, so a file of any size is aligned block by block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from utils.errors import UserError
from utils.features.gene_ids import GeneNames, name_genes, translate
from utils.features.gene_symbols import share_of_any_species
from utils.features.peaks import format_peaks, genome_order, parse_peaks, place_peaks

NO_GENES = 0.01
"""Share of ids that look like genes below which a file names no genes: of made-up names like f3 or G12 up to 0.9 % are
aliases of some gene; of the genes of other vertebrates tens of percent share their symbols with human or mouse."""


@dataclass
class Alignment:
    """How the columns of a file become those of the output.

    Attributes
    ----------
    features : [n_out] names, in the output's order
    projection : [n_in, n_out] float32 of 0 and 1
    ids : [n_in] the file's names, for messages
    n_found : features of the output that the file has
    by_reference : whether the output's features were given
    genes : how the genes were named, or None for peaks
    genomes : assemblies that the peaks fit
    notes : peaks: those outside the genome or its chromosomes, a line each
    how : peaks: by name, or by overlap
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
        """[n_in] bool, columns that go anywhere."""
        return np.diff(self.projection.indptr) > 0

    def most_expressed_unused(self, sums: np.ndarray, n: int = 10) -> list[str]:
        """The file's names of columns that go nowhere, largest of `sums` [n_in] first."""
        lost = np.flatnonzero(~self.used)
        return list(self.ids[lost[np.argsort(-sums[lost], kind="stable")[:n]]])


def align_genes(var: pd.DataFrame, species: str, reference: Sequence[str] | None, path: str | Path) -> Alignment:
    """Genes by symbol; without a reference all the file's, in alphabetical order, whatever theirs was.

    Raises
    ------
    UserError
        If the file does not name its genes, or names none of them once, or names what is no gene of any known species.
    """
    genes = name_genes(var, species, reference)
    symbols = genes.symbols
    if genes.id_type == "row numbers":
        raise UserError(
            f"{path}: names its genes by numbers ({', '.join(symbols[:3])} …) that are no Entrez ids; put symbols or "
            "Ensembl ids into var_names"
        )
    if len(symbols) > 1 and pd.Series(symbols).duplicated(keep=False).all():
        raise UserError(
            f"{path}: every one of its {len(symbols):,} genes shares its symbol with another ({', '.join(symbols[:3])} "
            "…), as if tables had been joined side by side; keep one of them"
        )
    if (species, genes.species, reference) == ("auto", "unknown", None) and share_of_any_species(genes.ids) < NO_GENES:
        raise UserError(
            f"{path}: 0% of its {len(symbols):,} ids are genes of a known species ({', '.join(genes.ids[:3])} …); put "
            "gene symbols or Ensembl ids into var_names, or give --species other if they are genes of another species"
        )
    features = np.unique(symbols) if reference is None else np.asarray(reference, dtype=str)
    position = pd.Index(features).get_indexer(pd.Index(symbols))
    projection = _selector(np.flatnonzero(position >= 0), position[position >= 0], len(symbols), len(features))
    found = len(np.unique(position[position >= 0]))
    return Alignment(features, projection, np.asarray(var.index), found, reference is not None, genes)


def align_peaks(var: pd.DataFrame, genome: str | None, reference: Sequence[str] | None, path: str | Path) -> Alignment:
    """Peaks in genome order; with a reference, by name where one set is part of the other, else by overlap.

    Raises
    ------
    UserError
        If names are no intervals, or too many intervals lie outside the genome.
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
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        projection = _selector(kept, place[column], len(ids), len(features))
        return Alignment(features[order], projection, ids, len(features), False, **found)
    features = np.asarray(reference, dtype=str)
    position = pd.Index(features).get_indexer(pd.Index(names))
    n_named = len(np.unique(position[position >= 0]))
    if n_named in (len(features), len(set(names))):
        rows, columns, how = np.flatnonzero(position >= 0), position[position >= 0], "by name"
    else:
        rows, columns = _overlap(intervals, parse_peaks(features))
        how = "by overlap"
    projection = _selector(kept[rows], columns, len(ids), len(features))
    return Alignment(features, projection, ids, len(np.unique(columns)), True, how=how, **found)


def _overlap(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows whose half-open intervals share a base, by bioframe."""
    import bioframe  # takes a second, and only peaks need it

    if not set(ours["chrom"]) & set(theirs["chrom"]):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    pairs = bioframe.overlap(ours, theirs, how="inner", return_input=False, return_index=True)
    return pairs["index"].to_numpy(np.int64), pairs["index_"].to_numpy(np.int64)


def _selector(rows: np.ndarray, columns: np.ndarray, n_in: int, n_out: int) -> csr_matrix:
    return csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(n_in, n_out))


def check_coverage(alignment: Alignment, sums: np.ndarray, least: float, path: str | Path) -> None:
    """Stop a file that has too few of the features that are asked for, and guess at the reason.

    Parameters
    ----------
    sums : [n_in] total of each of the file's columns
    least : share of the reference's features, 0 … 1

    Raises
    ------
    UserError
        If fewer are there.
    """
    if not alignment.by_reference or (alignment.coverage >= least and alignment.n_found):
        return
    what = "genes" if alignment.genes else "peaks"
    top = alignment.most_expressed_unused(sums)
    raise UserError(
        f"{path}: has {alignment.n_found:,} of the {len(alignment.features):,} {what} asked for "
        f"({alignment.coverage:.1%}; --min_gene_coverage is {least:g}); {_reason(alignment)}"
        + (f"; most {'expressed' if alignment.genes else 'often open'} unmatched: {', '.join(top)}" if len(top) else "")
    )


def _reason(alignment: Alignment) -> str:
    wanted = ", ".join(alignment.features[:3])
    if alignment.genes is None:
        return f"peaks like {wanted} are expected: another build or species? Lift the peaks over, or call them anew"
    genes, theirs = alignment.genes, translate(alignment.features)
    if genes.species != theirs.species and "unknown" not in (genes.species, theirs.species):
        return f"the file's genes are {genes.species}, those asked for {theirs.species}; use a model of that species"
    if genes.id_type == "Ensembl ids" and theirs.id_type == "symbols":
        return f"the file has Ensembl ids, but symbols like {wanted} are expected; put symbols into var_names"
    if genes.known.mean() > 0.8:
        return (
            f"the file is a panel: it has only {len(alignment.ids):,} genes, nearly all of them known; lower "
            "--min_gene_coverage if so few genes will do, or train a model on such a panel"
        )
    return f"its gene ids are not recognised, expected are symbols like {wanted}; put gene symbols into var_names"
