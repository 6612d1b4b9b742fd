"""Figures of labelled cells: embeddings, samples and confidence, readable for 1 to 40 types and in print.

A type has the same number, colour and marker in every figure: types are numbered by size. Colours repeat after ten
types, then with another shade, marker or hatching; the numbers stand in the figures, so that nobody depends on colour.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from utils.evaluate.plots import COLOURS, MARKERS, _clean, _colour, _save

GREY = "#b8bec4"
HATCHES = ("", "////", "....", "xxxx")
UNASSIGNED = "unassigned"
SAMPLES_SHOWN = 30
EMBEDDED = 2_500
"""Of larger files, this many cells are drawn at random: more would take UMAP minutes."""
WIDTH = 9.0
"""Inches: the width of a figure, which fills the page."""


def short(name: str, length: int = 28) -> str:
    """Return a name in one line, cut to a length; `$`, which would start a formula, is escaped."""
    name = " ".join(str(name).split())
    return (name if len(name) <= length else name[: length - 1] + "…").replace("$", r"\$")


class Types:
    """The types of labelled cells, largest first, with what each looks like.

    Attributes
    ----------
    names : the types; `unassigned` comes last
    sizes : [types] number of cells
    codes : [cells] number of each cell's type, counted from 0; -1 for cells without a prediction
    """

    def __init__(self, labels):
        labels = pd.Series(np.asarray(labels, dtype=object))
        sizes = labels.value_counts()
        self.names = sorted(sizes.index, key=lambda name: (name == UNASSIGNED, -sizes[name], name))
        self.sizes = np.array([sizes[name] for name in self.names], dtype=int)
        self.codes = pd.Categorical(labels, categories=self.names).codes.astype(int)

    def __len__(self) -> int:
        return len(self.names)

    def colour(self, i: int):
        return GREY if self.names[i] == UNASSIGNED else _colour(i)

    def marker(self, i: int) -> str:
        return "." if self.names[i] == UNASSIGNED else MARKERS[i // 10 % len(MARKERS)]

    def hatch(self, i: int) -> str:
        return "" if self.names[i] == UNASSIGNED else HATCHES[i // 10 % len(HATCHES)]

    def number(self, i: int) -> str:
        """The number that stands for a type; `unassigned` has none."""
        return "–" if self.names[i] == UNASSIGNED else str(i + 1)


def _legend(figure: Figure, handles: list, at: float, columns: int) -> None:
    """Put a legend below the figure's panels, whose lower edge is at `at` inches."""
    height = figure.get_figheight()
    figure.legend(
        *(handles, [handle.get_label() for handle in handles]),
        loc="upper left",
        bbox_to_anchor=(0.02, at / height),
        ncols=columns,
        frameon=False,
        fontsize=8,
        handletextpad=0.5,
        columnspacing=1.2,
        borderaxespad=0,
    )


def umap_types(points: np.ndarray, rows: np.ndarray, types: Types, path) -> Path:
    """Draw two coordinates of cells, coloured by type, with the types' numbers on their cells.

    Parameters
    ----------
    points : [drawn cells, 2]
    rows : [drawn cells] their numbers among all cells
    types : of all cells
    path : PNG to write
    """
    codes = types.codes[rows]
    legend_columns = math.ceil(len(types) / 24)
    panel = 6.4 if legend_columns <= 1 else WIDTH - 0.3 - 2.0 * legend_columns
    panel = max(panel, 4.9)
    figure = Figure(figsize=(panel + 0.3 + 2.3 * legend_columns, max(panel, 0.2 * min(len(types), 24) + 0.6)))
    width, height = figure.get_size_inches()
    axes = figure.add_axes((0.3 / width, 0.3 / height, (panel - 0.4) / width, 1 - 0.4 / height))
    size = float(np.clip(6000 / max(len(rows), 1), 4, 40))
    for i in range(len(types)):
        cells = codes == i
        axes.scatter(*points[cells].T, s=size, color=types.colour(i), marker=types.marker(i), linewidths=0)
    axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    _clean(axes)
    spread = np.ptp(points, axis=0) / (panel, panel) if len(points) else np.ones(2)
    spread[spread == 0] = 1
    placed: list[np.ndarray] = []
    for i in range(len(types)):
        own = points[codes == i]
        if not len(own) or types.names[i] == UNASSIGNED:
            continue
        # At a cell of the type that is nearest to their median: the median itself may lie between two clusters.
        at = own[np.argmin(np.linalg.norm((own - np.median(own, axis=0)) / spread, axis=1))]
        is_wide = (np.median(np.abs(own - at), axis=0) / spread > 0.1).all()  # inches: the number fits inside
        above = 0 if is_wide else 8  # points, of which an inch has 72
        spot = at / spread + (0, above / 72)
        if any(np.linalg.norm(spot - other) < 0.26 for other in placed):
            continue  # it would overlap the number of a larger type; the legend has it
        placed.append(spot)
        axes.annotate(
            types.number(i),
            at,
            xytext=(0, above),
            textcoords="offset points",
            fontsize=9,
            fontweight="bold",
            ha="center",
            va="center",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            annotation_clip=False,
        )
    handles = [
        Line2D(
            *([], []),
            ls="none",
            marker=types.marker(i),
            color=types.colour(i),
            ms=6,
            label=f"{types.number(i)}  {short(types.names[i], 22)} ({types.sizes[i]:,})",
        )
        for i in range(len(types))
    ]
    figure.legend(
        *(handles, [handle.get_label() for handle in handles]),
        loc="center left",
        bbox_to_anchor=(panel / width, 0.5),
        ncols=legend_columns,
        frameon=False,
        fontsize=8,
        handletextpad=0.3,
        columnspacing=0.8,
        borderaxespad=0.3,
    )
    return _save(figure, path, bbox_inches="tight", pad_inches=0.1)


def umap_values(points: np.ndarray, values: dict[str, np.ndarray], path) -> Path:
    """Draw two coordinates of cells, coloured by numbers from 0 to 1, one panel each; cells without one are grey.

    Parameters
    ----------
    points : [drawn cells, 2]
    values : title → [drawn cells]
    path : PNG to write
    """
    figure = Figure(figsize=(WIDTH if len(values) > 1 else 5.2, 4.2), layout="constrained")
    size = float(np.clip(6000 / max(len(points), 1), 4, 40))
    for axes, (title, value) in zip(figure.subplots(1, len(values), squeeze=False)[0], values.items(), strict=True):
        value = np.asarray(value, dtype=float)
        known = np.isfinite(value)
        axes.scatter(*points[~known].T, s=size, color=GREY, linewidths=0)
        dots = axes.scatter(*points[known].T, s=size, c=value[known], cmap="cividis", vmin=0, vmax=1, linewidths=0)
        axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2", title=title)
        _clean(axes)
        figure.colorbar(dots, ax=axes, shrink=0.7, pad=0.02).outline.set_visible(False)
    return _save(figure, path)


def composition(samples, types: Types, path, name: str = "") -> Path:
    """Draw the share of each type in each sample as stacked bars, the largest sample on top.

    Parameters
    ----------
    samples : [cells] names of samples; cells with a missing one are left out
    types : of the same cells
    path : PNG to write
    name : what a sample is, for the axis
    """
    samples = pd.Series(np.asarray(samples, dtype=object))
    keep = samples.notna().to_numpy() & (types.codes >= 0)
    sizes = samples[keep].value_counts()
    shown = sorted(sizes.index, key=lambda sample: (-sizes[sample], str(sample)))[:SAMPLES_SHOWN]
    counts = np.array([np.bincount(types.codes[keep & (samples == s).to_numpy()], minlength=len(types)) for s in shown])
    share = counts / counts.sum(axis=1, keepdims=True)
    legend_columns = 3
    legend = 0.2 * math.ceil(len(types) / legend_columns) + 0.2
    bars = 0.34 * len(shown) + 0.3
    figure = Figure(figsize=(WIDTH, bars + 0.65 + legend))
    height = figure.get_figheight()
    axes = figure.add_axes((0.23, (legend + 0.55) / height, 0.74, bars / height))
    left = np.zeros(len(shown))
    for i in range(len(types)):
        axes.barh(
            *(range(len(shown)), share[:, i]),
            left=left,
            height=0.8,
            color=types.colour(i),
            hatch=types.hatch(i),
            edgecolor="white",
            lw=0.6,
        )
        for row in np.flatnonzero(share[:, i] > 0.035):
            box = {"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.75}
            where = (left[row] + share[row, i] / 2, row)
            axes.text(*where, types.number(i), ha="center", va="center", fontsize=7, bbox=box)
        left += share[:, i]
    axes.set_yticks(range(len(shown)), [f"{short(s, 22)} ({sizes[s]:,})" for s in shown], fontsize=8)
    axes.set(xlim=(0, 1), ylim=(len(shown) - 0.45, -0.55), xlabel="share of the cells")
    axes.set_title(short(name, 60), fontsize=9, loc="left")
    _clean(axes)
    handles = [
        Patch(
            facecolor=types.colour(i),
            hatch=types.hatch(i),
            edgecolor="white",
            label=f"{types.number(i)}  {short(types.names[i])}",
        )
        for i in range(len(types))
    ]
    _legend(figure, handles, legend - 0.05, legend_columns)
    return _save(figure, path, bbox_inches="tight", pad_inches=0.1)


def distributions(panels: dict[str, tuple[np.ndarray, float | None]], path) -> Path:
    """Draw histograms side by side: of numbers from 0 to 1, or of whole numbers (sizes of sets).

    Parameters
    ----------
    panels : name of the horizontal axis → values [cells], and where a line marks a threshold, or None
    path : PNG to write
    """
    figure = Figure(figsize=(3.0 * len(panels) if len(panels) > 1 else 4.5, 2.9), layout="constrained")
    for axes, (name, (values, threshold)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        if np.asarray(values).dtype.kind in "iu":
            sizes, counts = np.unique(values, return_counts=True)
            axes.bar(sizes, counts, color=COLOURS[0], width=0.8)
            axes.set_xlim(min(sizes, default=1) - 0.6, max(max(sizes, default=1), 3) + 0.6)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        else:
            axes.hist(values, bins=20, range=(0, 1), color=COLOURS[0], edgecolor="white", lw=0.4)
            axes.set_xlim(0, 1)
        if threshold is not None:
            axes.axvline(threshold, color=COLOURS[2], lw=1.2, ls="--", label=f"threshold {threshold:g}")
            # Above the panel, where no bar can stand.
            axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.02, 0.98), borderaxespad=0)
        axes.set(xlabel=name, ylabel="cells" if axes is figure.axes[0] else "")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        _clean(axes)
    return _save(figure, path)
