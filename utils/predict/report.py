"""The page about a file with predicted cell types: reads what `label_file` has written."""

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import h5py
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
from utils.predict.infer import Prediction
from utils.predict.label import Labelled
from utils.predict.query import BLOCK_CELLS, Query
from utils.train.config import LabelConfig
from utils.train.model_folder import SavedModel

LEAD = (
    "A model has given each cell one of the types that it was trained on. This page shows what it found, how sure it "
    "is, and what each column of the result means. It is one file: it can be kept beside the result or sent."
)

EVALUATION_LEAD = (
    "A model has given each of these cells one of the types that it was trained on, and their true types are known. "
    "This page shows how often it was right, how sure it was, and what each column means. The scores beside baselines "
    "are in the evaluation's .json and .csv files."
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
        "model": f"{entry['model']}; reads {reads} and knows {len(saved.outputs)} types",
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


class StoredRows:
    """[cells, width] an entry of obsm in a written file; `rows[numbers]` reads some of its rows."""

    def __init__(self, path: str | Path, key: str):
        self.path, self.key = path, key

    def __getitem__(self, rows) -> np.ndarray:
        with h5py.File(self.path) as file:
            array = file["obsm"][self.key]
            rows = np.arange(len(array))[rows]
            out = np.empty((len(rows), array.shape[1]), array.dtype)
            for start in range(0, len(array), BLOCK_CELLS):  # HDF5 reads stretches faster than scattered rows
                mine = np.flatnonzero((rows >= start) & (rows < start + BLOCK_CELLS))
                if len(mine):
                    out[mine] = array[start : start + BLOCK_CELLS][rows[mine] - start]
        return out


class QueriedRows:
    """[cells of the file, features] model-ready values; `rows[numbers]` reads some of them.

    Rows of cells that the model does not read cannot be read.
    """

    def __init__(self, query: Query, modality: str):
        self.query, self.modality = query, modality
        self.at = query.barcodes.get_indexer(query.file.obs.index)

    def __getitem__(self, rows: np.ndarray) -> csr_matrix:
        return self.query.take(self.at[rows]).values(self.modality)


def labelled_cells(
    labelled: Labelled,
    out_path: str | Path,
    sample_column: str | None = None,
    label_column: str | None = None,
) -> LabelledCells:
    """What the page shows of a labelled file.

    Parameters
    ----------
    labelled, out_path : as `label_file` returns it, and the file that was written
    sample_column, label_column : of obs: the sample of each cell, by default a column of that name; its true type
    """
    file, names, entry = labelled.file, labelled.names, labelled.entry
    obs = file.obs
    sample_column, samples = samples_of(obs, sample_column)
    truth = None if label_column is None else clean_labels(obs[label_column]).to_numpy(object)
    columns = labelled.columns[[names.prefix + column for column in names.columns if column in MEANINGS]]
    saved, modality = labelled.shares[0].saved, labelled.shares[0].saved.model_config.inputs[0]
    # Folders differ in their features, so values of cells that several have labelled cannot be compared.
    values = QueriedRows(labelled.shares[0].query, modality) if len(labelled.shares) == 1 else None
    return LabelledCells(
        columns.rename(columns=lambda column: column.removeprefix(names.prefix)),
        StoredRows(out_path, names.embedding),
        {"file": f"{file.path.name}, {len(obs):,} cells"} | facts_of(saved, entry),
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
