"""Gene symbols: bring them up to date, and infer the species from them.

Symbols change (``MARCH1`` became ``MARCHF1``, because spreadsheets took it for a date), so cells from different years
only match once their symbols are up to date. The table is HGNC's complete set of 2026-06-20 (CC0), rebuilt by
``utils.features.make_gene_table``.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import pandas as pd

GENE_TABLE = Path(__file__).parent / "resources" / "hgnc_symbols.tsv.gz"

_HUMAN_ENSEMBL = re.compile(r"ENSG\d{11}")
# Mouse symbols have lower-case letters after the first: Gad1, H2-K1, mt-Nd1, Gm12345, 1700017B05Rik.
_MOUSE = re.compile(r".*ENSMUSG\d{11}.*|\w+Rik|mt-[A-Z][a-z]\w*|[A-Z]\d*[a-z][\w.-]*|H2-\w+")
_CLONE = re.compile(r"(RP\d{1,2}|CT[ABCD]|XX\w*|LL\w+|KB|GS1|LA16c|CH\d+)[-.].+\.\d+|[A-Z]{1,2}\d{5,6}\.\d+")
_STABLE_ID = re.compile(r"ENS[A-Z]*G\d{11}|FBgn\d{7}|WBGene\d{8}")
# HGNC writes C1orf21, many files C1ORF21.
_OPEN_READING_FRAME = re.compile(r"C([0-9]+|X|Y)ORF([0-9]+.*)")


@lru_cache(maxsize=1)
def load_gene_table() -> pd.DataFrame:
    """Read the table of HGNC's approved human genes.

    Returns
    -------
    One row per gene, sorted by symbol: ``symbol``, ``protein_coding`` (bool), ``previous`` and ``alias`` (symbols
    separated by ``|``), ``ensembl`` and ``entrez`` ids. Missing text is the empty string. All callers share the table:
    copy it before changing it.
    """
    table = pd.read_csv(GENE_TABLE, sep="\t", dtype=str, keep_default_na=False)
    table["protein_coding"] = table["protein_coding"] == "1"
    return table


@lru_cache(maxsize=1)
def _symbol_lookup() -> tuple[frozenset[str], dict[str, list[str]], dict[str, list[str]]]:
    """Return the approved symbols, and two tables: previous symbol → approved symbols, alias → approved symbols."""
    table = load_gene_table()

    def invert(column: str) -> dict[str, list[str]]:
        approved_of: dict[str, list[str]] = {}  # each list is sorted, because the table is
        for symbol, listed in zip(table["symbol"], table[column], strict=True):
            for old in set(filter(None, listed.split("|"))):
                approved_of.setdefault(old, []).append(symbol)
        return approved_of

    return frozenset(table["symbol"]), invert("previous"), invert("alias")


def detect_species(ids: Iterable[str]) -> str:
    """Infer from the spelling of gene ids whether they are human or mouse genes.

    An id counts as human if it is an approved or previous symbol of HGNC, or a human Ensembl id. Otherwise it counts as
    mouse if it is spelt like a mouse symbol (``Gad1``, ``1700017B05Rik``), or is a mouse Ensembl id. Otherwise it
    counts as human if it is an alias in HGNC.

    Parameters
    ----------
    ids
        Gene symbols or Ensembl ids; a few dozen are enough.

    Returns
    -------
    ``"human"`` or ``"mouse"``, whichever has more ids, if these are at least half of all; otherwise ``"unknown"``.
    """
    ids = [str(i) for i in ids]
    approved, previous, _ = _symbol_lookup()
    human = mouse = 0
    for gene in ids:
        # Many of HGNC's aliases are mouse symbols (Aiolos, Alix), so the mouse spelling goes first.
        if gene in approved or _HUMAN_ENSEMBL.search(gene):
            human += 1
        elif _MOUSE.fullmatch(gene) and gene not in previous:
            mouse += 1
        elif symbol_candidates(gene) or hyphen_candidates(gene):
            human += 1
    if 2 * max(human, mouse) < len(ids) or human == mouse:
        return "unknown"
    return "human" if human > mouse else "mouse"


def symbol_candidates(gene: str) -> list[str]:
    """Return the approved human symbols that an id may mean, in alphabetical order: one, several or none.

    An approved symbol means itself. Otherwise the genes that had the id as a previous symbol are returned; if there are
    none, those that have it as an alias. Case matters (``Gad1`` is not ``GAD1``), except in open reading frames
    (``C1ORF21`` is ``C1orf21``).
    """
    match = _OPEN_READING_FRAME.fullmatch(gene)
    return _look_up([f"C{match[1]}orf{match[2]}" if match else gene])


def hyphen_candidates(gene: str) -> list[str]:
    """Return the approved human symbols that an id may mean if R replaced hyphens by dots: ``HLA.A`` is ``HLA-A``.

    First all dots become hyphens, then each dot alone (``RP11.5N23.4`` is ``RP11-5N23.4``). Approved symbols go before
    previous symbols, and these before aliases.
    """
    dots = [i for i, letter in enumerate(gene) if letter == "."]
    return _look_up([gene.replace(".", "-"), *(f"{gene[:i]}-{gene[i + 1 :]}" for i in dots)] if dots else [])


def _look_up(names: list[str]) -> list[str]:
    """Return the first name that is an approved symbol, or the genes of the first previous symbol, or first alias."""
    approved, previous, alias = _symbol_lookup()
    for name in names:
        if name in approved:
            return [name]
    return list(next((table[name] for table in (previous, alias) for name in names if name in table), []))


def is_clone_name(gene: str) -> bool:
    """Return whether an id names a sequenced clone (``RP11-34P13.7``), as older annotations name many lncRNAs."""
    return _CLONE.fullmatch(gene) is not None


def share_gene_like(ids: Sequence[str]) -> float:
    """Return the share of ids that look like genes of any species.

    Gene-like ids are human symbols in upper or lower case (``sox10`` is a gene of zebrafish), symbols spelt as in mouse
    and rat, names of clones, and stable ids of Ensembl, FlyBase or WormBase.
    """
    ids = list(map(str, ids))
    like_gene = lambda gene: bool(
        _MOUSE.fullmatch(gene) or _STABLE_ID.match(gene) or is_clone_name(gene) or symbol_candidates(gene.upper())
    )
    return sum(map(like_gene, ids)) / max(len(ids), 1)
