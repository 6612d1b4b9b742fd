"""Scores of the translation between modalities beside baselines, on the same cells."""

import numpy as np

from models.shapes import other
from utils.cells.minibatches import CellDataset
from utils.cells.preprocessed import Cells
from utils.evaluate.baselines import neighbour_translation, ridge_translation
from utils.evaluate.metrics import translation_scores
from utils.evaluate.translation import product, pseudobulk_rmse, squared_error, unweighted_probability
from utils.predict.infer import infer
from utils.train.config import InferConfig
from utils.train.distributed import Runtime
from utils.train.model_folder import SavedModel


def score_translation(saved: SavedModel, cells: Cells, rows: np.ndarray, config: InferConfig, runtime: Runtime) -> dict:
    """Scores of the missing modality, predicted from the measured one: ranking of peaks, or squared error of genes.

    Parameters
    ----------
    saved : a model with a student
    cells : paired cells that fit it
    rows : of the cells to score
    config, runtime : how to run the model

    Returns
    -------
    method → scores; also n_cells
    """
    missing = saved.options["missing"]
    measured, model = other(missing), saved.build()
    dataset = CellDataset({measured: cells.values[measured][rows]}, cells.obs.index[rows])
    (embedding,) = infer(lambda batch: (model.embed(batch),), model, dataset, config, runtime, "embedding")
    decoder = model.decoders[missing].cpu()
    weights = np.vstack([decoder.weight.detach().numpy().T, decoder.bias.detach().numpy()])

    train, val = cells.rows("train"), cells.rows("val")
    known = [cells.values[name][part] for part in (train, val) for name in (measured, missing)]
    y_train = known[1]
    x, truth = cells.values[measured][rows], cells.values[missing][rows]
    mean = np.asarray(y_train.mean(0), dtype=np.float32)  # of open peaks, or of log values
    # Every prediction is a product left [cells, k] · right [k, features], computed in stretches: all of them at once
    # would not fit into memory.
    factors = {
        "scmomer": (np.hstack([embedding, np.ones((len(rows), 1), np.float32)]), weights, None),
        f"mean {'accessibility' if missing == 'atac' else 'expression'}": (np.ones((len(rows), 1)), mean, None),
        "nearest neighbours": neighbour_translation(*known, x),
        "ridge on PCA": ridge_translation(*known, x),
    }
    labels, table = cells.labels(), {}
    for name, (left, right, setting) in factors.items():
        if missing == "atac":
            table[name] = translation_scores(
                truth,
                lambda start, stop, left=left, right=right: product(left, right[:, start:stop]),
                cell_scores=lambda start, stop, left=left, right=right: product(left[start:stop], right),
            )
        else:
            table[name] = {"rna_mse": squared_error(left, right, truth)}
        if labels is not None:
            types = labels.iloc[rows].to_numpy()
            # Trained with open peaks weighted w times, the decoder overestimates the odds of an open peak w-fold.
            to_probability = unweighted_probability if missing == "atac" and name == "scmomer" else None
            table[name]["pseudobulk_rmse"] = pseudobulk_rmse(left, right, truth, types, to_probability)
        if setting is not None:
            table[name]["setting"] = setting
    return table | {"n_cells": len(rows)}
