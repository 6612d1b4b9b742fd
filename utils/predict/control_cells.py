"""A file of perturbed cells, with its control cells embedded by a model folder."""

import numpy as np
import pandas as pd

from utils.cells.conditions import Perturbed, name_condition, read_perturbed
from utils.cells.config import IngestConfig
from utils.cells.preprocessed import RawFile, read_raw
from utils.errors import UserError
from utils.features.gene_vectors import read_gene_vectors
from utils.predict.cell_embeddings import cell_embeddings, inputs_of
from utils.predict.query import read_query
from utils.train.model_folder import PRETRAINED, SavedModel
from utils.train.perturbation import Study, perturbed_vectors
from utils.train.stage import Stage
from utils.train.tasks import TASKS


def read_study(stage: Stage, flags, config: IngestConfig, wanted: list[str]) -> tuple[Study, list[str]]:
    """Read the perturbed cells, embed their controls, and look up the vectors of the perturbed genes.

    Parameters
    ----------
    stage : the run; the model folder is recorded as its parent
    flags : data_path, model_path, embedding_path, condition_column, separator, line_column, min_cells
    config : overrides for what cannot be inferred from the file
    wanted : more genes, whose perturbation is to be predicted

    Returns
    -------
    Study, and what was found and left out, a line each

    Raises
    ------
    UserError
        If the model reads anything but RNA, or an embedding was given that has none of the perturbed genes.
    """
    encoder = stage.start_from("cells", flags.model_path, *PRETRAINED, *TASKS)
    if inputs_of(encoder) != ("rna",):
        raise UserError(
            f"{encoder.path}: reads {' and '.join(inputs_of(encoder))}, and perturbed cells have RNA alone; give a "
            "model folder of pretrain_rna.py, or one with a student for ATAC"
        )
    vectors = read_gene_vectors(flags.embedding_path) if flags.embedding_path else None
    with read_raw(flags.data_path) as file:
        cells = read_perturbed(
            file, config, flags.condition_column, flags.separator, flags.line_column, flags.min_cells
        )
        if getattr(flags, "line", None) and flags.line not in cells.lines:
            raise UserError(f"--line {flags.line}: {flags.data_path} has the lines {', '.join(cells.lines)}")
        control = np.flatnonzero(cells.code < 0)
        embedding = _embed(stage, encoder, file, config, cells, control)
    perturbed = sorted({*cells.perturbed, *wanted})
    looked_up, found = perturbed_vectors(vectors, perturbed)
    measured = np.isin(perturbed, cells.perturbed)
    if vectors is not None and not found[measured].any():
        raise UserError(
            f"{flags.embedding_path}: has none of the {measured.sum()} perturbed genes of {flags.data_path} "
            f"({', '.join(cells.perturbed[:3])}, …); give an embedding of these genes, or leave out --embedding_path"
        )
    lines = ", ".join(f"{line} {sum(c[0] == line for c in cells.conditions)}" for line in cells.lines)
    notes = [f"{len(cells.code):,} cells × {len(cells.genes):,} genes; conditions: {lines}", *cells.notes]
    if vectors is not None:
        without = np.array(perturbed)[measured & ~found]
        notes.append(
            f"{(measured & found).sum()} of {measured.sum()} perturbed genes have a vector"
            + (f"; the others have an id of their own: {', '.join(without)}" if len(without) else "")
        )
    unknown = np.array(perturbed)[~measured & ~found]
    if len(unknown):
        notes.append(f"neither measured nor in the embedding, so predicted as the average: {', '.join(unknown)}")
    for note in notes:
        stage.runtime.say(note)
    return Study(cells, cells.changes(), control, embedding, perturbed, looked_up, encoder), notes


def _embed(stage: Stage, encoder: SavedModel, file: RawFile, config: IngestConfig, cells: Perturbed, rows: np.ndarray):
    """[len(rows), latent_dim] embeddings of some of the cells."""
    query = read_query(file, encoder, config, stage.runtime.is_main, ("rna",))
    for warning in query.warnings:
        stage.runtime.say(f"warning: {warning}")
    at = query.barcodes.get_indexer(cells.barcodes[rows])
    return np.asarray(cell_embeddings(encoder, query.take(at), stage.infer_config, stage.runtime).X, dtype=np.float32)


def predicted_profiles(study: Study, head, conditions: list[tuple[str, tuple[str, ...]]]) -> pd.DataFrame:
    """Predict the mean expression under conditions: line, condition, and a column per gene, in log2 units."""
    change = study.predict(head, conditions)
    base = np.stack([study.cells.mean(study.cells.control(line)) for line, _ in conditions])
    table = pd.DataFrame(np.maximum(base + change, 0), columns=study.cells.genes)
    table.insert(0, "condition", [name_condition(genes) for _, genes in conditions])
    table.insert(0, "line", [line for line, _ in conditions])
    return table
