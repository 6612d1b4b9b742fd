"""New cells for a trained model: what the file holds of its features, and their values, any cells at a time."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

from models.shapes import FEATURES
from utils.cells.config import IngestConfig
from utils.cells.ingest import Ingested, ingest
from utils.cells.minibatches import CellDataset
from utils.cells.preprocessed import RawFile, common_barcodes
from utils.errors import UserError
from utils.features.normalise import model_values
from utils.train.model_folder import SavedModel

BLOCK_CELLS = 2**12
"""Most cells whose values are in memory at once."""
FILE_BLOCKS = 4
"""At most so many of the file's blocks are in memory at once, where cells have many values."""


@dataclass
class Query:
    """New cells, as a model reads them; their values stay in the file until they are asked for.

    Attributes
    ----------
    file : the file they come from
    barcodes : [cells]
    measured : modality that the model reads → [cells] bool, whether a cell has a count in any of the model's features
    report : what was found and done, one line each
    warnings : the lines of it that make the predictions doubtful
    coverage : share of the model's genes (or peaks) in the file, and share of the file's counts that they hold
    ingested : modality → where its counts are
    rows : modality → [cells] number of each cell among the modality's cells in the file
    target_sum : RNA counts per cell after scaling
    """

    file: RawFile
    barcodes: pd.Index
    measured: dict[str, np.ndarray]
    report: list[str]
    warnings: list[str]
    coverage: dict[str, float] = field(default_factory=dict)
    ingested: dict[str, Ingested] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    target_sum: float | None = None

    def __len__(self) -> int:
        return len(self.barcodes)

    @property
    def empty(self) -> np.ndarray:
        """[cells] bool, whether a cell lacks counts in a modality that the model reads."""
        return ~np.logical_and.reduce(list(self.measured.values()))

    def take(self, cells: np.ndarray) -> "Query":
        """Some of the cells, in the given order; nothing is read."""
        pick = lambda arrays: {name: array[cells] for name, array in arrays.items()}
        return replace(self, barcodes=self.barcodes[cells], measured=pick(self.measured), rows=pick(self.rows))

    def values(self, modality: str) -> csr_matrix:
        """Read the model-ready values of a modality [cells, features]."""
        if not len(self):  # scanpy, which normalises, refuses no cells
            return csr_matrix((0, len(self.ingested[modality].alignment.features)), dtype=np.float32)
        blocks = self.ingested[modality].chosen(self.rows[modality])
        return vstack([model_values(modality, counts, self.target_sum) for counts in blocks], format="csr")

    def dataset(self) -> CellDataset:
        """Read the model-ready values of all modalities."""
        return CellDataset({name: self.values(name) for name in self.ingested}, self.barcodes)

    def blocks(self, n_shares: int = 1) -> list[np.ndarray]:
        """Cut the cells into blocks that fit in memory, for `take`.

        Parameters
        ----------
        n_shares : processes that take blocks in turn; all get the same number of blocks of about the same size

        Returns
        -------
        Numbers of the cells of each block, in order
        """
        places = [ingested.source.matrices[ingested.place][0] for ingested in self.ingested.values()]
        size = min(BLOCK_CELLS, FILE_BLOCKS * min(matrix.block_rows for matrix in places))
        rounds = max(-(-len(self) // (size * n_shares)), 1)
        size = max(-(-len(self) // (rounds * n_shares)), 1)
        return [np.arange(start, min(start + size, len(self))) for start in range(0, len(self), size)]


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
    in_turn: Callable = map,
) -> Query:
    """Read cells once, so that they can be prepared as the model's training cells were, always from their counts.

    Parameters
    ----------
    file : raw or preprocessed cells
    saved : the model, with its vocabulary, species, genome build and constants
    config : overrides for what cannot be inferred from the file
    progress : show progress bars
    inputs : modalities to prepare; by default those that the composed model reads
    in_turn : as in `ingest`

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
    ingests, rows, measured, report, warnings, coverage = {}, {}, {}, list(file.notes), [], {}
    for name in inputs:
        ingested = ingest(file.modalities[name], config, saved.features[name], progress, in_turn)
        report, warnings = report + ingested.report(), warnings + ingested.warnings
        coverage |= {f"{name}_coverage": ingested.alignment.coverage, f"{name}_count_coverage": ingested.count_coverage}
        ingests[name], rows[name] = ingested, ingested.barcodes.get_indexer(barcodes)
        measured[name] = ingested.measured[rows[name]]
    target_sum = saved.stamp.get("target_sum")
    doubts, query = [], Query(file, barcodes, measured, report, warnings, coverage, ingests, rows, target_sum)
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
