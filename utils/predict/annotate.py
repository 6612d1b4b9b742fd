"""New cells as a trained model takes them, and their file with the model's predictions."""

import re
import shlex
import sys
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy.sparse import vstack

from utils import __version__
from utils.cells.config import IngestConfig
from utils.cells.ingest import ingest
from utils.cells.minibatches import CellDataset
from utils.cells.preprocessed import STAMP, STAMPED, RawFile, common_barcodes
from utils.errors import UserError
from utils.features.normalise import model_values
from utils.predict.infer import Prediction
from utils.train.model_folder import SavedModel
from utils.train.tasks import CELL_TYPES


@dataclass(frozen=True)
class Names:
    """Names of what a prediction writes into a file.

    Attributes
    ----------
    prefix : put before every name, so that predictions of several models, or a user's own columns, do not clash
    columns : the task's columns of obs, without prefix
    """

    prefix: str = ""
    columns: tuple[str, ...] = tuple(CELL_TYPES.columns)

    def __post_init__(self):
        if not re.fullmatch(r"[\w.-]{0,50}", self.prefix):
            raise UserError(f"--prefix {self.prefix!r}: at most 50 letters, digits, dots, hyphens and underscores")

    @property
    def embedding(self) -> str:
        """Key of obsm for the cell embedding."""
        return f"X_{self.prefix}scmomer"

    @property
    def provenance(self) -> str:
        """Key of uns for what made the predictions."""
        return f"{self.prefix}scmomer"

    @property
    def places(self) -> list[str]:
        """Everything written per cell, as messages name it."""
        return [*(f"obs['{self.prefix}{column}']" for column in self.columns), f"obsm['{self.embedding}']"]

    def claim(self, file: RawFile) -> list[str]:
        """Check that the names are free, or hold an earlier prediction, which may be replaced.

        Returns
        -------
        Lines that report what is replaced

        Raises
        ------
        UserError
            If the file holds something else under one of the names.
        """
        held = {f"obs['{column}']" for column in file.obs}
        held |= {name for source in file.modalities.values() for name in source.others}
        earlier = None
        if len(file.handles) == 1:
            hdf5 = file.handles[0]
            held |= {f"obsm['{key}']" for key in hdf5.get("obsm", ())}
            entry = hdf5.get(f"uns/{self.provenance}")
            if isinstance(entry, h5py.Group) and "written" in entry:
                earlier = {key: read_elem(entry[key]) for key in ("model", "written") if key in entry}
        clashes = [name for name in self.places if name in held]
        if earlier is not None and set(clashes) <= set(map(str, earlier["written"])):
            return [f"replacing the earlier predictions of model {earlier.get('model', 'unknown')}"] if clashes else []
        if clashes:
            raise UserError(
                f"{file.path}: has its own {' and '.join(clashes)}, which predictions would replace; choose other "
                "names with --prefix, for example --prefix new_"
            )
        return []


@dataclass
class Query:
    """New cells, as a model takes them.

    Attributes
    ----------
    file : the file they come from
    dataset : model-ready values, in the file's order
    barcodes : [cells]
    empty : [cells] bool, whether a cell has no count in any of the model's genes (or peaks)
    report : what was found and done, one line each
    warnings : the lines of it that make the predictions doubtful
    coverage : share of the model's genes (or peaks) in the file, and share of the file's counts that they hold
    """

    file: RawFile
    dataset: CellDataset
    barcodes: pd.Index
    empty: np.ndarray
    report: list[str]
    warnings: list[str]
    coverage: dict[str, float] = field(default_factory=dict)

    def annotate(self, prediction: Prediction, saved: SavedModel, names: Names) -> ad.AnnData | mudata.MuData:
        """The file with predictions; cells that were not read get none.

        Columns and embeddings also stand in each modality of paired cells, where scanpy looks for them.
        """
        out = self.file.content()
        columns = pd.DataFrame(index=self.barcodes)
        for column, for_empty in saved.task.columns.items():
            values = prediction[column].copy()
            values[self.empty] = for_empty
            columns[names.prefix + column] = pd.Categorical(values) if values.dtype == object else values
        for part in (out, *(out.mod.values() if isinstance(out, mudata.MuData) else ())):
            for name, values in columns.reindex(part.obs_names).items():
                part.obs[name] = values
            row = self.barcodes.get_indexer(part.obs_names)
            part.obsm[names.embedding] = np.where(row[:, None] >= 0, prediction.embedding[row], np.float32(np.nan))
        before = out.uns.get(names.provenance)
        out.uns[names.provenance] = self.provenance(saved, names)
        if names.provenance == STAMP and self.file.stamp is not None:
            out.uns[STAMP][STAMPED] = before if isinstance(before, str) else before[STAMPED]
        elif before is not None and not (isinstance(before, dict) and "written" in before):
            out.uns[f"{names.provenance}_before"] = before
        return out

    def provenance(self, saved: SavedModel, names: Names) -> dict:
        """The entry of uns that records what made the predictions."""
        entry = {
            "written": np.array(names.places, dtype=object),
            "model": saved.path.resolve().name,
            "model_hash": saved.hash,
            "scmomer_version": __version__,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "trained_on_simulated_cells": saved.is_simulated,
            "n_labelled": int((~self.empty).sum()),
            "n_unassigned": int(self.empty.sum()),
            "warnings": np.array(self.warnings, dtype=object),
        }
        return entry | saved.task.provenance(saved.fitted) | self.coverage


def read_query(file: RawFile, saved: SavedModel, config: IngestConfig, progress: bool = False) -> Query:
    """Prepare cells in the same way as the model's training cells, always from their counts.

    Parameters
    ----------
    file : raw or preprocessed cells
    saved : the model, with its vocabulary, species, genome build and constants
    config : overrides for what cannot be inferred from the file
    progress : show progress bars

    Raises
    ------
    UserError
        If a modality or too many features are missing.
    """
    inputs = saved.model_config.inputs
    absent = [name for name in inputs if name not in file.modalities]
    if absent:
        raise UserError(
            f"{file.path}: has no {' and '.join(absent)}, which {saved.path} reads; "
            "train a model with a student for cells that lack it"
        )
    barcodes = common_barcodes(file.modalities, inputs)
    if not len(barcodes):
        raise UserError(f"{file.path}: holds no cell measured in {' and '.join(inputs)}; nothing can be predicted")
    config = replace(config, genome=config.genome or saved.stamp.get("genome"))
    values, report, warnings, coverage = {}, list(file.notes), [], {}
    empty = np.zeros(len(barcodes), dtype=bool)
    for name in inputs:
        ingested = ingest(file.modalities[name], config, saved.features[name], progress)
        report, warnings = report + ingested.report(), warnings + ingested.warnings
        coverage |= {f"{name}_coverage": ingested.alignment.coverage, f"{name}_count_coverage": ingested.count_coverage}
        prepared = [
            model_values(name, counts, saved.stamp.get("target_sum")) for counts in ingested.blocks(progress=progress)
        ]
        rows = ingested.barcodes.get_indexer(barcodes)
        values[name] = vstack(prepared, format="csr")[rows]
        empty |= ~ingested.measured[rows]
    if left_out := len(file.obs) - len(barcodes):
        report.append(
            f"{left_out:,} of {len(file.obs):,} cells were not measured in {' and '.join(inputs)} and get no prediction"
        )
    if empty.any():
        report.append(f"{empty.sum():,} cells have no count in the model's features and stay unassigned")
    doubts = []
    if saved.is_simulated:
        doubts.append(f"{saved.path} was trained on simulated cells; its predictions mean nothing for real ones")
    if saved.task:
        doubts += saved.task.doubts(saved.fitted)
    report += [f"warning: {doubt}" for doubt in doubts]
    return Query(file, CellDataset(values, barcodes), barcodes, empty, report, warnings + doubts, coverage)
