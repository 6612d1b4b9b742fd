"""The predictions of a file, which are added to a copy of it, or to its cells in memory, as blocks of cells come."""

import platform
import shlex
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.api.types import union_categoricals

from utils import __version__
from utils.cells.preprocessed import STAMP, STAMPED, RawFile
from utils.files.additions import Array, Part, fill
from utils.files.column_names import column_names
from utils.predict.infer import Prediction
from utils.predict.mixed import Share
from utils.predict.names import LABELLED_BY, MEASURED, Names
from utils.predict.query import Query


class Output:
    """Adds predictions to cells. Columns are kept in memory until all are there; arrays are filled as blocks come.

    Columns and the cell embedding are also written to each modality of paired cells, where scanpy looks for them. What
    an earlier run has written under the same prefix is removed first.

    Parameters
    ----------
    parts : the whole file and its modalities
    file : the input
    names : what is written
    outputs : names of the columns of the table, if there is one
    """

    def __init__(self, parts: list[Part], file: RawFile, names: Names, outputs: list[str]):
        self.parts, self.file, self.names, self.outputs = parts, file, names, outputs
        self.cells = file.obs.index
        # Per part: [cells of the part] number of each among the file's cells, and the inverse; -1 where there is none
        self.of_file = [self.cells.get_indexer(part.names) for part in parts]
        self.in_part = [_inverse(rows, len(self.cells)) for rows in self.of_file]
        self.arrays: dict[tuple[int, str], Array] = {}
        self.table: list[Array] | None = None
        self.blocks: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        self.before = parts[0].entry(names.provenance)
        if _is_prediction(self.before):
            for place in self.before["written"]:
                kind, _, key = str(place).removesuffix("']").partition("['")
                for part in parts:
                    part.remove(kind, key)

    def add(self, share: Share, block: Query, prediction: Prediction) -> None:
        """Add the predictions of some cells.

        Parameters
        ----------
        share, block : the model folder, and the cells as it has read them
        prediction : of these cells, with the latents of `names.latents`
        """
        rows, empty, names, saved = self.cells.get_indexer(block.barcodes), block.empty, self.names, share.saved
        found = {}
        for column, for_empty in saved.task.columns_of(saved.fitted).items():
            values = prediction[column].copy()
            values[empty] = for_empty
            found[column] = pd.Categorical(values) if values.dtype == object else values
        nothing = np.zeros(len(block), dtype=bool)
        found |= {column: block.measured.get(modality, nothing) for modality, column in MEASURED.items()}
        if LABELLED_BY in names.columns:
            found[LABELLED_BY] = pd.Categorical([share.name]).repeat(len(block))
        self.blocks.append((rows, found))
        for number in range(len(self.parts)):
            self._fill(number, names.embedding, rows, prediction.embedding)
        for modality in prediction.latents:
            self._fill(0, names.latent(modality), rows, prediction.latents[modality])
        if names.table:
            table = np.where(empty[:, None], np.float32(np.nan), prediction["probability"])
            if self.table is None:
                self.table = self.parts[0].table(names.prefix + names.table, column_names(self.outputs))
            for column, values in zip(self.table, table.T, strict=True):
                fill(column, self.in_part[0][rows], values)

    def _fill(self, number: int, key: str, rows: np.ndarray, values: np.ndarray) -> None:
        place = (number, key)
        if place not in self.arrays:
            self.arrays[place] = self.parts[number].array(key, values.shape[1])
        fill(self.arrays[place], self.in_part[number][rows], values)

    def finish(self, entry: dict, more: Callable[[pd.DataFrame], dict] = lambda columns: {}) -> pd.DataFrame:
        """Write the columns, and the entry of uns that records what made the predictions.

        Parameters
        ----------
        entry : from `provenance`
        more : further entries, from the columns

        Returns
        -------
        The columns [cells of the file], which cells that were not read have no value in
        """
        names, root = self.names, self.parts[0]
        columns = joined(self.blocks, self.cells)[list(names.columns)]
        columns = columns.rename(columns=lambda column: names.prefix + column)
        for part, rows in zip(self.parts, self.of_file, strict=True):
            part.columns(_rows_of(columns, rows, part.names))
        entry.update(more(columns))
        if names.provenance == STAMP and self.file.stamp is not None:
            entry[STAMPED] = self.before if isinstance(self.before, str) else self.before[STAMPED]
        elif self.before is not None and not _is_prediction(self.before):
            root.move_entry(names.provenance, f"{names.provenance}_before")
        root.set_entry(names.provenance, entry)
        return columns


def _is_prediction(entry: object) -> bool:
    return isinstance(entry, dict) and "written" in entry


def _inverse(rows: np.ndarray, n: int) -> np.ndarray:
    """[n] position of each number in `rows`, -1 for one that is not there."""
    out = np.full(n, -1)
    there = np.flatnonzero(rows >= 0)
    out[rows[there]] = there
    return out


def joined(blocks: Iterable[tuple[np.ndarray, dict[str, np.ndarray]]], cells: pd.Index) -> pd.DataFrame:
    """Join the columns of blocks of cells; they may differ, and some cells may be in none.

    Parameters
    ----------
    blocks : numbers of the cells of each block, and column → their values
    cells : names of all cells
    """
    blocks, columns = list(blocks), {}
    for name in dict.fromkeys(name for _, found in blocks for name in found):
        mine = [(rows, found[name]) for rows, found in blocks if name in found]
        parts = [values for _, values in mine]
        is_text = isinstance(parts[0], pd.Categorical)
        columns[name] = union_categoricals(parts, sort_categories=True) if is_text else np.concatenate(parts)
        at = _inverse(np.concatenate([rows for rows, _ in mine]), len(cells))
        columns[name] = _take(columns[name], at)
    return pd.DataFrame(columns, index=cells)


def _take(values: np.ndarray | pd.Categorical, rows: np.ndarray) -> np.ndarray | pd.Categorical:
    """Values of some rows; for a row of -1 a missing one, or False among truth values."""
    if len(rows) == len(values) and (rows == np.arange(len(rows))).all():
        return values
    if values.dtype == bool:  # missing for no cell: a column of objects could not be written
        return np.where(rows >= 0, values[rows], False)
    return pd.api.extensions.take(values, rows, allow_fill=True)


def _rows_of(columns: pd.DataFrame, rows: np.ndarray, names: pd.Index) -> pd.DataFrame:
    return pd.DataFrame({name: _take(values._values, rows) for name, values in columns.items()}, index=names)


def provenance(shares: list[Share], names: Names, choices: object = None) -> dict:
    """The entry of uns that records what made the predictions; with several folders, also what is different in each."""
    found = {share.name.replace("/", "|"): _provenance(share, choices) for share in shares}
    first = next(iter(found.values()))
    entry = {
        "written": np.array(names.places, dtype=object),
        "scmomer_version": __version__,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "anndata", "numpy")}
        | {"scmomer": __version__, "python": platform.python_version()},
    } | first
    if len(found) == 1:
        return entry
    several = lambda key: np.array(list(dict.fromkeys(text for one in found.values() for text in one[key])), object)
    together = lambda key: ", ".join(str(one[key]) for one in found.values())
    return entry | {
        "model": ", ".join(found),
        "model_hash": together("model_hash"),
        "calibration": "; ".join(f"{name}: {one['calibration']}" for name, one in found.items()),
        "trained_on_simulated_cells": any(one["trained_on_simulated_cells"] for one in found.values()),
        "reads": several("reads"),
        "n_labelled": sum(one["n_labelled"] for one in found.values()),
        "n_unassigned": sum(one["n_unassigned"] for one in found.values()),
        "warnings": several("warnings"),
        "left_out": several("left_out"),
        "folders": found,
    }


def _provenance(share: Share, choices: object) -> dict:
    """What is recorded of one model folder and its cells."""
    saved, query = share.saved, share.query
    how = {} if choices is None else {"choices": choices}
    return (
        {
            "model": saved.name,
            "model_hash": saved.hash,
            "trained_on_simulated_cells": saved.is_simulated,
            "outputs": np.array(saved.outputs, dtype=object),
            "reads": np.array(saved.model_config.inputs, dtype=object),
            "n_labelled": int((~query.empty).sum()),
            "n_unassigned": int(query.empty.sum()),
            "warnings": np.array(query.warnings, dtype=object),
        }
        | saved.task.provenance(saved.fitted, **how)
        | query.coverage
    )
