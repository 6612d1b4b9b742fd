"""Pairs of genes: read them, draw negative pairs, and split them without sharing genes."""

import gzip
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import UserError, reading
from utils.features.gene_vectors import GeneVectors

ROUNDS = 200
"""How often the ends of rejected negative pairs are drawn anew. Pairs that are still rejected then are given up."""
LAYOUT = "give two genes per line, then 0 or 1 as a third column or in a file of labels beside it"


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of genes with labels.

    Attributes
    ----------
    a, b : [n_pairs] the genes: names, or numbers from 0
    y : [n_pairs] 1 for pairs that interact, 0 for others
    """

    a: np.ndarray
    b: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, keep) -> "Pairs":
        return Pairs(self.a[keep], self.b[keep], self.y[keep])

    @property
    def genes(self) -> np.ndarray:
        """The genes of all pairs, each of them once."""
        return np.unique(np.concatenate([self.a, self.b]))


def join(*parts: Pairs) -> Pairs:
    """Return the pairs of all parts, one part after the other."""
    return Pairs(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("a", "b", "y")))


def read_pairs(path: str | Path) -> tuple[Pairs, bool]:
    """Read a text file of gene pairs.

    Parameters
    ----------
    path : two genes per line, separated by white space, a comma or a semicolon, gzipped or not. Labels are a third
        column or, as Gene2vec publishes its pairs, a file with `_label` in place of `_text` in its name.

    Returns
    -------
    pairs : names of genes as in the file; y is 1 for all pairs if the file has no labels
    labelled : whether there are labels

    Raises
    ------
    UserError
        If the file cannot be read, holds no pair, a line has another number of columns than two or three, or a label is
        neither 0 nor 1.
    """
    path = Path(path)
    rows = [re.split(r"\s*[,;]\s*|\s+", line) for line in _lines(path)]
    if not rows:
        raise UserError(f"{path}: holds no pairs; {LAYOUT}")
    beside = _labels_beside(path)
    width = 2 if beside else len(rows[0])
    for number, row in enumerate(rows, start=1):
        if len(row) != width or width not in (2, 3):
            wanted = width if width in (2, 3) else "two or three"
            raise UserError(f"{path}: line {number} has {len(row)} columns, not {wanted}; {LAYOUT}")
    labels = _lines(beside) if beside else [row[2] for row in rows] if width == 3 else ["1"] * len(rows)
    if len(labels) != len(rows):
        raise UserError(f"{beside}: has {len(labels):,} labels for the {len(rows):,} pairs of {path}; {LAYOUT}")
    wrong = next((number for number, label in enumerate(labels, start=1) if label not in ("0", "1")), None)
    if wrong:
        raise UserError(
            f"{beside or path}: the label of line {wrong} is {labels[wrong - 1][:40]!r}, not 0 or 1; remove a header "
            "and further columns, and write 1 for pairs that interact and 0 for others"
        )
    a, b = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    return Pairs(a, b, np.array(labels, dtype=np.int64)), bool(beside) or width == 3


def _labels_beside(path: Path) -> Path | None:
    """Return the file of labels that belongs to a file of pairs, gzipped or not, if there is one."""
    if "_text" not in path.name:
        return None
    plain = path.with_name(path.name.replace("_text", "_label").removesuffix(".gz"))
    return next((file for file in (plain, Path(f"{plain}.gz")) if file.is_file()), None)


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file, gzipped or not, without empty ones."""
    with reading(path, "cannot be read", "give the path of a text file, gzipped or not"):
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        return [line.strip() for line in text.splitlines() if line.strip()]


def clean(pairs: Pairs, ordered: bool = False) -> tuple[Pairs, dict[str, int]]:
    """Remove pairs that cannot be right.

    Parameters
    ----------
    pairs : genes as numbers
    ordered : treat (a, b) and (b, a) as different pairs

    Returns
    -------
    pairs : each of them once, without a gene paired with itself and without pairs that have both labels
    dropped : reason → number of lines
    """
    selves = pairs.a == pairs.b
    key = keys(pairs, ordered)
    _, place, group = np.unique(key, return_index=True, return_inverse=True)
    total, positive = np.bincount(group), np.bincount(group, weights=pairs.y)
    both = ((positive > 0) & (positive < total))[group] & ~selves
    first = np.zeros(len(pairs), dtype=bool)
    first[place] = True
    dropped = {"a gene with itself": selves.sum(), "both labels": both.sum()}
    dropped["repeated"] = (~first & ~selves & ~both).sum()
    return pairs[first & ~selves & ~both], {reason: int(n) for reason, n in dropped.items()}


def keys(pairs: Pairs, ordered: bool = False) -> np.ndarray:
    """Return [n_pairs] one number per pair; the same for (a, b) and (b, a) unless pairs are ordered."""
    low, high = (pairs.a, pairs.b) if ordered else (np.minimum(pairs.a, pairs.b), np.maximum(pairs.a, pairs.b))
    return low.astype(np.int64) << 32 | high.astype(np.int64)


def draw_negatives(
    positives: Pairs, known: Pairs, rng: np.random.Generator, degree_matched: bool = True, ordered: bool = False
) -> Pairs:
    """Draw as many pairs that are not known to interact as there are positive ones.

    Parameters
    ----------
    positives : pairs of one side of a split, genes as numbers
    known : all positive pairs, of all sides; none of them is drawn
    rng : random numbers
    degree_matched : each gene occurs as often as in the positive pairs, so that a gene alone says nothing about a
        label. Otherwise, all genes of `positives` are equally likely.
    ordered : keep genes on the side on which they occur

    Returns
    -------
    Pairs with label 0; fewer than `positives` if a gene interacts with nearly all others
    """
    taken = np.unique(keys(known, ordered))
    a, b = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    wait_a, wait_b = positives.a.astype(np.int64), positives.b.astype(np.int64)
    for _ in range(ROUNDS):
        kept, ends_a, ends_b = np.ones(len(a), dtype=bool), wait_a, wait_b
        if degree_matched:
            # Rejected ends may fit only taken ends (a hub and itself), so accepted pairs are broken up as well.
            kept[rng.choice(len(a), min(len(a), 2 * len(wait_a)), replace=False)] = False
            ends_a, ends_b = np.concatenate([wait_a, a[~kept]]), np.concatenate([wait_b, b[~kept]])
            if ordered:
                ends_b = rng.permutation(ends_b)
            else:
                ends_a, ends_b = rng.permutation(np.concatenate([ends_a, ends_b])).reshape(2, -1)
        else:
            ends_a, ends_b = rng.choice(positives.genes, (2, len(wait_a)))
        new_a, new_b = np.concatenate([a[kept], ends_a]), np.concatenate([b[kept], ends_b])
        key = keys(Pairs(new_a, new_b, new_a), ordered)
        first = np.zeros(len(key), dtype=bool)
        first[np.unique(key, return_index=True)[1]] = True
        good = first & (new_a != new_b) & ~np.isin(key, taken)
        if good.sum() >= len(a):
            a, b, wait_a, wait_b = new_a[good], new_b[good], new_a[~good], new_b[~good]
        if not len(wait_a):
            break
    return Pairs(a, b, np.zeros(len(a), dtype=np.int64))


def split_genes(pairs: Pairs, test: float, val: float, rng: np.random.Generator) -> dict[str, Pairs]:
    """Split pairs into train, val and test so that no gene is on two sides; pairs across sides are left out.

    Parameters
    ----------
    pairs : pairs to split
    test, val : shares of the genes
    rng : random numbers
    """
    genes = pairs.genes
    side = np.searchsorted([test, test + val], (rng.permutation(len(genes)) + 0.5) / len(genes))
    side_a, side_b = (side[np.searchsorted(genes, ends)] for ends in (pairs.a, pairs.b))
    return {name: pairs[(side_a == i) & (side_b == i)] for name, i in (("train", 2), ("val", 1), ("test", 0))}


def split_at_random(pairs: Pairs, test: float, val: float, rng: np.random.Generator) -> dict[str, Pairs]:
    """Split pairs into train, val and test at random; a gene may be on all sides."""
    side = np.searchsorted([test, test + val], (rng.permutation(len(pairs)) + 0.5) / max(len(pairs), 1))
    return {name: pairs[side == i] for name, i in (("train", 2), ("val", 1), ("test", 0))}


def add_negatives(
    sides: dict[str, Pairs], how: str | None, rng: np.random.Generator, ordered: bool = False
) -> dict[str, Pairs]:
    """Return each side's positive pairs followed by negative ones, which are positive on no side.

    Parameters
    ----------
    sides : side → positive pairs
    how : degree_matched or random, or None to add nothing, for pairs that have labels
    rng : random numbers
    ordered : as in `draw_negatives`
    """
    if how is None:
        return sides
    known = join(*sides.values())
    matched = how == "degree_matched"
    return {side: join(pairs, draw_negatives(pairs, known, rng, matched, ordered)) for side, pairs in sides.items()}


def number_genes(
    sides: dict[str, Pairs],
    sources: dict[str, GeneVectors],
    ordered: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Pairs], dict[str, np.ndarray], dict[str, dict[str, int]]]:
    """Number the genes that all sources have a vector of, and remove pairs that cannot be used.

    Parameters
    ----------
    sides : side → pairs of names, the test pairs last
    sources : name → vectors; a file's name or a baseline's
    ordered : as in `clean`
    say : receives lines about what was found and left out

    Returns
    -------
    sides : side → pairs of gene numbers
    vectors : source → [n_genes, width]
    dropped : side → reason → number of lines

    Raises
    ------
    UserError
        If a source has none of the genes.
    """
    names = join(*sides.values()).genes
    found = np.ones(len(names), dtype=bool)
    for name, source in sources.items():
        rows = source.rows(names)
        has_vector = (rows >= 0) & (True if source.n_cells is None else source.n_cells[rows] > 0)
        say(f"{name}: {has_vector.sum():,} of {len(names):,} genes of the pairs have a vector")
        if not has_vector.any():
            raise UserError(f"{name}: has none of the genes of the pairs; give pairs and vectors of the same species")
        found &= has_vector
    rows = next(iter(sources.values())).rows(names)
    known, place = np.unique(rows[found], return_index=True)  # two names of one gene get one number
    vectors = {name: source.of(names[found][place])[0] for name, source in sources.items()}
    number = np.where(found, np.searchsorted(known, rows), -1)
    numbered, dropped, later = {}, {}, np.empty(0, dtype=np.int64)
    for side in reversed(sides):  # test first: a gene that two sides name differently stays on the later side
        pairs = sides[side]
        a, b = (number[np.searchsorted(names, ends)] for ends in (pairs.a, pairs.b))
        has = (a >= 0) & (b >= 0)
        apart = ~(np.isin(a, later) | np.isin(b, later))
        numbered[side], why = clean(Pairs(a, b, pairs.y)[has & apart], ordered)
        later = np.union1d(later, numbered[side].genes)
        why = {"without a vector": int((~has).sum()), "on a later side": int((has & ~apart).sum())} | why
        say(f"{side}: {len(pairs):,} pairs, left out: " + ", ".join(f"{n:,} {reason}" for reason, n in why.items()))
        dropped[side] = why
    return {side: numbered[side] for side in sides}, vectors, dropped
