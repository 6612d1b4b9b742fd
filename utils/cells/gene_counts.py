"""The RNA counts of a whole file, for what describes genes by cells."""

from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, vstack

from utils.cells.config import IngestConfig
from utils.cells.ingest import ingest
from utils.cells.preprocessed import read_raw
from utils.errors import UserError


def read_gene_counts(path: str | Path, config: IngestConfig | None = None) -> tuple[csr_matrix, np.ndarray]:
    """Read the RNA counts of all cells of a file.

    Parameters
    ----------
    path : raw or preprocessed cells in any known format
    config : overrides for what cannot be inferred from the file

    Returns
    -------
    counts : [cells, genes] float32
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
        return vstack(list(ingested.blocks()), format="csr"), np.asarray(ingested.alignment.features, dtype=str)
