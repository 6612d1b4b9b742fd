"""The bundled model, reference/pbmc, and the check that a file looks like the cells that it knows: human blood."""

from pathlib import Path

import numpy as np

from utils.cells.config import IngestConfig
from utils.cells.preprocessed import RawFile
from utils.errors import UserError
from utils.features.match import align_genes
from utils.predict.query import at_coverage_of
from utils.train.model_folder import SavedModel, load_model

BOX = Path(__file__).resolve().parents[2] / "reference" / "pbmc"
"""The model folder that ships with the repository; benchmarks/pbmc_box.py makes it."""
LEUKOCYTE = ("PTPRC", "CORO1A", "LAPTM5", "CD52", "CD37", "CD48")
"""Genes that nearly all white blood cells express, and few other cells."""
LINEAGES = {
    "T cells": ("CD3D", "CD3E", "TRAC"),
    "B cells": ("MS4A1", "CD79A"),
    "monocytes": ("LYZ", "S100A8", "S100A9"),
    "NK cells": ("NKG7", "GNLY", "KLRD1"),
}
"""Genes of the large lineages of blood. A file of blood holds cells of several lineages."""
ELSEWHERE = ("EPCAM", "COL1A1", "SNAP25", "GFAP", "ALB")
"""Genes of epithelium, connective tissue, neurons, glia and liver, which no blood cell expresses."""
MOST_CELLS, FEW_CELLS, LEAST_LINEAGES = 0.7, 0.02, 2
"""Shares of cells: a leukocyte gene in at least `MOST_CELLS`, each lineage that counts in more than `FEW_CELLS`."""
FOREIGN_CELLS = 0.1
"""Largest share of cells that may express a gene of another tissue: free RNA in a droplet gives a few such counts."""


def box_for(file: RawFile, config: IngestConfig, folder: Path = BOX) -> tuple[SavedModel, str]:
    """Load the bundled model for a file that looks like human blood.

    Parameters
    ----------
    file : the cells to label
    config : overrides for what cannot be inferred from the file
    folder : the bundled model

    Returns
    -------
    The model, and a line that reports the choice and its reason

    Raises
    ------
    UserError
        If the file does not look like human blood; the message names the check that failed.
    """
    saved = load_model(folder, "celltype")
    problem, found = looks_like_blood(file, config, saved)
    if problem:
        raise UserError(
            f"{file.path}: the bundled model is for human blood only, and {problem}; choose a model with --model_path"
        )
    return (
        saved,
        f"no --model_path: the file looks like human blood ({found}), so {'/'.join(folder.parts[-2:])} is used",
    )


def looks_like_blood(file: RawFile, config: IngestConfig, saved: SavedModel) -> tuple[str, str]:
    """Return the first check that a file fails, and what was found; the first is empty if the file passes all checks.

    The checks are strict: a file of sorted T cells is refused, because the model would find other types in it too.

    Parameters
    ----------
    file, config : as in `box_for`
    saved : the model, with its genes and the least share of them that a file must have
    """
    if "rna" not in file.modalities:
        return "the file has no RNA", ""
    source = file.modalities["rna"]
    place, _ = source.choose(config.values)
    matrix, var = source.matrices[place]
    alignment = align_genes(var, config.species, saved.features["rna"], file.path)
    if alignment.genes.species != "human":
        return f"the file has {alignment.genes.species} genes", ""
    least = at_coverage_of(saved, config).min_gene_coverage
    if alignment.coverage < least:
        return f"the file has {alignment.coverage:.1%} of its genes (at least {least:.0%} are needed)", ""

    markers = np.array([*LEUKOCYTE, *(gene for genes in LINEAGES.values() for gene in genes), *ELSEWHERE])
    projection = align_genes(var, config.species, markers, file.path).projection
    # Only whether a value is positive matters here, so counts and log values give the same answer.
    expressed = np.vstack([(block @ projection > 0).toarray() for _, block in matrix.blocks()])  # [cells, markers]
    share = lambda genes: float(expressed[:, np.isin(markers, genes)].any(1).mean())
    white = share(LEUKOCYTE)
    if white < MOST_CELLS:
        return f"only {white:.0%} of the cells express {', '.join(LEUKOCYTE[:-1])} or {LEUKOCYTE[-1]}", ""
    lineages = [name for name, genes in LINEAGES.items() if share(genes) > FEW_CELLS]
    if len(lineages) < LEAST_LINEAGES:
        return f"the file expresses the marker genes of {' and '.join(lineages) or 'no blood lineage'} alone", ""
    for gene in ELSEWHERE:
        if (foreign := share((gene,))) > FOREIGN_CELLS:
            return f"{foreign:.0%} of the cells express {gene}, which blood cells do not", ""
    genes = (
        f"human genes, {alignment.coverage:.0%} of the model's; white blood cell markers in {white:.0%} of the cells"
    )
    return "", f"{genes}; {', '.join(lineages)}"
