"""The page about labelled cells: what was done, figures, and what each column means, in one HTML file."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from utils.errors import UserError
from utils.evaluate import dot_plots, label_figures, plots
from utils.evaluate.conformal import types_of
from utils.evaluate.label_figures import UNASSIGNED, Types
from utils.evaluate.metrics import classification_scores, per_class_table
from utils.evaluate.report_page import bullets, code, figure, paragraph, table, words, write_report

SAMPLE_COLUMNS = ("donor", "sample", "batch", "donor_id", "sample_id")
"""Columns of obs that name a cell's sample, the first that exists is used."""
MEANINGS = {
    "predicted_cell_type": "The most probable type of the cell. “unassigned”: the cell has no counts in the model's "
    "features, or it is novel and --reject was given. Empty: the cell lacks the modality that the model reads.",
    "confidence": "The probability of that type, from 0 to 1. Where “What was done” calls it calibrated, about 8 of 10 "
    "cells with 0.8 are right, if they are like the validation cells. In a new donor or batch it is often too high.",
    "second_cell_type": "The type with the next highest probability.",
    "margin": "The difference of these two probabilities. Near 0, the model hesitates between the two types.",
    "prediction_set": "All types that the cell may have, most probable first. For cells like the "
    "validation cells, at least 90 % of the sets hold the true type, or the share that --coverage names. A set never "
    "holds a type that the model does not know.",
    "parent_cell_type": "The narrowest group of the model's hierarchy that holds every type of the prediction set: the "
    "type itself if the set holds one, “cell” if they share no group. It is right at least as often as the set. Use it "
    "where the exact type is in doubt.",
    "agreement": "The share of four classifiers that give the most probable type: the model itself and three simple "
    "ones stored with it: logistic regression, a small neural network, and logistic regression on principal components "
    "(in older folders the correlation with the mean of each type). 1: all agree; 0.25: none agrees with the model. "
    "Errors are more frequent where it is low.",
    "novelty": "How unlike the training cells the cell is: the share of validation cells that are more like them than "
    "this cell is, from 0 to 1. For well-known cells it is spread evenly, so 0.8 is no sign of a new type; many above "
    "0.95 are.",
    "is_novel": "Whether 1 - novelty is below --novel_below. At 0.05, about 5 % of well-known cells are called novel "
    "by mistake, more in a new batch.",
    "rna_measured": "Whether the model has read the cell's RNA. If not, it does not read RNA, or the cell has none.",
    "atac_measured": "Whether the model has read the cell's ATAC. If not, the model infers it or does without.",
    "labelled_by": "The model folder that has labelled the cell: the first of --model_path that reads what it has.",
}
"""Column of obs → what it means, for a reader who has only the page."""
OTHER_PLACES = {
    "X_{prefix}scmomer": "in obsm: the embedding of each cell, from which the UMAP above is drawn.",
    "X_{prefix}scmomer_rna": "in obsm: the RNA's part of the embedding, before the two modalities are joined: from the "
    "cell's own RNA if the model reads it, else predicted from its ATAC.",
    "X_{prefix}scmomer_atac": "in obsm: the ATAC's part: from the cell's own ATAC, else predicted from its RNA.",
    "{prefix}cell_type_probability": "in obsm: the probability of every type for each cell; each row sums to 1.",
}


@dataclass
class LabelledCells:
    """Cells with predicted types, as the page shows them.

    Attributes
    ----------
    columns : [cells] the predicted columns, named as in MEANINGS; only predicted_cell_type and confidence must be there
    embedding : [cells, latent_dim], NaN for cells that were not read; an array, or what gives one as `embedding[rows]`
    facts : what was done, name → text
    command : how to run it again; empty for none
    notes : warnings, a line each
    values, features : [cells, features] log values of the cells in one modality and their names, or None; a sparse
        matrix, or what gives one as `values[rows]`
    feature : gene or peak
    samples, sample_column : [cells] the sample of each cell and the column that names it, or None
    truth, label_column : [cells] true types, missing where unknown, and their column, or None
    known : types that the model knows
    novel_below : cells with 1 - novelty below this are novel
    prefix : put before each column in the file
    written : places of the file other than columns that the page explains; empty where no file is written
    explained : the genes that the model has used for each type, with the columns type and feature, or None
    explained_check : whether they can be believed, a line each
    """

    columns: pd.DataFrame
    embedding: object
    facts: dict[str, str]
    command: str = ""
    notes: list[str] = field(default_factory=list)
    values: object = None
    features: np.ndarray | None = None
    feature: str = "gene"
    samples: np.ndarray | None = None
    sample_column: str | None = None
    truth: np.ndarray | None = None
    label_column: str | None = None
    known: list[str] = field(default_factory=list)
    novel_below: float | None = None
    prefix: str = ""
    written: tuple[str, ...] = ()
    explained: pd.DataFrame | None = None
    explained_check: list[str] = field(default_factory=list)

    @property
    def scored(self) -> np.ndarray:
        """[cells] bool, whether the model has read the cell: its confidence is above 0."""
        return (self.columns["confidence"].to_numpy(float) > 0) & self.columns["predicted_cell_type"].notna().to_numpy()


def check_column(obs: pd.DataFrame, flag: str, column: str | None, path) -> None:
    """Raise UserError if a column of obs that a flag names does not exist."""
    if column is not None and column not in obs:
        known = ", ".join(map(str, obs.columns)) or "none"
        raise UserError(f"{flag} {column}: {path} has no such column in obs, only {known}")


def samples_of(obs: pd.DataFrame, column: str | None) -> tuple[str | None, np.ndarray | None]:
    """Return the column of samples, by default the first of `SAMPLE_COLUMNS` in obs, and its values, or None twice."""
    column = column or next((name for name in SAMPLE_COLUMNS if name in obs), None)
    return column, None if column is None else obs[column].to_numpy(object)


def write_label_report(cells: LabelledCells, path: str | Path, title: str, lead: str) -> Path:
    """Write the page.

    Parameters
    ----------
    cells : what it shows
    path : HTML file
    title, lead : heading and first paragraph

    Returns
    -------
    Path
    """
    types = Types(cells.columns["predicted_cell_type"])
    with TemporaryDirectory() as folder:
        sections = dict(_sections(cells, types, Path(folder)))
    return write_report(path, title, lead, sections)


def _sections(cells: LabelledCells, types: Types, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Headings and their parts, in the order of the page."""
    warned = [paragraph("Warnings:"), bullets(cells.notes)] if cells.notes else []
    command = [paragraph("Command:"), code(cells.command)] if cells.command else []
    yield "What was done", [words(cells.facts), *warned, *command]
    yield "Predicted types", [paragraph(_types_text(cells, types)), table(_type_rows(cells, types), "predicted type")]
    yield "The cells as the model sees them", _embedding(cells, types, folder)
    yield "Types in each sample", _composition(cells, types, folder)
    yield "Confidence, prediction sets and novelty", _confidence(cells, folder)
    if cells.explained is not None:
        yield f"{cells.feature.capitalize()}s that the model has used", _explained(cells, types, folder)
    yield (
        f"{cells.feature.capitalize()}s that differ between the predicted types in this file",
        _genes(cells, types, folder),
    )
    if cells.truth is not None:
        yield "Against the true labels", _truth(cells, folder)
    meanings = {cells.prefix + name: text for name, text in MEANINGS.items() if name in cells.columns}
    places = {key.format(prefix=cells.prefix): text for key, text in OTHER_PLACES.items()}
    meanings |= {key: text for key, text in places.items() if key in cells.written}
    yield "What each column means", [words(meanings, ("name", "meaning"))]


def _types_text(cells: LabelledCells, types: Types) -> str:
    n, missing = len(cells.columns), int((types.codes < 0).sum())
    named = sum(name != UNASSIGNED for name in types.names)
    none = int(types.sizes[types.names.index(UNASSIGNED)]) if UNASSIGNED in types.names else 0
    text = f"{n:,} cells, {named:,} predicted types, {none:,} cells unassigned."
    if missing:
        text += f" {missing:,} cells have no prediction, because they lack the modality that the model reads."
    return text + " The number of a type stands for it in all figures."


def _type_rows(cells: LabelledCells, types: Types) -> dict[str, dict]:
    columns, total, rows = cells.columns, max(int(types.sizes.sum()), 1), {}
    sizes = _set_sizes(cells)
    for i, name in enumerate(types.names):
        mine = types.codes == i
        row = {"no.": types.number(i), "cells": f"{types.sizes[i]:,}", "share": f"{types.sizes[i] / total:.1%}"}
        row["median confidence"] = float(columns["confidence"][mine & cells.scored].median())
        if sizes is not None:
            row["mean set size"] = float(sizes[mine & cells.scored].mean()) if (mine & cells.scored).any() else None
        if "is_novel" in columns:
            row["novel"] = f"{_is_novel(columns)[mine].mean():.1%}"
        rows[name] = row
    return rows


def _is_novel(columns: pd.DataFrame) -> np.ndarray:
    return columns["is_novel"].fillna(False).to_numpy(bool)


def _set_sizes(cells: LabelledCells) -> np.ndarray | None:
    """[cells] number of types in each set; 0 for cells that were not read."""
    if "prediction_set" not in cells.columns:
        return None
    sets = cells.columns["prediction_set"].astype(object)
    size_of = {text: len(types_of(text)) for text in sets.dropna().unique()}
    return sets.map(size_of).fillna(0).to_numpy().astype(int)


def _embedding(cells: LabelledCells, types: Types, folder: Path) -> list[str]:
    rows = np.random.default_rng(0).permutation(np.flatnonzero(cells.scored))[: label_figures.EMBEDDED]
    embedding = cells.embedding[rows]
    finite = np.isfinite(embedding).all(axis=1)
    rows, embedding = rows[finite], embedding[finite]
    if not len(rows):
        return [paragraph("The model has read no cell, so there is nothing to draw.")]
    points = plots.umap_coordinates(embedding, n_epochs=200)
    drawn = f"{len(rows):,} cells" + (", drawn at random" if len(rows) == label_figures.EMBEDDED else "")
    values = {"confidence": cells.columns["confidence"].to_numpy(float)[rows]}
    what = "confidence, bright where the model is sure"
    if "novelty" in cells.columns:
        values["novelty"] = cells.columns["novelty"].to_numpy(float)[rows]
        what += ", and by novelty, bright where the cells are unlike the training cells"
    text = (
        "Each point is a cell; cells that the model finds alike lie close together. Distances between separate "
        "clusters mean little. A cluster with low confidence or high novelty throughout may be a type that the "
        "model does not know."
    )
    if "labelled_by" in cells.columns:
        text += (
            " Several folders have labelled these cells, each with an embedding of its own, so cells of one type lie "
            "apart where different folders have labelled them."
        )
    return [
        paragraph(text),
        figure(
            label_figures.umap_types(points, rows, types, folder / "types.png"),
            f"The embedding by predicted type ({drawn}). In brackets: number of cells of the type.",
        ),
        figure(
            label_figures.umap_values(points, values, folder / "values.png"),
            f"The same cells by {what}. Grey: no value.",
        ),
    ]


def _composition(cells: LabelledCells, types: Types, folder: Path) -> list[str]:
    everything = np.full(len(cells.columns), "all cells", dtype=object)
    samples = everything if cells.samples is None else np.asarray(cells.samples, dtype=object)
    samples = np.array([None if pd.isna(name) else str(name) for name in samples], dtype=object)
    keep = (types.codes >= 0) & np.not_equal(samples, None)
    if not keep.any():
        return [paragraph("No cell has both a prediction and a sample.")]
    n = len(set(samples[keep]))
    if cells.samples is None:
        text = "The file names no samples, so there is one bar; --sample_column COLUMN draws one for each sample."
    else:
        text = f"One bar for each sample of the column {cells.sample_column} ({n:,}), with its number of cells."
        if n > label_figures.SAMPLES_SHOWN:
            text += f" The {label_figures.SAMPLES_SHOWN} largest are drawn."
    name = cells.sample_column or ""
    drawn = label_figures.composition(samples, types, folder / "composition.png", name)
    return [
        paragraph(text),
        figure(drawn, "Share of each predicted type. Numbers in the bars are those of the legend."),
    ]


def _confidence(cells: LabelledCells, folder: Path) -> list[str]:
    scored = cells.scored
    if not scored.any():
        return [paragraph("The model has read no cell, so there is no confidence to show.")]
    columns = cells.columns[scored]
    confidence = columns["confidence"].to_numpy(float)
    panels = {"confidence": (confidence, None)}
    lines = [
        f"Median confidence {np.median(confidence):.3f}; {(confidence < 0.5).mean():.1%} of the cells are below 0.5."
    ]
    sizes = _set_sizes(cells)
    if sizes is not None:
        sizes = sizes[scored]
        panels["types in the prediction set"] = (sizes, None)
        lines.append(
            f"{(sizes == 1).mean():.1%} of the prediction sets hold one type; the mean is {sizes.mean():.2f} types."
        )
        if cells.truth is not None:
            lines += _set_coverage(cells)
    if "agreement" in columns:
        agreement = columns["agreement"].to_numpy(float)
        lines.append(
            f"In {(agreement == 1).mean():.1%} of the cells the simple classifiers all give the model's type; in "
            f"{(agreement < 0.5).mean():.1%} the model stands alone."
        )
    if "novelty" in columns:
        novelty = columns["novelty"].to_numpy(float)
        threshold = None if cells.novel_below is None else 1 - cells.novel_below
        panels["novelty"] = (novelty[np.isfinite(novelty)], threshold)
        lines.append(
            f"{_is_novel(columns).mean():.1%} of the cells are novel. The novelty of cells like the validation cells "
            "is spread evenly from 0 to 1; a peak at the right shows cells that the model does not know, or another "
            "batch."
        )
    drawn = label_figures.distributions(panels, folder / "distributions.png")
    return [bullets(lines), figure(drawn, f"Number of cells at each value ({scored.sum():,} cells).")]


def _known_truth(cells: LabelledCells) -> np.ndarray:
    """[cells] bool, whether the true type of a cell is known and the model has read it or left it unassigned."""
    return pd.Series(cells.truth).notna().to_numpy() & cells.columns["predicted_cell_type"].notna().to_numpy()


def _set_coverage(cells: LabelledCells) -> list[str]:
    rows = np.flatnonzero(_known_truth(cells) & cells.scored & np.isin(cells.truth, cells.known))
    if not len(rows):
        return []
    sets = {text: types_of(text) for text in cells.columns["prediction_set"].iloc[rows].unique()}
    held = [
        cells.truth[row] in sets[text]
        for row, text in zip(rows, cells.columns["prediction_set"].iloc[rows], strict=True)
    ]
    return [
        f"{np.mean(held):.1%} of the sets hold the true type ({len(rows):,} cells with a label that the model knows)."
    ]


def _genes(cells: LabelledCells, types: Types, folder: Path) -> list[str]:
    what = cells.feature
    if cells.values is None:
        return [paragraph(f"The {what}s of the file were not compared, because several model folders read them.")]
    found = dot_plots.differing_genes(cells.values, cells.features, types)
    if found.empty:
        return [paragraph(f"There are no two types with at least {dot_plots.MIN_CELLS} cells, so none differ.")]
    n = sum(name.startswith("mean ") for name in found.columns)
    text = (
        f"For each type, at most 3 {what}s that its cells have more of, and more often, than those of the other types "
        "(difference of the mean values, times difference of the shares of cells above zero). Compared are the "
        f"{n} largest types with at least {dot_plots.MIN_CELLS} cells, at most {dot_plots.CELLS_PER_TYPE} "
        f"cells of each, in the model's {what}s. These are differences within this file, and no explanation of what "
        "the model looked at. Compare them with the markers that you know."
    )
    caption = f"Rows: {what}s, in groups by the type that they separate (right). Columns: predicted types."
    return [paragraph(text), *_dots(found, types, folder, what, "differing", caption)]


def _explained(cells: LabelledCells, types: Types, folder: Path) -> list[str]:
    what = cells.feature
    per_type = int(np.clip(dot_plots.GENES_PER_FIGURE // max(len(types), 1), 3, 5))  # one figure, up to 15 types
    check = [paragraph("The check:"), bullets(cells.explained_check)] if cells.explained_check else []
    if cells.explained.empty or cells.values is None:
        return [paragraph(f"No {what} was found that speaks for a type."), *check]
    text = (
        f"For each predicted type, the {per_type} {what}s that speak most for it: without them, the model would be "
        "less sure (gradient × input). A model may use what no biologist would, such as traces of the chemistry. The "
        f"check removes them from other cells of the type and, to compare, other {what}s of equal expression; if it "
        "fails, do not believe the list. The whole list is in <data>.explained.csv beside this page; “attribution” is "
        f"by how much the log-odds of the type would fall without the {what}."
    )
    found = dot_plots.listed_genes(cells.values, cells.features, types, cells.explained, per_type)
    caption = f"Rows: {what}s, in groups by the type that they speak for (right), the strongest first."
    return [paragraph(text), *check, *_dots(found, types, folder, what, "explained", caption)]


def _dots(found: pd.DataFrame, types: Types, folder: Path, what: str, name: str, caption: str) -> list[str]:
    """Dot plots with their captions, in parts where there are many genes."""
    drawn = dot_plots.dot_plots(found, types, folder, what, name)
    some = f" Part {{}} of {len(drawn)}." if len(drawn) > 1 else ""
    return [figure(part, caption + some.format(i)) for i, part in enumerate(drawn, 1)]


def _truth(cells: LabelledCells, folder: Path) -> list[str]:
    rows = np.flatnonzero(_known_truth(cells))
    truth = np.asarray(cells.truth, dtype=object)[rows]
    if not len(rows) or not np.isin(truth, cells.known).any():
        return [
            paragraph(
                f"No label in the column {cells.label_column} is a type of the model, so there is nothing to compare. "
                f"The model's types: {', '.join(cells.known[:40])}."
            )
        ]
    predicted = cells.columns["predicted_cell_type"].to_numpy(object)[rows]
    scores = classification_scores(truth, predicted)
    unknown = sorted(set(truth) - set(cells.known))
    text = (
        f"{len(rows):,} cells have a label in the column {cells.label_column}. Accuracy {scores['accuracy']:.3f}, "
        f"macro F1 {scores['macro_f1']:.3f}. Unassigned cells count as wrong."
    )
    if unknown:
        text += f" Labels that the model does not know, and never predicts: {', '.join(unknown)}."
    per_type = per_class_table(truth, predicted)
    per_type = {
        name: {"true cells": f"{row.support:,}", "precision": row.precision, "recall": row.recall, "F1": row.f1}
        for name, row in zip(per_type.index, per_type.itertuples(), strict=True)
        if name != UNASSIGNED
    }
    drawn = plots.confusion(truth, predicted, folder / "confusion.png")
    return [
        paragraph(text),
        table(per_type, "type"),
        figure(drawn, "Rows: true types. Columns: predicted types. Numbers: cells. Colour: share of the true type."),
    ]
