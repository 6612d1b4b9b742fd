"""Draw figures by `matplotlib.figure.Figure`: without pyplot, no backend and no global state is involved."""

import math
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from utils.errors import UserError
from utils.evaluate.metrics import confusion_counts
from utils.progress import epoch_name

DPI = 150
COLOURS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
"""Colours that people with common colour-vision deficiencies can distinguish (Petroff 2021, arXiv:2107.02270)."""
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
MAX_UMAP_CELLS = 20_000
"""Of larger data sets, this many cells are drawn."""


def _save(figure: Figure, path, **how) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, **how)
    return path


def _short(name: str) -> str:
    return (name if len(name) <= 40 else name[:39] + "…").replace("$", r"\$")  # $ would start a formula


def _colour(i: int) -> tuple[float, float, float]:
    """Return the colour of the i-th class; after ten, colours repeat darker, then paler, with other markers."""
    red_green_blue = np.array(to_rgb(COLOURS[i % 10]))
    return tuple((red_green_blue, 0.55 * red_green_blue, 0.5 + 0.5 * red_green_blue)[i // 10 % 3])


def _readable(metric: str) -> str:
    """Return the name of a metric as it is written in text: `macro_f1` becomes `macro F1`."""
    return metric.replace("_", " ").replace("f1", "F1").replace("auroc", "AUROC").replace(" ap", " average precision")


def _clean(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def loss_curve(
    records: list[dict], path, title: str, loss_name: str = "loss", kept: float | None = None, keep: str = "best"
) -> Path:
    """Draw training and validation loss against the epoch, with the learning rate below.

    Parameters
    ----------
    records : list of dict
        The lines of `metrics.jsonl`, with `epoch` (float), `phase` ("train" or "val"), `loss`, and in training lines
        `learning_rate`. Other keys, and lines without a finite loss, are ignored.
    path : path-like
        PNG to write; its folder is made.
    title, loss_name : str
        Title of the figure and label of the loss axis.
    kept : float, optional
        The epoch whose model was saved; it gets a mark.
    keep : str
        Why that epoch was saved: "best" or "last".

    Returns
    -------
    Path

    Raises
    ------
    UserError
        No line has a finite loss.
    """
    table = pd.DataFrame(records).reindex(columns=["epoch", "phase", "loss", "learning_rate"])
    numbers = ["epoch", "loss", "learning_rate"]
    table[numbers] = table[numbers].apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan)
    table = table.dropna(subset=["epoch", "loss"]).sort_values("epoch", kind="stable")
    train, val = table[table.phase == "train"], table[table.phase == "val"]
    if train.empty and val.empty:
        raise UserError(f"There is no loss to draw in {path}: train for at least one step first.")
    rate = train.dropna(subset=["learning_rate"])

    figure = Figure(figsize=(7, 4.6 if len(rate) else 3.8), layout="constrained")
    panels = figure.subplots(
        2 if len(rate) else 1, sharex=True, squeeze=False, height_ratios=[4, 1][: 1 + (len(rate) > 0)]
    )
    axes = panels[0, 0]
    # Up to 40 points are marked by dots; more would merge into a thick line.
    for part, colour, name in ((train, COLOURS[0], "training"), (val, COLOURS[6], "validation")):
        if len(part):
            marker = "o" if len(part) <= 40 else None
            axes.plot(part.epoch, part.loss, color=colour, label=name, lw=1.6, marker=marker, ms=3.5)
    chosen_by, colour, name = (val, COLOURS[6], "validation") if len(val) else (train, COLOURS[0], "training")
    for mark in chosen_by[chosen_by.epoch == kept].itertuples():
        label = f"saved model ({keep}): {epoch_name(mark.epoch)}, {name} loss {mark.loss:.4g}"
        axes.plot(mark.epoch, mark.loss, "*", ms=13, color=colour, mec="black", mew=0.8, ls="none", label=label)
        axes.axvline(mark.epoch, color="0.6", lw=0.8, ls=":", zorder=0)
    axes.set(ylabel=loss_name, title=title, xlim=(0, math.ceil(table.epoch.max()) * 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    if len(rate):
        panels[1, 0].plot(rate.epoch, rate.learning_rate, color="0.35", lw=1.2)
        panels[1, 0].set(ylabel="learning\nrate", ylim=(0, None))
        panels[1, 0].ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    for panel in panels[:, 0]:
        _clean(panel)
        panel.grid(axis="y", color="0.92", lw=0.8)
        panel.set_axisbelow(True)
    panels[-1, 0].set_xlabel("epoch")
    figure.align_ylabels()
    return _save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------------------------------


def umap_coordinates(embedding, seed: int = 0, n_neighbors: int = 15, n_epochs: int | None = None) -> np.ndarray:
    """Return two UMAP coordinates for each cell (McInnes et al. 2018); the same seed gives the same coordinates.

    Parameters
    ----------
    embedding : array-like of float [cells, dimensions]
    seed, n_neighbors : int
    n_epochs : int, optional
        Rounds of optimisation: fewer are faster.

    Returns
    -------
    ndarray of float32 [cells, 2]
        With fewer than ten cells, for which neighbourhoods are meaningless: the first two principal components.
    """
    embedding = np.asarray(embedding, dtype=np.float32)
    if len(embedding) < 10:
        centred = embedding - embedding.mean(axis=0)
        left, size, _ = np.linalg.svd(centred, full_matrices=False)
        coordinates = np.zeros((len(embedding), 2), dtype=np.float32)
        coordinates[:, : min(2, len(size))] = (left * size)[:, :2]
        return coordinates
    from umap import UMAP  # here, because the import takes seconds (it compiles)

    n_neighbors = min(n_neighbors, len(embedding) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that few or duplicate cells get a random start
        # One thread: with several, the result would depend on the order in which they update the coordinates.
        umap = UMAP(n_neighbors=n_neighbors, n_epochs=n_epochs, min_dist=0.3, random_state=seed, n_jobs=1)
        return umap.fit_transform(embedding)


def umap_true_predicted(embedding, true, predicted, path, seed: int = 0) -> Path:
    """Draw the UMAP of an embedding, coloured by true and by predicted cell type.

    In the predicted panel, correct cells are faded. Wrong ones are drawn over them, opaque and with a dark edge.

    Parameters
    ----------
    embedding : array-like of float [cells, dimensions]
        Of more than 20,000 cells, a random 20,000 are drawn.
    true : array-like of labels [cells], or None
        Without true labels, only the predicted panel is drawn.
    predicted : array-like of labels [cells]
    path : path-like
        PNG to write; its folder is made.
    seed : int

    Returns
    -------
    Path
    """
    embedding, predicted = np.asarray(embedding), np.asarray(predicted).astype(str)
    true = None if true is None else np.asarray(true).astype(str)
    if len(embedding) != len(predicted) or (true is not None and len(true) != len(predicted)):
        raise ValueError("embedding, true and predicted must have one row for each cell")
    if len(embedding) == 0:
        raise UserError(f"There are no cells to draw in {path}: give a file with cells.")
    # Colours are assigned by the size of the true classes, so that all models on one data set get the same colours.
    labels = predicted if true is None else true
    sizes = Counter(labels.tolist())
    classes = sorted({*sizes, *predicted.tolist()}, key=lambda name: (-sizes[name], name))
    rng = np.random.default_rng(seed)
    # Shuffled, so that no class covers others merely because its cells come last in the file.
    rows = rng.permutation(len(embedding))[:MAX_UMAP_CELLS]
    points = umap_coordinates(embedding[rows], seed)
    predicted, true = predicted[rows], None if true is None else true[rows]
    style = {name: (_colour(i), MARKERS[i // 10 % len(MARKERS)]) for i, name in enumerate(classes)}
    size = float(np.clip(6000 / len(rows), 3, 30))

    n_panels = 1 if true is None else 2
    legend_columns = math.ceil(len(classes) / 22)
    widest = max(len(name) for name in classes)
    legend_width = legend_columns * (0.45 + 0.075 * min(widest, 40))
    figure = Figure(figsize=(4.6 * n_panels + legend_width, 4.9), layout="constrained")
    panels = figure.subplots(1, n_panels, squeeze=False)[0]

    def scatter(axes, labels, chosen, **how):
        for name in classes:
            cells = chosen & (labels == name)
            colour, marker = style[name]
            axes.scatter(*points[cells].T, color=colour, marker=marker, rasterized=True, **how)

    everything = np.ones(len(rows), dtype=bool)
    if true is None:
        scatter(panels[0], predicted, everything, s=size, linewidths=0)
        panels[0].set_title(f"predicted cell type ({len(rows):,} cells)")
    else:
        wrong = true != predicted
        scatter(panels[0], true, everything, s=size, linewidths=0)
        panels[0].set_title(f"true cell type ({len(rows):,} cells)")
        scatter(panels[1], predicted, ~wrong, s=size, linewidths=0, alpha=0.35)
        scatter(panels[1], predicted, wrong, s=1.6 * size + 4, linewidths=0.5, edgecolors="black")
        panels[1].set_title(f"predicted cell type ({wrong.sum():,} wrong, {wrong.mean():.1%}: black edge)")
    for axes in panels:
        axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
        _clean(axes)
    keys = [
        Line2D([], [], ls="none", marker=marker, color=colour, ms=6, label=_short(name))
        for name, (colour, marker) in style.items()
    ]
    figure.legend(handles=keys, loc="outside right center", ncols=legend_columns, frameon=False, fontsize=8)
    return _save(figure, path)


def confusion(true, predicted, path) -> Path:
    """Draw the confusion matrix as a heat map; a row shows the predictions for one true class and sums to 1.

    Rows are the true classes, largest first. Columns are the same classes in the same order, followed by classes that
    were only predicted. With up to 20 classes, each field shows its number of cells.

    Parameters
    ----------
    true, predicted : array-like of labels [cells]
    path : path-like
        PNG to write; its folder is made.

    Returns
    -------
    Path
    """
    counts, classes = confusion_counts(true, predicted)
    order = sorted(range(len(classes)), key=lambda i: (-counts[i].sum(), -counts[:, i].sum(), classes[i]))
    counts, classes = counts[np.ix_(order, order)], [classes[i] for i in order]
    counts = counts[counts.sum(axis=1) > 0]
    share = counts / counts.sum(axis=1, keepdims=True)
    n_rows, n_columns = counts.shape

    # The axes fill the whole figure. Saving it with a tight frame adds the space that the labels need.
    shows_counts = n_columns <= 20
    cell = max(0.48, min(0.8, 3.4 / n_columns)) if shows_counts else max(0.16, 9 / n_columns)
    width, height = cell * n_columns, cell * n_rows
    font = min(8, 40 * cell)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    rows = [f"{_short(name)} ({n:,})" for name, n in zip(classes, counts.sum(axis=1), strict=False)]
    columns = [f"{_short(name)} ({n:,})" for name, n in zip(classes, counts.sum(axis=0), strict=True)]
    axes.set_yticks(range(n_rows), rows, fontsize=font)
    axes.set_xticks(range(n_columns), columns, fontsize=font, rotation=90)
    axes.set(ylabel="true cell type (cells)", xlabel="predicted cell type (cells)")
    correct = int(np.trace(counts))
    axes.set_title(f"{correct:,} of {counts.sum():,} cells correct ({correct / counts.sum():.1%})", fontsize=10)
    if shows_counts:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[row, column] > 0.55 else "black"
            n = counts[row, column]
            text = f"{n}" if n < 10_000 else f"{n / 1000:.0f}k"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    # Thin lines between the fields help the eye to follow a row to its name.
    axes.set_xticks(np.arange(n_columns - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(n_rows - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="0.9", lw=0.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_color("0.7")
    # The colour bar: at the right, 0.15 inches wide, 1.6 to 3 inches high.
    bar_height = min(max(1.6, height), 3)
    where = (1 + 0.2 / width, 0.5 - bar_height / height / 2, 0.15 / width, bar_height / height)
    bar = figure.colorbar(image, cax=figure.add_axes(where), label="fraction of the true class")
    bar.outline.set_visible(False)
    return _save(figure, path, bbox_inches="tight", pad_inches=0.12)


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons
# ---------------------------------------------------------------------------------------------------------------------


def bars(table: dict[str, dict[str, float]], path, title: str, intervals: dict | None = None) -> Path:
    """Draw grouped bars: one group per metric, one colour per model.

    Parameters
    ----------
    table : dict
        Name of the model → metric → value. Missing and NaN values leave a gap.
    path : path-like
        PNG to write; its folder is made.
    title : str
    intervals : dict, optional
        Name of the model → metric → (low, high), drawn as error bars.

    Returns
    -------
    Path
    """
    metrics = list(dict.fromkeys(metric for scores in table.values() for metric in scores))
    if not metrics:
        raise ValueError("the table has no metric")
    intervals = intervals or {}
    width = 0.84 / len(table)  # of a bar; the centres of groups lie 1 apart
    inches = max(0.42, 0.9 / len(table))  # width of a bar: room for a value of four characters above it
    figure = Figure(
        figsize=(max(5.0, inches / 0.84 * len(table) * len(metrics) + 1.0), 3.6 + 0.22 * math.ceil(len(table) / 2)),
        layout="constrained",
    )
    axes = figure.subplots()
    for i, (name, scores) in enumerate(table.items()):
        at = np.arange(len(metrics)) + (i - (len(table) - 1) / 2) * width
        values = np.array([scores.get(metric, np.nan) for metric in metrics], dtype=float)
        # After ten models, colours repeat with hatching.
        hatch = (None, "//", "..", "xx")[i // 10 % 4]
        axes.bar(at, values, 0.92 * width, color=COLOURS[i % 10], hatch=hatch, edgecolor="white", lw=0.5, label=name)
        for x, value, metric in zip(at, values, metrics, strict=True):
            if not np.isfinite(value):
                continue
            low, high = intervals.get(name, {}).get(metric, (value, value))
            if high > low:
                axes.plot([x, x], [low, high], color="black", lw=1.1, solid_capstyle="butt")
            top = max(value, high, 0)
            axes.annotate(f"{value:.2f}", (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=7.5)
    axes.set_xticks(range(len(metrics)), [_readable(metric) for metric in metrics])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.5, len(metrics) - 0.5)
    axes.margins(y=0.08)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="0.92", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title)
    _clean(axes)
    figure.legend(
        loc="outside lower center", ncols=min(len(table), 2 if len(table) < 9 else 3), frameon=False, fontsize=9
    )
    return _save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------------------


def _rounded(n: float) -> str:
    """Return a large number in short form: 1,154,464 as 1.15M."""
    unit, size = next(((unit, size) for unit, size in (("M", 1e6), ("k", 1e3)) if n >= size), ("", 1))
    return f"{n / size:.3g}{unit}"


def scaling(table: pd.DataFrame, machine: str, path) -> Path:
    """Draw seconds per cell against size on logarithmic axes, one panel per curve.

    Parameters
    ----------
    table : columns `curve`, `n` and `seconds_per_cell`
    machine : description of the machine, written below the panels
    path : PNG to write
    """
    groups = list(table.groupby("curve", sort=False))
    figure = Figure(figsize=(2.7 * len(groups), 3.0), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (curve, points) in zip(panels, groups, strict=True):
        n, seconds = points["n"].to_numpy(float), points["seconds_per_cell"].to_numpy(float)
        axes.loglog(n, seconds, marker="o", color=COLOURS[0])
        if seconds[-1] > 2 * seconds[0]:
            axes.loglog(n, seconds[-1] * n / n[-1], linestyle=":", color=COLOURS[3])  # proportional growth
        low, high = seconds.min(), seconds.max()
        axes.set_ylim(low / 2, high * 2)
        axes.set_xticks(n, [_rounded(x) for x in n], fontsize=7, rotation=45)
        axes.minorticks_off()
        axes.set_yticks([])
        for x, y in zip(n, seconds, strict=True):
            axes.annotate(f"{y:.2g}", (x, y), xytext=(-3, 5), textcoords="offset points", fontsize=7, ha="right")
        axes.margins(x=0.15)
        axes.set_xlabel(curve)
        axes.set_ylabel("seconds per cell" if axes is panels[0] else "")
        _clean(axes)
    figure.supxlabel(f"dotted: time proportional to size · {machine}", fontsize=7)
    return _save(figure, path)
