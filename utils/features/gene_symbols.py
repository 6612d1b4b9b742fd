"""Gene symbols: which species they belong to, how they are spelt today, and what to do when two columns are one gene.

Symbols change (``MARCH1`` is ``MARCHF1`` since spreadsheets took it for a date), so cells from different years only
align after their symbols are brought up to date. The table is HGNC's complete set of 2026-06-20 (CC0), rebuilt by
``utils.features.make_gene_table``.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import UserError

GENE_TABLE = Path(__file__).parent / "resources" / "hgnc_symbols.tsv.gz"

_HUMAN_ENSEMBL = re.compile(r"ENSG\d{11}")
# Gad1, H2-K1, mt-Nd1, Gm12345, 1700017B05Rik: mouse symbols have lower-case letters after the first.
_MOUSE = re.compile(r".*ENSMUSG\d{11}.*|\w+Rik|mt-[A-Z][a-z]\w*|[A-Z]\d*[a-z][\w.-]*|H2-\w+")
# HGNC writes the open reading frames as C1orf21, many files as C1ORF21.
_CLONE = re.compile(r"(RP\d{1,2}|CT[ABCD]|XX\w*|LL\w+|KB|GS1|LA16c|CH\d+)[-.].+\.\d+|[A-Z]{1,2}\d{5,6}\.\d+")
_STABLE_ID = re.compile(r"ENS[A-Z]*G\d{11}|FBgn\d{7}|WBGene\d{8}")
_OPEN_READING_FRAME = re.compile(r"C([0-9]+|X|Y)ORF([0-9]+.*)")


@lru_cache(maxsize=1)
def load_gene_table() -> pd.DataFrame:
    """Read HGNC's approved human genes.

    Returns
    -------
    One row per gene, sorted by symbol: ``symbol``, ``protein_coding`` (bool), ``previous`` and ``alias``
    (``|``-separated symbols), ``ensembl`` and ``entrez`` ids; text that is absent is the empty string. The frame is
    shared between callers: copy it before changing it.
    """
    table = pd.read_csv(GENE_TABLE, sep="\t", dtype=str, keep_default_na=False)
    table["protein_coding"] = table["protein_coding"] == "1"
    return table


@lru_cache(maxsize=1)
def _symbol_lookup() -> tuple[frozenset[str], dict[str, list[str]], dict[str, list[str]]]:
    """Approved symbols; previous symbol → approved symbols; alias → approved symbols."""
    table = load_gene_table()

    def invert(column: str) -> dict[str, list[str]]:
        approved_of: dict[str, list[str]] = {}  # the table is sorted by symbol, hence so is each list
        for symbol, listed in zip(table["symbol"], table[column], strict=True):
            for old in set(filter(None, listed.split("|"))):
                approved_of.setdefault(old, []).append(symbol)
        return approved_of

    return frozenset(table["symbol"]), invert("previous"), invert("alias")


def detect_species(ids: Iterable[str]) -> str:
    """Tell human from mouse genes by how they are written.

    An id speaks for human if it is an approved, previous or alias symbol of HGNC or a human Ensembl id; else for mouse
    if it is spelt as mouse symbols are (``Gad1``, ``1700017B05Rik``) or is a mouse Ensembl id.

    Parameters
    ----------
    ids
        Gene symbols or Ensembl ids; a panel of some tens is enough.

    Returns
    -------
    ``"human"`` or ``"mouse"`` if at least half of the ids speak for it and more than for the other, else ``"unknown"``.
    """
    ids = [str(i) for i in ids]
    approved, previous, _ = _symbol_lookup()
    human = mouse = 0
    for gene in ids:
        # The mouse spelling goes before aliases, since many of HGNC's aliases are mouse symbols (Aiolos, Alix).
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
    """Approved human symbols that an id may mean, in alphabetical order: one, several, or none.

    An approved symbol means itself. Else the genes that had the id as a previous symbol are the candidates; else those
    that have it as an alias. Case matters (``Gad1`` is not ``GAD1``), except in open reading frames (``C1ORF21`` is
    ``C1orf21``).
    """
    match = _OPEN_READING_FRAME.fullmatch(gene)
    return _look_up([f"C{match[1]}orf{match[2]}" if match else gene])


def hyphen_candidates(gene: str) -> list[str]:
    """Approved human symbols that an id may mean if R wrote a dot for a hyphen: ``HLA.A`` is ``HLA-A``.

    All dots are tried as hyphens, then each alone (``RP11.5N23.4`` is ``RP11-5N23.4``); approved symbols go before
    previous ones, those before aliases.
    """
    dots = [i for i, letter in enumerate(gene) if letter == "."]
    return _look_up([gene.replace(".", "-"), *(f"{gene[:i]}-{gene[i + 1 :]}" for i in dots)] if dots else [])


def _look_up(names: list[str]) -> list[str]:
    """Approved symbols of the first name that is one, else of the first previous symbol, else of the first alias."""
    approved, previous, alias = _symbol_lookup()
    for name in names:
        if name in approved:
            return [name]
    return list(next((of[name] for of in (previous, alias) for name in names if name in of), []))


def is_clone_name(gene: str) -> bool:
    """Whether an id names a sequenced clone, as older annotations do for lncRNAs and pseudogenes: ``RP11-34P13.7``."""
    return _CLONE.fullmatch(gene) is not None


def share_of_any_species(ids: Sequence[str]) -> float:
    """Share of ids that look like genes of some species.

    Those are: a human symbol in any case (``sox10`` of the zebrafish), a symbol spelt as in mouse and rat, a clone's
    name, or a stable id of Ensembl, FlyBase or WormBase.
    """
    ids = list(map(str, ids))
    like_gene = lambda gene: bool(
        _MOUSE.fullmatch(gene) or _STABLE_ID.match(gene) or is_clone_name(gene) or symbol_candidates(gene.upper())
    )
    return sum(map(like_gene, ids)) / max(len(ids), 1)


def read_gene_embedding(path: str | Path, genes: Sequence[str], dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the vectors of some genes from a word2vec-style text file, such as gene2vec's.

    Each line is a symbol and ``dim`` numbers, separated by white space; a first line ``n_genes dim`` is skipped.

    Parameters
    ----------
    path
        The text file.
    genes
        [n_genes] the symbols wanted.
    dim
        Length of a vector.

    Returns
    -------
    vectors
        [n_genes, dim] float32; zeros for a gene that is not in the file.
    found
        [n_genes] bool, whether the gene is in the file.

    Raises
    ------
    UserError
        If the file is missing or not such a text, a vector has another length, or none of the genes is there.
    """
    genes = [str(g) for g in genes]
    wanted, rows = set(genes), {}
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                name, *values = line.split() or [""]
                if not name or (number == 1 and len(values) == 1 and name.isdigit() and values[0].isdigit()):
                    continue
                if len(values) != dim:
                    raise UserError(
                        f"{path} line {number} ({name}) holds {len(values)} numbers, not {dim}; "
                        f"give a gene embedding of width {dim} or change the model's width"
                    )
                if name in wanted:
                    rows[name] = np.array(values, dtype=np.float32)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path of a gene embedding") from error
    except ValueError as error:  # not a number, or not UTF-8
        raise UserError(f"{path} is no text of one gene and {dim} numbers per line ({error})") from error
    if not rows:
        raise UserError(f"{path} holds none of the {len(genes)} genes; check that both use the same gene symbols")
    found = np.array([g in rows for g in genes], dtype=bool)
    vectors = np.zeros((len(genes), dim), dtype=np.float32)
    vectors[found] = [rows[g] for g in genes if g in rows]
    return vectors, found
