"""Scores of the translation between modalities beside baselines, on the same cells."""

import numpy as np
from scipy.special import expit

from models.shapes import other
from utils.cells.minibatches import CellDataset
from utils.cells.preprocessed import Cells
from utils.evaluate.baselines import depth_translation, neighbour_translation, ridge_translation
from utils.evaluate.metrics import MIN_OPEN, translation_scores
from utils.evaluate.translation import (
    auroc_within_depth,
    product,
    pseudobulk_rmse,
    squared_error,
    unweighted_probability,
)
from utils.files.disk_rows import row_lengths, select
from utils.predict.translation import fit_calibration, translate
from utils.train.config import InferConfig
from utils.train.distributed import Runtime
from utils.train.model_folder import SavedModel

CALIBRATED = "scmomer, calibrated"
"""Row of the model's probabilities after calibration on validation cells; it ranks the peaks of a cell as before."""


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
    method → scores; also n_cells, and for peaks the rule by which they are scored
    """
    missing = saved.options["missing"]
    measured = other(missing)
    dataset = CellDataset({measured: cells.values[measured][rows]}, cells.obs.index[rows])
    ours = translate(saved, dataset, config, runtime)

    train, val = cells.rows("train"), cells.rows("val")
    known = [cells.values[name][part] for part in (train, val) for name in (measured, missing)]
    y_train = known[1]
    x, truth = cells.values[measured][rows], cells.values[missing][rows]
    mean = np.asarray(y_train.mean(0), dtype=np.float32)  # of open peaks, or of log values
    depths = row_lengths(select(cells.values[measured], train)), y_train, ours.n_detected
    # Every prediction is a product left [cells, k] · right [k, features], computed in stretches: all of them at once
    # would not fit into memory.
    factors = {"scmomer": (ours.left, ours.right, None)}
    if missing == "atac":
        calibration = fit_calibration(saved, cells, config, runtime)
        factors[CALIBRATED] = (*calibration.factors(ours.left, ours.right, ours.n_detected), str(calibration))
    factors |= {
        f"mean {'accessibility' if missing == 'atac' else 'expression'}": (np.ones((len(rows), 1)), mean, None),
        "mean × depth": depth_translation(*depths),
        "nearest neighbours": neighbour_translation(*known, x),
        "ridge on PCA": ridge_translation(*known, x, ranking=missing == "atac"),
    }
    labels, table = cells.labels(), {}
    if labels is not None:
        both = labels.iloc[train].to_numpy(), labels.iloc[rows].to_numpy()
        factors["type mean × depth"] = depth_translation(*depths, *both)
    for name, (left, right, setting) in factors.items():
        if missing == "atac":
            table[name] = translation_scores(
                truth,
                lambda start, stop, left=left, right=right: product(left, right[:, start:stop]),
                cell_scores=lambda start, stop, left=left, right=right: product(left[start:stop], right),
            )
            table[name]["peak_auroc_within_depth"] = auroc_within_depth(left, right, truth, ours.n_detected)
        else:
            table[name] = {"rna_mse": squared_error(left, right, truth)}
        if labels is not None:
            types = labels.iloc[rows].to_numpy()
            # Trained with open peaks weighted w times, the decoder overestimates the odds of an open peak w-fold.
            to_probability = {"scmomer": unweighted_probability, CALIBRATED: expit} if missing == "atac" else {}
            table[name]["pseudobulk_rmse"] = pseudobulk_rmse(left, right, truth, types, to_probability.get(name))
        if setting is not None:
            table[name]["setting"] = setting
    if missing == "atac":
        rule = (
            f"{table['scmomer']['n_peaks']:,} of {truth.shape[1]:,} peaks are scored: those that are open in at least "
            f"{MIN_OPEN} of the {len(rows):,} cells and closed in at least {MIN_OPEN}"
        )
        runtime.say(rule)
        table["rule"] = rule
    return table | {"n_cells": len(rows)}
