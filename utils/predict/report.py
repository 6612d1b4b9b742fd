"""The page about a file with predicted cell types: reads what `label_cells` has written."""

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from models.shapes import FEATURES
from utils import __version__
from utils.cells.labels import clean_labels
from utils.cells.preprocessed import Cells, RawFile
from utils.evaluate.across import coverage_text
from utils.evaluate.label_report import MEANINGS, LabelledCells, check_column, samples_of, write_label_report
from utils.files.write import whole_file
from utils.predict.annotate import Names, Query
from utils.predict.infer import Prediction
from utils.train.config import LabelConfig
from utils.train.model_folder import SavedModel

LEAD = (
    "A model has given each cell one of the types that it was trained on. This page shows what it found, how sure it "
    "is, and what each column of the result means. It is one file: it can be kept beside the result or sent."
)

EVALUATION_LEAD = (
    "A model has given each of these cells one of the types that it was trained on, and their true types are known. "
    "This page shows how often it was right, how sure it was, and what each column means. The scores beside baselines "
    "stand in the evaluation's .json and .csv files."
)


def report_path(path: str | Path) -> Path:
    """The page beside a labelled file: x.predicted.h5ad and x.h5ad both have x.report.html."""
    path = Path(path)
    return path.with_name(f"{path.stem.removesuffix('.predicted')}.report.html")


def check_columns(file: RawFile, sample_column: str | None, label_column: str | None) -> None:
    """Refuse columns that the file does not have, before anything is computed.

    Raises
    ------
    UserError
        The message names the flag and the column.
    """
    check_column(file.obs, "--sample_column", sample_column, file.path)
    check_column(file.obs, "--label_column", label_column, file.path)


def facts_of(saved: SavedModel, entry: dict) -> dict[str, str]:
    """What is known about a model and its predictions, name → text.

    Parameters
    ----------
    saved : the model
    entry : as in uns of the labelled file
    """
    reads = " and ".join(str(name).upper() for name in entry["reads"])
    facts = {
        "model": f"{entry['model']}; it reads {reads} and knows {len(saved.outputs)} types",
        "hash of the model folder": str(entry["model_hash"]),
        "types that the model knows": ", ".join(saved.outputs),
    }
    for name, feature in FEATURES.items():
        if f"{name}_coverage" in entry:
            facts[f"{feature} of the model in the file"] = (
                f"{entry[f'{name}_coverage']:.1%} of the model's {feature}; they hold "
                f"{entry[f'{name}_count_coverage']:.1%} of the file's counts"
            )
    facts["confidence"] = str(entry["calibration"])
    if sets := entry.get("prediction_sets"):
        kind = "cells of batches left out" if "across" in saved.fitted else "validation cells"
        facts["prediction sets"] = (
            f"at least {sets['coverage']:.0%} of the sets hold the true type, for cells like the "
            f"{sets['n_cells']:,} {kind} that set the threshold"
        )
    if "across" in saved.fitted:
        facts["within and across batches"] = coverage_text(saved.fitted["across"])
    if novelty := entry.get("novelty"):
        facts["novelty"] = (
            f"by the {novelty['method']}, against {novelty['n_cells']:,} validation cells; novel below a p-value of "
            f"{novelty['novel_below']:g}" + (", such cells are unassigned" if novelty["rejected"] else "")
        )
    return facts | {"scMomer": f"version {entry['scmomer_version']}, {entry['date']}"}


def labelled_cells(
    labelled: ad.AnnData | mudata.MuData,
    query: Query,
    saved: SavedModel,
    names: Names,
    sample_column: str | None = None,
    label_column: str | None = None,
) -> LabelledCells:
    """What the page shows of a file with predicted cell types.

    Parameters
    ----------
    labelled, query : as `label_query` returns them
    saved, names : the model, and the names that it has written
    sample_column, label_column : of obs: the sample of each cell, by default a column of that name; its true type
    """
    cells, entry = labelled.obs_names, labelled.uns[names.provenance]
    obs = query.file.obs.reindex(cells)
    sample_column, samples = samples_of(obs, sample_column)
    truth = None if label_column is None else clean_labels(obs[label_column]).to_numpy(object)
    columns = labelled.obs[[names.prefix + column for column in names.columns if column in MEANINGS]]
    modality = saved.model_config.inputs[0]
    row = query.barcodes.get_indexer(cells)
    values = query.dataset.values[modality]
    if not (len(row) == values.shape[0] and (row == np.arange(len(row))).all()):  # cells that the model does not read
        keep = np.flatnonzero(row >= 0)
        placed = values[row[keep]].tocoo()
        values = type(values)((placed.data, (keep[placed.row], placed.col)), shape=(len(row), values.shape[1]))
    name = query.file.path.name
    return LabelledCells(
        columns.rename(columns=lambda column: column.removeprefix(names.prefix)),
        np.asarray(labelled.obsm[names.embedding]),
        {"file": f"{name}, {len(cells):,} cells"} | facts_of(saved, entry),
        str(entry["command"]),
        [*map(str, entry["warnings"]), *map(str, entry.get("left_out", ()))],
        values,
        saved.features[modality],
        FEATURES[modality].removesuffix("s"),
        samples,
        sample_column,
        truth,
        label_column,
        list(saved.outputs),
        entry["novelty"]["novel_below"] if "novelty" in entry else None,
        names.prefix,
        (names.embedding, *map(names.latent, names.latents), names.prefix + names.table),
        **_explained(entry, modality),
    )


def _explained(entry: dict, modality: str) -> dict:
    """What the page shows of an explanation, from the entry of uns; nothing if there is none."""
    if "explanation" not in entry:
        return {}
    table = entry["explanation"]["features"]
    lines = [*map(str, entry["explanation"]["lines"])]
    return {"explained": table[table["modality"] == modality], "explained_check": lines}


def evaluated_cells(
    saved: SavedModel,
    cells: Cells,
    rows: np.ndarray,
    prediction: Prediction,
    choices: LabelConfig,
    truth: np.ndarray,
    label_column: str,
    sample_column: str | None = None,
) -> LabelledCells:
    """What the page shows of an evaluation.

    Parameters
    ----------
    saved, cells, rows : the model, the preprocessed cells, and the numbers of those that are scored
    prediction, choices : of the scored cells
    truth, label_column : [rows] their true types, and the column that holds them
    sample_column : of obs, by default a column of that name
    """
    entry = saved.task.provenance(saved.fitted, choices) | {
        "reads": saved.model_config.inputs,
        "model": saved.name,
        "model_hash": saved.hash,
        "scmomer_version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    columns = pd.DataFrame({name: prediction[name] for name in saved.task.columns_of(saved.fitted)})
    modality = saved.model_config.inputs[0]
    sample_column, samples = samples_of(cells.obs.iloc[rows], sample_column)
    return LabelledCells(
        columns,
        prediction.embedding,
        {"file": f"{cells.path.name}, {len(rows):,} scored cells with true labels"} | facts_of(saved, entry),
        shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        [*saved.task.doubts(saved.fitted), *saved.task.left_out(saved.fitted)],
        csr_matrix(cells.values[modality][rows]),
        cells.features[modality],
        FEATURES[modality].removesuffix("s"),
        samples,
        sample_column,
        truth,
        label_column,
        list(saved.outputs),
        entry["novelty"]["novel_below"] if "novelty" in entry else None,
    )


def write_report_of(cells: LabelledCells, path: str | Path, file: str, lead: str = LEAD) -> None:
    """Write the page, completely or not at all.

    Parameters
    ----------
    cells : what it shows
    path : HTML file
    file : name of the cells' file, for the heading
    lead : first paragraph

    Raises
    ------
    UserError
        If the folder cannot be written to.
    """
    with whole_file(path) as partial:
        write_label_report(cells, partial, f"Cell types of {file}", lead)
