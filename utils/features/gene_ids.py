"""Detect which ids a file names its genes by, and translate them to gene symbols.

Files name genes by symbols of any year, by Ensembl or Entrez ids, or by both in one name; in the index or in a column.
Spreadsheets have turned some symbols into dates. Human ids become the symbols that are approved now; an id that may
mean several genes is reported and not changed. Genes of other species keep their names.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pandas as pd

from utils.features.gene_symbols import detect_species, hyphen_candidates, load_gene_table, symbol_candidates

_ENSEMBL = re.compile(r"(ENS(?:MUS)?G\d{11})(?:\.\d+)?")
_GENOME_PREFIX = re.compile(r"^(GRCh38|GRCh37|hg38|hg19|GRCm38|GRCm39|mm10|mm39)_+")
_FLOAT = re.compile(r"^(\d+)\.0$")  # an Entrez id that was stored as a float
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH_GENES = {"mar": ("MARCH", "MARC"), "sep": ("SEPT",)}  # in other months the name itself: DEC1, OCT4 …
_DATE = re.compile(
    r"(?P<day>\d{1,2})-(?P<month>[A-Za-z]{3})(?:-\d{2,4})?|(?P<month2>[A-Za-z]{3})-(?P<day2>\d{1,2})"
    r"|\d{4}-(?P<number>0[1-9]|1[0-2])-(?P<day3>\d{2})(?: 00:00:00)?"
)
_MADE_UNIQUE = re.compile(r"(.+)[-.]\d{1,2}")
"""A name that occurred twice, with the number that anndata (-1) or R (.1) appended to make it unique."""


@dataclass
class GeneNames:
    """The symbols of a file's genes, and how each was found.

    Attributes
    ----------
    symbols : [n_ids] in the file's order; an id that could not be translated stays as is
    id_type : what most ids are: symbols, Ensembl ids, Entrez ids, symbols with Ensembl ids, or row numbers
    column : where the ids are: index, or a column of var
    species : human, mouse, other or unknown
    known : [n_ids] bool, whether the symbol is an approved human symbol; in a mouse file, whether it is not a number
    updated : id → symbol, for former symbols and aliases
    repaired : date → symbol
    ambiguous : id → the symbols it may mean
    unknown : ids of no known gene
    ids : [n_ids] as the file has them
    """

    symbols: np.ndarray
    id_type: str
    column: str
    species: str
    known: np.ndarray
    updated: dict[str, str] = field(default_factory=dict)
    repaired: dict[str, str] = field(default_factory=dict)
    ambiguous: dict[str, list[str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    @property
    def merged(self) -> dict[str, list[str]]:
        """Symbol → the ids that became it, for symbols of several ids."""
        ids_of: dict[str, list[str]] = {}
        for gene, symbol in zip(self.ids, self.symbols, strict=True):
            ids_of.setdefault(str(symbol), []).append(gene)
        return {symbol: ids for symbol, ids in ids_of.items() if len(ids) > 1}

    @property
    def n_duplicates(self) -> int:
        """Number of genes beyond the first of each symbol."""
        return len(self.symbols) - len(set(self.symbols))


def name_genes(var: pd.DataFrame, species: str = "auto", reference: Sequence[str] | None = None) -> GeneNames:
    """Find the ids of a file's genes and translate them to symbols.

    Parameters
    ----------
    var : annotation of the genes; the ids are its index, or the text column with clearly more known ids
    species : human, mouse, other (names stay as is), or auto to infer it
    reference : symbols to look for; with it, the ids that lead to most of these symbols are used

    Returns
    -------
    GeneNames
    """
    candidates = {"index": list(map(str, var.index))}
    for column in var.columns:
        values = var[column]
        if values.dtype == object or isinstance(values.dtype, pd.CategoricalDtype | pd.StringDtype):
            # A gene without a symbol in the column keeps its name from the index.
            filled = values.astype(object).where(values.notna() & (values.astype(str) != ""), var.index)
            ids = list(map(str, filled))
            if 2 * len(set(ids)) > len(ids) and (reference is not None or share_known(ids) > 0):
                candidates[str(column)] = ids
    found = {}
    for column, ids in candidates.items():
        names = translate(ids, species)
        if names.species == "unknown" and reference is not None:
            names = translate(ids, detect_species(reference))
        names.column = column
        found[column] = names

    def score(names: GeneNames) -> float:
        if reference is not None:
            return len(set(reference) & set(names.symbols)) / max(len(reference), 1)
        # Ensembl ids of species other than human are not translated, so a column of symbols is better.
        not_translated = names.id_type == "Ensembl ids" and names.species != "human"
        return float(names.known.mean()) - (0.5 if not_translated else 0.0)

    best = max(found.values(), key=score)
    # The index is preferred unless a column is clearly better.
    return found["index"] if score(found["index"]) >= score(best) - 0.05 else best


def translate(ids: Sequence[str], species: str = "auto") -> GeneNames:
    """Translate gene ids of any type to symbols.

    Parameters
    ----------
    ids : [n_ids] gene ids as a file has them
    species : human, mouse, other, unknown, or auto to infer it; only human ids are looked up, all others just lose an
        Ensembl id or version

    Returns
    -------
    GeneNames
    """
    given = list(map(str, ids))
    ids = [_FLOAT.sub(r"\1", _GENOME_PREFIX.sub("", gene.strip())) for gene in given]
    if species == "auto":
        species = "human" if _are_entrez(ids) else detect_species(ids)
    kinds = [_kind(gene) for gene in ids]
    id_type = Counter(kinds).most_common(1)[0][0]
    if id_type == "numbers":
        id_type = "Entrez ids" if _are_entrez(ids) else "row numbers"
    if species != "human":
        symbols = [_without_ensembl(gene) if kind != "symbols" else gene for gene, kind in zip(ids, kinds, strict=True)]
        known = np.full(len(ids), species == "mouse") & np.array([kind != "numbers" for kind in kinds])
        names = GeneNames(np.array(symbols, dtype=str), id_type, "index", species, known)
    else:
        names = _translate_human(ids, kinds, id_type)
    names.ids = given
    return names


def _translate_human(ids: list[str], kinds: list[str], id_type: str) -> GeneNames:
    """Look up human ids; `kinds` is the type of each id."""
    by_ensembl, by_entrez = _id_lookup()
    approved = frozenset(load_gene_table()["symbol"])
    names = GeneNames(np.array([]), id_type, "index", "human", np.array([]))
    present = set(ids)
    symbols = []
    dates = []  # rows that wait until all other genes have a symbol
    for row, (gene, kind) in enumerate(zip(ids, kinds, strict=True)):
        symbol = gene
        if kind in ("Ensembl ids", "symbols with Ensembl ids"):
            rest = _without_ensembl(gene)
            symbol = by_ensembl.get(_ENSEMBL.search(gene)[1]) or rest
        elif kind == "numbers" and id_type == "Entrez ids":
            symbol = by_entrez.get(gene, gene)
        if symbol not in approved:
            candidates = symbol_candidates(symbol)
            numbered = _MADE_UNIQUE.fullmatch(symbol)
            if not candidates and numbered and numbered[1] in present:  # a second column of the same gene
                candidates = symbol_candidates(numbered[1]) or hyphen_candidates(numbered[1])
            candidates = candidates or hyphen_candidates(symbol)
            if not candidates and _DATE.fullmatch(symbol):
                dates.append(row)
            elif len(candidates) == 1:
                symbol = names.updated[gene] = candidates[0]
            elif candidates:
                names.ambiguous[gene] = candidates
        symbols.append(symbol)
    taken = set(symbols)
    for row in dates:
        # MARCH1 and MARC1 both became 1-Mar; if one of them has its own column, the date is the other.
        candidates = _genes_of_date(symbols[row])
        missing = [name for name in candidates if name not in taken]
        if len(missing) == 1:
            symbols[row] = names.repaired[ids[row]] = missing[0]
        elif candidates:
            names.ambiguous[ids[row]] = candidates
    names.symbols = np.array(symbols, dtype=str)
    names.known = np.array([symbol in approved for symbol in symbols], dtype=bool)
    unknown = (gene for gene, known in zip(ids, names.known, strict=True) if not known and gene not in names.ambiguous)
    names.unknown = list(dict.fromkeys(unknown))
    return names


def share_known(ids: Iterable[str], n_sample: int = 2000) -> float:
    """Return the share of ids that may be those of human or mouse genes, judged on an evenly spaced sample.

    Parameters
    ----------
    ids : names of genes, peaks or cells
    n_sample : size of the sample

    Returns
    -------
    From 0 to 1; 0 if there are no ids
    """
    ids = list(ids)
    sample = [str(ids[i]) for i in np.unique(np.linspace(0, len(ids) - 1, min(len(ids), n_sample)).astype(int))]
    if not sample:
        return 0.0
    if all(gene.isdecimal() for gene in sample):
        return float(_are_entrez(ids))
    names = translate(sample)
    return float(names.known.mean())


def _kind(gene: str) -> str:
    """Return the type of one id: Ensembl ids, symbols with Ensembl ids, numbers, or symbols."""
    match = _ENSEMBL.search(gene)
    if match:
        return "Ensembl ids" if match[0] == gene else "symbols with Ensembl ids"
    return "numbers" if gene.isdecimal() else "symbols"


def _without_ensembl(gene: str) -> str:
    """Remove an Ensembl id: `TP53_ENSG00000141510.18` → `TP53`; an id alone only loses its version."""
    match = _ENSEMBL.search(gene)
    if not match:
        return gene
    rest = (gene[: match.start()] + gene[match.end() :]).strip("_|:;,. ()[]")
    return rest or match[1]


def _are_entrez(ids: Sequence[str]) -> bool:
    """Return whether at least half of the ids are human Entrez ids, and not just row numbers."""
    numbers = [gene for gene in ids if gene.isdecimal()]
    if 2 * len(numbers) < len(ids) or not numbers:
        return False
    values = np.array([int(gene) for gene in numbers])
    if len(values) > 2 and len(np.unique(np.diff(values))) == 1:  # equal steps: row numbers
        return False
    by_entrez = _id_lookup()[1]
    return 2 * sum(gene in by_entrez for gene in numbers) >= len(numbers)


def _genes_of_date(date: str) -> list[str]:
    """Return the current symbols of the genes that a spreadsheet may have turned into this date."""
    match = _DATE.fullmatch(date)
    month = (match["month"] or match["month2"] or _MONTHS[int(match["number"] or 1) - 1]).lower()
    day = int(match["day"] or match["day2"] or match["day3"])
    prefixes = _MONTH_GENES.get(month, (month.upper(),) if month in _MONTHS else ())
    return sorted({name for prefix in prefixes for name in symbol_candidates(f"{prefix}{day}")})


@lru_cache(maxsize=1)
def _id_lookup() -> tuple[dict[str, str], dict[str, str]]:
    """Return two tables: Ensembl id → symbol, and Entrez id → symbol."""
    table = load_gene_table()
    return tuple(
        dict(zip(table.loc[table[column] != "", column], table.loc[table[column] != "", "symbol"], strict=True))
        for column in ("ensembl", "entrez")
    )
