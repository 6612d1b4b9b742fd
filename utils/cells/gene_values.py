"""The expression of all genes of a file, for what describes genes by cells."""

from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, vstack

from utils.cells.config import IngestConfig
from utils.cells.ingest import ingest
from utils.cells.preprocessed import read_raw
from utils.errors import UserError
from utils.features.normalise import log_normalise

TARGET_SUM = 1e4
"""Counts per cell after scaling."""


def read_gene_values(path: str | Path, config: IngestConfig | None = None) -> tuple[csr_matrix, np.ndarray]:
    """Read the log-normalised RNA of all cells of a file.

    Parameters
    ----------
    path : raw or preprocessed cells in any known format
    config : overrides for what cannot be inferred from the file

    Returns
    -------
    values : [cells, genes] float32, log2(1 + counts per 10,000)
    genes : [genes] current symbols

    Raises
    ------
    UserError
        If the file cannot be read or has no RNA.
    """
    with read_raw(path) as file:
        if "rna" not in file.modalities:
            raise UserError(f"{path}: has no RNA; give a file of cells with RNA")
        ingested = ingest(file.modalities["rna"], config or IngestConfig(), None)
        values = [log_normalise(counts, TARGET_SUM) for counts in ingested.blocks()]
        return vstack(values, format="csr"), np.asarray(ingested.alignment.features, dtype=str)
