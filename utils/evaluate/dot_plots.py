"""Dot plots of genes by type of labelled cells: genes that differ between the types, or those that a list names."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.evaluate.label_figures import UNASSIGNED, Types, short
from utils.evaluate.markers import marker_scores
from utils.evaluate.plots import _save

GENES_PER_FIGURE = 45
"""Rows of one dot plot; with more, it would not fit on a printed page."""
CELLS_PER_TYPE = 500
"""Of larger types, this many cells are drawn for the comparison of genes."""
MIN_CELLS = 5
"""Types with fewer cells are left out of the comparison of genes."""


def differing_genes(values, features, types: Types, per_type: int = 3, most_types: int = 40) -> pd.DataFrame:
    """Genes whose log values in one type lie highest above those of the other types.

    The score is that of `utils.evaluate.markers`. At most 500 cells of each type are drawn. A gene is listed once, for
    the largest type that it separates.

    Parameters
    ----------
    values : sparse [cells, features]
    features : [features] names
    types : of the same cells
    per_type : genes per type
    most_types : the largest types that are compared

    Returns
    -------
    DataFrame [genes, type · gene · difference], then for each compared type `mean 0`, … and `share 0`, …: its mean, and
    the share of its cells with a value above zero, by number of the type. Without two types to compare, no rows.
    """
    compared, means, shares = _by_type(values, len(features), types, MIN_CELLS, most_types)
    if len(compared) < 2:
        return pd.DataFrame(columns=["type", "gene", "difference"])
    above, score = marker_scores(means, shares)
    taken, found = np.zeros(len(features), dtype=bool), []
    for at, i in enumerate(compared):
        ranked = np.argsort(-np.where(taken, -np.inf, score[at]), kind="stable")[:per_type]
        for gene in ranked[above[at, ranked] > 0]:
            if taken[gene]:
                continue
            taken[gene] = True
            row = {"type": i, "gene": str(features[gene]), "difference": above[at, gene]}
            found.append(row | _columns(gene, compared, means, shares))
    return pd.DataFrame(found, columns=None if found else ["type", "gene", "difference"])


def listed_genes(values, features, types: Types, listed: pd.DataFrame, per_type: int, most_types: int = 40):
    """The first genes that a list names for each type, as `differing_genes` returns them.

    Parameters
    ----------
    values, features, types, most_types : as above
    listed : with the columns type (a name) and feature, the most important first
    per_type : genes per type
    """
    compared, means, shares = _by_type(values, len(features), types, 1, most_types)
    number, found = pd.Index(features), []
    for i in compared:
        for gene in number.get_indexer(listed.loc[listed["type"] == types.names[i], "feature"][:per_type]):
            row = {"type": i, "gene": str(features[gene])}
            found.append(row | _columns(gene, compared, means, shares))
    return pd.DataFrame(found, columns=None if found else ["type", "gene"])


def _by_type(values, n: int, types: Types, least: int, most_types: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Numbers of the largest types with enough cells; [types, n features] mean value, and share of cells above zero."""
    compared = [i for i, n in enumerate(types.sizes) if n >= least and types.names[i] != UNASSIGNED][:most_types]
    rng, drawn = np.random.default_rng(0), []
    for i in compared:
        rows = np.flatnonzero(types.codes == i)
        drawn.append(np.sort(rng.choice(rows, min(len(rows), CELLS_PER_TYPE), replace=False)))
    rows = np.sort(np.concatenate(drawn)) if drawn else np.array([], dtype=int)
    read = values[rows] if drawn else None  # at once: from a file, one pass is enough for all types
    means, shares = np.zeros((2, len(compared), n))
    for at, mine in enumerate(drawn):
        some = read[np.searchsorted(rows, mine)]
        means[at] = np.asarray(some.mean(axis=0)).ravel()
        shares[at] = np.asarray((some > 0).mean(axis=0)).ravel()
    return compared, means, shares


def _columns(gene: int, compared: list[int], means: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    """A gene's means and shares, by number of the type."""
    columns = {f"mean {other}": means[k, gene] for k, other in enumerate(compared)}
    return columns | {f"share {other}": shares[k, gene] for k, other in enumerate(compared)}


def dot_plots(genes: pd.DataFrame, types: Types, folder, what: str = "gene", name: str = "dots") -> list[Path]:
    """Draw genes of one of the tables above: rows are genes, columns are types, one figure per 45 genes.

    Parameters
    ----------
    genes, types : as above
    folder : for the PNG files
    what : gene or peak, for the legend
    name : beginning of the files' names
    """
    compared = [int(name.removeprefix("mean ")) for name in genes.columns if name.startswith("mean ")]
    step = GENES_PER_FIGURE
    return [
        _dot_plot(genes.iloc[start : start + step], compared, types, Path(folder) / f"{name}_{start}.png", what)
        for start in range(0, len(genes), step)
    ]


def _dot_plot(genes: pd.DataFrame, compared: list[int], types: Types, path: Path, what: str) -> Path:
    mean = genes[[f"mean {i}" for i in compared]].to_numpy(float)
    share = genes[[f"share {i}" for i in compared]].to_numpy(float)
    n_rows, n_columns = mean.shape
    column, row = float(np.clip(6.0 / n_columns, 0.17, 0.36)), 0.185
    figure = Figure(figsize=(column * n_columns, row * n_rows))
    axes = figure.add_axes((0, 0, 1, 1))
    y, x = np.mgrid[:n_rows, :n_columns]
    largest = (min(column, row) * 72 * 0.92) ** 2
    scaled = mean / np.maximum(mean.max(axis=1, keepdims=True), 1e-12)
    dots = axes.scatter(
        *(x.ravel(), y.ravel()),
        s=share.ravel() * largest,
        c=scaled.ravel(),
        cmap="cividis_r",
        vmin=0,
        vmax=1,
        edgecolors="0.35",
        linewidths=0.3,
    )
    axes.set(xlim=(-0.6, n_columns - 0.4), ylim=(n_rows - 0.4, -0.6))
    axes.set_yticks(range(n_rows), [short(gene, 26) for gene in genes["gene"]], fontsize=7)
    axes.set_xticks(range(n_columns), [f"{types.number(i)}  {short(types.names[i])}" for i in compared], fontsize=7)
    axes.tick_params(axis="x", rotation=90, top=True, bottom=False, labeltop=True, labelbottom=False)
    axes.tick_params(length=0)
    axes.spines[:].set_color("0.8")
    of_type = genes["type"].to_numpy()
    for first in np.flatnonzero(np.r_[True, of_type[1:] != of_type[:-1]]):
        last = first + (of_type == of_type[first]).sum() - 1
        if first:
            axes.axhline(first - 0.5, color="0.8", lw=0.6)
        text = f"{types.number(of_type[first])}  {short(types.names[of_type[first]])}"
        axes.text(n_columns - 0.3, (first + last) / 2, text, fontsize=7, va="center", clip_on=False)
    width, height = figure.get_size_inches()
    bar = figure.add_axes((0, -0.32 / height, min(1.6, width) / width, 0.1 / height))
    figure.colorbar(dots, cax=bar, orientation="horizontal").outline.set_visible(False)
    bar.tick_params(labelsize=7, length=2)
    bar.set_xlabel(f"mean value / highest mean of the {what}", fontsize=7, loc="left")
    sizes = [
        Line2D([], [], ls="none", marker="o", color="0.5", ms=math.sqrt(part * largest), label=f"{part:.0%}")
        for part in (0.25, 0.5, 1)
    ]
    figure.legend(
        *(sizes, [size.get_label() for size in sizes]),
        loc="upper left",
        bbox_to_anchor=(2.1 / width, -0.16 / height),
        ncols=3,
        frameon=False,
        fontsize=7,
        title="share of cells above zero",
        title_fontsize=7,
        borderaxespad=0,
        columnspacing=0.8,
    )
    return _save(figure, path, bbox_inches="tight", pad_inches=0.1)
