"""New cells in the shape a trained model expects, whatever their genes are called and however many there are."""

from dataclasses import dataclass

import anndata as ad
import mudata
import numpy as np
import pandas as pd

from utils.data import prepare
from utils.data.dataset import CellDataset
from utils.data.read import RawFile, read_raw
from utils.errors import UserError
from utils.train.checkpoint import FEATURE_FILES, SavedModel
from utils.train.infer import Prediction


@dataclass
class Query:
    """Cells to label.

    Attributes
    ----------
    file : what was read
    dataset : model-ready cells, in the file's order
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
        out = self.file.content
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


def read_query(path: str, saved: SavedModel, min_coverage: float = 0.3) -> Query:
    """Read cells and prepare them as the model's training cells were, always starting from the counts.

    Parameters
    ----------
    path : .h5ad or .h5mu, raw or preprocessed
    saved : the model, which brings vocabulary and constants
    min_coverage : least share of the model's features that must be in the file, 0 … 1

    Raises
    ------
    UserError
        If a modality or too many features are missing.
    """
    file = read_raw(path)
    inputs = saved.model_config.inputs
    absent = [name for name in inputs if name not in file.modalities]
    if absent:
        raise UserError(
            f"{path}: has no {' and '.join(absent)}, which {saved.path} reads; "
            "train a model with a student for cells that lack it"
        )
    barcodes = file.modalities[inputs[0]].obs_names
    for name in inputs[1:]:
        barcodes = barcodes[barcodes.isin(file.modalities[name].obs_names)]
    if not len(barcodes):
        raise UserError(f"{path}: holds no cell measured in {' and '.join(inputs)}; there is nothing to label")
    values, report, empty = {}, [], np.zeros(len(barcodes), dtype=bool)
    for name in inputs:
        adata = file.modalities[name][barcodes]
        counts, features, place = prepare.find_counts(adata, file.path)
        if name == "rna":
            counts, features, _ = prepare.harmonise_genes(counts, features, saved.stamp["species"])
        else:
            counts, features = prepare.sort_peaks(counts, features, adata.var if place != "raw" else None)
        total = counts.sum()
        counts, coverage = prepare.align_features(counts, features, saved.features[name])
        share = counts.sum() / max(total, 1)
        what = FEATURE_FILES[name]
        report.append(
            f"{name}: {counts.shape[0]:,} cells, counts in {place}; {coverage:.1%} of the model's "
            f"{len(saved.features[name]):,} {what} are in the file and hold {share:.1%} of its counts"
        )
        if coverage < min_coverage:
            known, given = ", ".join(saved.features[name][:3]), ", ".join(map(str, features[:3]))
            raise UserError(
                f"{path}: has only {coverage:.1%} of the model's {what} (the model's are like {known}; the file's like "
                f"{given}); use the same species and id type, or lower --min_gene_coverage {min_coverage}"
            )
        empty |= np.asarray(counts.sum(1)).ravel() == 0
        is_rna = name == "rna"
        values[name] = prepare.log_normalise(counts, saved.stamp["target_sum"]) if is_rna else prepare.binarise(counts)
    if empty.any():
        report.append(f"{empty.sum():,} cells have no count in the model's features and stay unassigned")
    return Query(file, CellDataset(values, barcodes), barcodes, empty, report)
