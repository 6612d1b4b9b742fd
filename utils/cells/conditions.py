"""Cells that were perturbed: what was done to each, their expression, and the control cells beside them."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, hstack, vstack

from utils.cells.config import IngestConfig
from utils.cells.ingest import Ingested, ingest
from utils.cells.preprocessed import RawFile
from utils.errors import UserError
from utils.features.normalise import log_normalise

CONTROL = ("ctrl", "control")
"""How files call the control, in GEARS' and in scPerturb's spelling; in any case of letters."""
COLUMNS, LINES = ("condition", "perturbation"), ("cell_type", "cell_line", "celltype")
"""Columns of obs that are tried in this order: GEARS' name before scPerturb's."""
TOTAL = "ncounts"
"""Column of obs with a cell's counts over all genes that were measured."""
TARGET_SUM = 1e4
"""Counts per cell after scaling."""


def parse_condition(label: str, separator: str = "+") -> tuple[str, ...]:
    """Return the perturbed genes of a label, sorted; none for the control.

    Parameters
    ----------
    label : `ctrl`, `control`, `A`, `A+ctrl`, `ctrl+A` or `A+B`
    separator : stands between the genes
    """
    genes = [part.strip() for part in label.split(separator)]
    return tuple(sorted({gene for gene in genes if gene and gene.lower() not in CONTROL}))


def name_condition(genes: tuple[str, ...]) -> str:
    """Write perturbed genes as one label, `A+B`."""
    return "+".join(genes) or CONTROL[1]


@dataclass
class Perturbed:
    """Control cells and perturbed cells of one or more cell lines.

    Attributes
    ----------
    values : [cells, genes] float32, log2(1 + counts per 10,000)
    genes : [genes] current symbols
    barcodes : [cells]
    line : [cells] cell line
    conditions : (line, perturbed genes) of each condition, in order
    code : [cells] number of the cell's condition, -1 for a control cell
    notes : what was left out, a line each
    """

    values: csr_matrix
    genes: np.ndarray
    barcodes: pd.Index
    line: np.ndarray
    conditions: list[tuple[str, tuple[str, ...]]]
    code: np.ndarray
    notes: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """The cell lines; the one with the most conditions is first."""
        of = [line for line, _ in self.conditions]
        return sorted(set(of), key=lambda line: (-of.count(line), line))

    @property
    def perturbed(self) -> list[str]:
        """All perturbed genes, sorted."""
        return sorted({gene for _, genes in self.conditions for gene in genes})

    def mean(self, cells: np.ndarray) -> np.ndarray:
        """Mean values [genes] of some cells, given by number or mask."""
        return np.asarray(self.values[cells].mean(0), dtype=np.float64).ravel()

    def control(self, line: str) -> np.ndarray:
        """Numbers of the control cells of a line."""
        return np.flatnonzero((self.code < 0) & (self.line == line))

    def changes(self) -> np.ndarray:
        """[conditions, genes] mean of each condition's cells minus the mean of its line's control cells."""
        base = {line: self.mean(self.control(line)) for line in self.lines}
        return np.stack([self.mean(self.code == i) - base[line] for i, (line, _) in enumerate(self.conditions)])

    def halves(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Changes as in `changes`, from either half of each condition's cells and of the controls, split at random.

        The controls are split, too: the noise of controls that both halves share would make them look alike.
        """
        half = np.zeros(len(self.code), dtype=bool)
        groups = [np.flatnonzero(self.code == i) for i in range(len(self.conditions))]
        for cells in [*groups, *(self.control(line) for line in self.lines)]:
            half[rng.permutation(cells)[: len(cells) // 2]] = True
        one, other = (
            replace(self, values=self.values[rows], line=self.line[rows], code=self.code[rows])
            for rows in (half, ~half)
        )
        return one.changes(), other.changes()

    def pair(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a control cell of the same line for each cell.

        Returns
        -------
        [cells] numbers of control cells; a control cell may be drawn several times
        """
        partner = np.empty(len(self.code), dtype=np.int64)
        for line in self.lines:
            cells = np.flatnonzero(self.line == line)
            partner[cells] = rng.choice(self.control(line), len(cells))
        return partner


class Changes:
    """Changes of single cells, made when they are read: `changes[rows]` is [len(rows), genes] float32.

    Parameters
    ----------
    cells : the perturbed cells; the change of one is its values minus the mean of its line's control cells
    rows : [n] numbers of the cells
    """

    def __init__(self, cells: Perturbed, rows: np.ndarray):
        lines = sorted(cells.lines)
        self.values = cells.values[rows]
        self.line = np.searchsorted(lines, cells.line[rows])
        self.base = np.stack([cells.mean(cells.control(line)) for line in lines]).astype(np.float32)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.values[rows].toarray() - self.base[self.line[rows]]


def read_perturbed(
    file: RawFile,
    config: IngestConfig,
    column: str | None = None,
    separator: str | None = None,
    line_column: str | None = None,
    min_cells: int = 20,
) -> Perturbed:
    """Read cells with their conditions, from a file of GEARS, of scPerturb, or with columns that are named.

    Parameters
    ----------
    file : raw or preprocessed cells with RNA
    config : overrides for what cannot be inferred from the file
    column : column of obs with the condition; by default `condition` or `perturbation`
    separator : stands between two genes; by default `+`, or `_` in `perturbation` where no label has `+`
    line_column : column of obs with the cell line; by default `cell_type`, `cell_line` or `celltype`, or all cells are
        one line
    min_cells : a condition with fewer cells is left out, and so is a line with fewer control cells

    Raises
    ------
    UserError
        If a column is missing, no line has control cells, or fewer than four conditions are left.
    """
    if "rna" not in file.modalities:
        raise UserError(f"{file.path}: has no RNA; give a file of perturbed cells with RNA")
    ingested = ingest(file.modalities["rna"], config)
    obs = file.obs.loc[ingested.barcodes]
    column = _column(file.path, obs, column, COLUMNS, "--condition_column")
    line_column = _column(file.path, obs, line_column, LINES, "--line_column", needed=False)
    genes = _perturbed_genes(obs, column, separator)
    line = obs[line_column].astype(str).to_numpy() if line_column else np.full(len(obs), "all cells")
    known = np.array([label is not None for label in genes])
    notes = [f"{(~known).sum():,} cells have no condition and are left out"] if not known.all() else []

    is_control = np.array([label == () for label in genes])
    if not is_control.any():
        raise UserError(
            f"{file.path}: obs['{column}'] has no control cells (ctrl or control); changes are measured against them, "
            "so give a file with controls, or another --condition_column"
        )
    n_controls = pd.Series(line[is_control]).value_counts()
    without = sorted(set(line[known]) - set(n_controls.index[n_controls >= min_cells]))
    if without:
        notes.append(f"left out without {min_cells} control cells: {_few(without)}")
    keys = pd.Series(list(zip(line, genes, strict=True)))
    usable = known & ~np.isin(line, without)
    sizes = keys[usable & ~is_control].value_counts()
    conditions = sorted(key for key, n in sizes.items() if n >= min_cells)
    if small := sorted(f"{name_condition(genes)} ({n})" for (_, genes), n in sizes.items() if n < min_cells):
        notes.append(f"{len(small)} conditions with fewer than {min_cells} cells are left out: {_few(small)}")
    if len(conditions) < 4:
        raise UserError(
            f"{file.path}: obs['{column}'] has {len(conditions)} conditions with {min_cells} cells and a control, and "
            "at least 4 are needed; give more conditions, or lower --min_cells"
        )
    number = {key: i for i, key in enumerate(conditions)}
    code = np.array([number.get(key, -1) for key in keys])
    keep = np.flatnonzero(usable & (is_control | (code >= 0)))
    code[is_control] = -1
    values = _log_values(ingested, obs, notes)[keep]
    symbols = np.asarray(ingested.alignment.features, dtype=str)
    return Perturbed(values, symbols, ingested.barcodes[keep], line[keep], conditions, code[keep], notes)


def _column(path: Path, obs: pd.DataFrame, given: str | None, tried: tuple[str, ...], flag: str, needed: bool = True):
    """Return the column of obs that was given, or the first of those tried that is there."""
    name = given or next((name for name in tried if name in obs), None)
    if (name is None and needed) or (name is not None and name not in obs):
        raise UserError(
            f"{path}: obs has no column {name or ' or '.join(tried)}; name the right one with {flag} "
            f"(there are {_few(list(map(str, obs.columns)) or ['none'])})"
        )
    return name


def _perturbed_genes(obs: pd.DataFrame, column: str, separator: str | None) -> list[tuple[str, ...] | None]:
    """Return the perturbed genes of each cell, None where the condition is missing."""
    labels = obs[column].astype(object)
    labels = [None if label is None or label != label or not str(label).strip() else str(label) for label in labels]
    if separator is None:
        has_plus = any("+" in label for label in set(labels) if label)
        separator = "_" if column == "perturbation" and not has_plus else "+"
    # scPerturb gives the number of perturbations, so a gene whose name has an underscore is not cut in two.
    single = obs["nperts"].to_numpy() == 1 if "nperts" in obs else np.zeros(len(obs), dtype=bool)
    parsed: dict[tuple[str, bool], tuple[str, ...]] = {}
    for label, alone in set(zip(labels, single.tolist(), strict=True)):
        if label is not None:
            whole = alone and not any(part.strip().lower() in CONTROL for part in label.split(separator))
            parsed[label, alone] = (label.strip(),) if whole else parse_condition(label, separator)
    return [parsed.get(key) for key in zip(labels, single.tolist(), strict=True)]


def _log_values(ingested: Ingested, obs: pd.DataFrame, notes: list[str]) -> csr_matrix:
    """Return [cells, genes] log2(1 + counts per 10,000); the total is `ncounts` where a file holds some genes only."""
    total = None
    if TOTAL in obs and ingested.values.exact:
        total = pd.to_numeric(obs[TOTAL], errors="coerce").to_numpy(dtype=np.float64)
        if not (np.isfinite(total) & (total > 0) & (total >= ingested.all_totals - 0.5)).all():
            total = None  # something else, or totals of other counts
        elif not np.allclose(total, ingested.all_totals):
            share = ingested.all_totals.sum() / total.sum()
            notes.append(f"cells are scaled by obs['{TOTAL}'], of which the file's genes hold {share:.1%}")
    parts, start = [], 0
    for counts in ingested.blocks():
        if total is None:
            parts.append(log_normalise(counts, TARGET_SUM))
            continue
        # One more column holds the counts of the genes that are not in the file, and is dropped afterwards.
        rest = total[start : start + counts.shape[0]] - np.asarray(counts.sum(1), dtype=np.float64).ravel()
        full = hstack([counts, csr_matrix(np.maximum(rest, 0)[:, None].astype(np.float32))], format="csr")
        parts.append(log_normalise(full, TARGET_SUM)[:, :-1])
        start += counts.shape[0]
    return vstack(parts, format="csr")


def _few(names: list[str]) -> str:
    """Write the first five names of a list."""
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
