"""New cells in the shape a trained model expects, whatever their genes are called and however many there are."""

from dataclasses import dataclass, replace

import anndata as ad
import mudata
import numpy as np
import pandas as pd
from scipy.sparse import vstack

from utils.data import prepare
from utils.data.config import IntakeConfig
from utils.data.dataset import CellDataset
from utils.data.intake import take_in
from utils.data.read import RawFile, common_barcodes
from utils.errors import UserError
from utils.train.checkpoint import SavedModel
from utils.train.infer import Prediction


@dataclass
class Query:
    """Cells to label.

    Attributes
    ----------
    file : what was read
    dataset : model-ready cells, in the file's order
    barcodes : [cells]
    empty : [cells] bool, no count in any gene (or peak) that the model knows
    report : what was found and done, a line each
    """

    file: RawFile
    dataset: CellDataset
    barcodes: pd.Index
    empty: np.ndarray
    report: list[str]

    def annotate(self, prediction: Prediction) -> ad.AnnData | mudata.MuData:
        """The file with predictions in obs and embeddings in obsm; cells that were not read get none."""
        out = self.file.content()
        columns = pd.DataFrame(
            {"predicted_cell_type": pd.Categorical(prediction.types), "confidence": prediction.confidence},
            index=self.barcodes,
        ).reindex(out.obs_names)
        for name in columns:
            out.obs[name] = columns[name]
        embedding = np.full((out.n_obs, prediction.embedding.shape[1]), np.nan, np.float32)
        embedding[out.obs_names.get_indexer(self.barcodes)] = prediction.embedding
        out.obsm["X_scmomer"] = embedding
        return out


def read_query(file: RawFile, saved: SavedModel, config: IntakeConfig, progress: bool = False) -> Query:
    """Prepare cells as the model's training cells were, always starting from the counts.

    Parameters
    ----------
    file : raw or preprocessed cells
    saved : the model, which brings vocabulary, species, genome build and constants
    config : how to understand the file, where it does not tell by itself
    progress : show bars

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
        raise UserError(f"{file.path}: holds no cell measured in {' and '.join(inputs)}; there is nothing to label")
    config = replace(config, genome=config.genome or saved.stamp.get("genome"))
    values, report, empty = {}, list(file.notes), np.zeros(len(barcodes), dtype=bool)
    for name in inputs:
        intake = take_in(file.modalities[name], config, saved.features[name], progress)
        report += intake.report()
        prepared = [
            prepare.log_normalise(counts, saved.stamp["target_sum"]) if name == "rna" else prepare.binarise(counts)
            for counts in intake.blocks(progress=progress)
        ]
        rows = intake.barcodes.get_indexer(barcodes)
        values[name] = vstack(prepared, format="csr")[rows]
        empty |= ~intake.measured[rows]
    if empty.any():
        report.append(f"{empty.sum():,} cells have no count in the model's features and stay unassigned")
    return Query(file, CellDataset(values, barcodes), barcodes, empty, report)
