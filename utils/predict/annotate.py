"""New cells, prepared for a trained model, and their file with the model's predictions."""

import platform
import re
import shlex
import sys
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy.sparse import vstack

from models.shapes import FEATURES, MODALITIES
from utils import __version__
from utils.cells.config import IngestConfig
from utils.cells.ingest import ingest
from utils.cells.minibatches import CellDataset
from utils.cells.preprocessed import STAMP, STAMPED, RawFile, common_barcodes
from utils.errors import UserError
from utils.features.normalise import model_values
from utils.files.write import column_names
from utils.predict.infer import Prediction, latents_of
from utils.train.cell_types import CELL_TYPES
from utils.train.model_folder import SavedModel

MEASURED = {"rna": "rna_measured", "atac": "atac_measured"}
"""Modality → column of obs: whether the model has read this modality of a cell, which is else inferred or missing."""


@dataclass(frozen=True)
class Names:
    """Names of what a prediction writes into a file.

    Attributes
    ----------
    prefix : put before every name, so that predictions of several models, or a user's own columns, do not clash
    columns : columns of obs, without prefix
    latents : the modalities whose latents are written
    table : key of obsm for the probability of each output, without prefix; empty for none
    """

    prefix: str = ""
    columns: tuple[str, ...] = (*CELL_TYPES.columns, *MEASURED.values())
    latents: tuple[str, ...] = MODALITIES
    table: str = CELL_TYPES.table

    def __post_init__(self):
        if not re.fullmatch(r"[\w.-]{0,50}", self.prefix):
            raise UserError(f"--prefix {self.prefix!r}: at most 50 letters, digits, dots, hyphens and underscores")

    @classmethod
    def of(cls, prefix: str, saved: SavedModel) -> "Names":
        """The names of what a model's predictions are."""
        columns = (*saved.task.columns_of(saved.fitted), *MEASURED.values())
        return cls(prefix, columns, latents_of(saved), saved.task.table)

    @property
    def embedding(self) -> str:
        """Key of obsm for the cell embedding."""
        return f"X_{self.prefix}scmomer"

    def latent(self, modality: str) -> str:
        """Key of obsm for the latent of a modality."""
        return f"{self.embedding}_{modality}"

    @property
    def provenance(self) -> str:
        """Key of uns for what made the predictions."""
        return f"{self.prefix}scmomer"

    @property
    def places(self) -> list[str]:
        """Everything written per cell, as messages name it."""
        keys = [self.embedding, *map(self.latent, self.latents), *([self.prefix + self.table] if self.table else [])]
        columns = [f"obs['{self.prefix}{column}']" for column in self.columns]
        return columns + [f"obsm['{key}']" for key in keys]

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
    """New cells, prepared for a model.

    Attributes
    ----------
    file : the file they come from
    dataset : model-ready values, in the file's order
    barcodes : [cells]
    measured : modality that the model reads → [cells] bool, whether a cell has a count in any of the model's features
    report : what was found and done, one line each
    warnings : the lines of it that make the predictions doubtful
    coverage : share of the model's genes (or peaks) in the file, and share of the file's counts that they hold
    """

    file: RawFile
    dataset: CellDataset
    barcodes: pd.Index
    measured: dict[str, np.ndarray]
    report: list[str]
    warnings: list[str]
    coverage: dict[str, float] = field(default_factory=dict)

    @property
    def empty(self) -> np.ndarray:
        """[cells] bool, whether a cell lacks counts in a modality that the model reads."""
        return ~np.logical_and.reduce(list(self.measured.values()))

    def annotate(
        self, prediction: Prediction, saved: SavedModel, names: Names, choices: object = None
    ) -> ad.AnnData | mudata.MuData:
        """The file with predictions; cells that were not read get none.

        Columns and the cell embedding are also written to each modality of paired cells, where scanpy looks for them.
        What an earlier run has written under the same prefix is removed first.

        Parameters
        ----------
        prediction : with the latents of `names.latents`
        saved, names, choices : the model, the names to write, and the settings of its task's predictions
        """
        out, empty = self.file.content(), self.empty
        parts = (out, *(out.mod.values() if isinstance(out, mudata.MuData) else ()))
        before = out.uns.get(names.provenance)
        for place in before["written"] if isinstance(before, dict) and "written" in before else ():
            _remove(parts, str(place))
        columns = pd.DataFrame(index=self.barcodes)
        for column, for_empty in saved.task.columns_of(saved.fitted).items():
            values = prediction[column].copy()
            values[empty] = for_empty
            columns[names.prefix + column] = pd.Categorical(values) if values.dtype == object else values
        for modality, column in MEASURED.items():
            columns[names.prefix + column] = self.measured.get(modality, False)
        for part in parts:
            row = self.barcodes.get_indexer(part.obs_names)
            for name, values in columns.items():
                if values.dtype == bool:  # missing for no cell: a column of objects could not be written
                    part.obs[name] = np.where(row >= 0, values.to_numpy()[row], False)
                else:
                    part.obs[name] = values.reindex(part.obs_names)
            part.obsm[names.embedding] = _rows_of(prediction.embedding, row)
        row = self.barcodes.get_indexer(out.obs_names)
        for modality in names.latents:
            out.obsm[names.latent(modality)] = _rows_of(prediction.latents[modality], row)
        if names.table:
            table = _rows_of(prediction["probability"], row)
            if empty.any():
                table = np.where(np.isin(row, np.flatnonzero(empty))[:, None], np.float32(np.nan), table)
            out.obsm[names.prefix + names.table] = pd.DataFrame(
                table, out.obs_names, column_names(saved.outputs), copy=False
            )
        out.uns[names.provenance] = self.provenance(saved, names, choices)
        if names.provenance == STAMP and self.file.stamp is not None:
            out.uns[STAMP][STAMPED] = before if isinstance(before, str) else before[STAMPED]
        elif before is not None and not (isinstance(before, dict) and "written" in before):
            out.uns[f"{names.provenance}_before"] = before
        return out

    def provenance(self, saved: SavedModel, names: Names, choices: object = None) -> dict:
        """The entry of uns that records what made the predictions."""
        entry = {
            "written": np.array(names.places, dtype=object),
            "model": saved.name,
            "model_hash": saved.hash,
            "scmomer_version": __version__,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "trained_on_simulated_cells": saved.is_simulated,
            "versions": {name: version(name) for name in ("torch", "anndata", "numpy")}
            | {"scmomer": __version__, "python": platform.python_version()},
            "outputs": np.array(saved.outputs, dtype=object),
            "reads": np.array(saved.model_config.inputs, dtype=object),
            "n_labelled": int((~self.empty).sum()),
            "n_unassigned": int(self.empty.sum()),
            "warnings": np.array(self.warnings, dtype=object),
        }
        how = {} if choices is None else {"choices": choices}
        return entry | saved.task.provenance(saved.fitted, **how) | self.coverage


def _remove(parts: tuple, place: str) -> None:
    """Remove a place that an earlier run has written, as `obs['confidence']`, from a file and its modalities."""
    kind, _, key = place.removesuffix("']").partition("['")
    for part in parts:
        if kind == "obs" and key in part.obs:
            del part.obs[key]
        elif kind == "obsm" and key in part.obsm:
            del part.obsm[key]


def _rows_of(values: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Rows of an array [cells, …], NaN for a row of -1; the array itself if these are all its rows in order."""
    if len(row) == len(values) and (row == np.arange(len(row))).all():
        return values
    return np.where(row[:, None] >= 0, values[row], np.float32(np.nan))


def at_coverage_of(saved: SavedModel, config: IngestConfig) -> IngestConfig:
    """The overrides, with the folder's own least coverage, if it has one, in the place of the default.

    A folder has its own where it was measured on files with fewer genes, as reference/pbmc was.
    """
    own = saved.stamp.get("min_gene_coverage")
    is_default = config.min_gene_coverage == IngestConfig().min_gene_coverage
    return replace(config, min_gene_coverage=own) if own is not None and is_default else config


def read_query(
    file: RawFile,
    saved: SavedModel,
    config: IngestConfig,
    progress: bool = False,
    inputs: tuple[str, ...] | None = None,
) -> Query:
    """Prepare cells in the same way as the model's training cells, always from their counts.

    Parameters
    ----------
    file : raw or preprocessed cells
    saved : the model, with its vocabulary, species, genome build and constants
    config : overrides for what cannot be inferred from the file
    progress : show progress bars
    inputs : modalities to prepare; by default those that the composed model reads

    Raises
    ------
    UserError
        If a modality or too many features are missing.
    """
    inputs = inputs or saved.model_config.inputs
    absent = [name for name in inputs if name not in file.modalities]
    if absent:
        raise UserError(
            f"{file.path}: has no {' and '.join(absent)}, which {saved.path} reads; "
            "train a model with a student for cells that lack it"
        )
    barcodes = common_barcodes(file.modalities, inputs)
    if not len(barcodes):
        raise UserError(f"{file.path}: holds no cell measured in {' and '.join(inputs)}; nothing can be predicted")
    config = replace(at_coverage_of(saved, config), genome=config.genome or saved.stamp.get("genome"))
    values, measured, report, warnings, coverage = {}, {}, list(file.notes), [], {}
    for name in inputs:
        ingested = ingest(file.modalities[name], config, saved.features[name], progress)
        report, warnings = report + ingested.report(), warnings + ingested.warnings
        coverage |= {f"{name}_coverage": ingested.alignment.coverage, f"{name}_count_coverage": ingested.count_coverage}
        prepared = [
            model_values(name, counts, saved.stamp.get("target_sum")) for counts in ingested.blocks(progress=progress)
        ]
        rows = ingested.barcodes.get_indexer(barcodes)
        values[name] = vstack(prepared, format="csr")[rows]
        measured[name] = np.asarray(ingested.measured[rows])
    if left_out := len(file.obs) - len(barcodes):
        report.append(
            f"{left_out:,} of {len(file.obs):,} cells were not measured in {' and '.join(inputs)} and get no prediction"
        )
    doubts, query = [], Query(file, CellDataset(values, barcodes), barcodes, measured, report, warnings, coverage)
    if query.empty.any():
        report.append(f"{query.empty.sum():,} cells have no count in the model's features and stay unassigned")
    if saved.is_simulated:
        doubts.append(f"{saved.path} was trained on simulated cells; its predictions mean nothing for real ones")
    few = [name for name in inputs if saved.task and coverage[f"{name}_coverage"] < IngestConfig.min_gene_coverage]
    for name in few:  # the folder, or the user, allows fewer features than the default
        doubts.append(
            f"the file has only {coverage[f'{name}_coverage']:.1%} of the model's {FEATURES[name]}: expect more errors "
            "than confidence and prediction sets promise"
        )
    if saved.task:
        doubts += saved.task.doubts(saved.fitted)
    report += [f"warning: {doubt}" for doubt in doubts]
    warnings += doubts
    return query
