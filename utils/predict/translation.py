"""Predict the modality that cells lack: as two factors, so that no matrix of cells × peaks is held in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.special import expit

from models.shapes import other
from utils.cells.minibatches import CellDataset
from utils.cells.preprocessed import Cells
from utils.evaluate.translation import PeakCalibration, calibrate_peaks, product
from utils.files.disk_rows import row_lengths
from utils.files.write import write_in_blocks
from utils.predict.infer import infer
from utils.train.config import InferConfig
from utils.train.distributed import Runtime
from utils.train.model_folder import SavedModel

MOST_CELLS = 8192
"""Calibration uses at most this many validation and this many training cells, drawn at random."""


@dataclass(frozen=True)
class Translation:
    """Predicted values of the missing modality.

    Attributes
    ----------
    missing : atac or rna
    left, right : [cells, k] and [k, features]; their product is the decoder's output
    n_detected : [cells] features of the measured modality that are detected in each cell
    """

    missing: str
    left: np.ndarray
    right: np.ndarray
    n_detected: np.ndarray

    def blocks(self, calibration: PeakCalibration, size: int = 256) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the rows of each block of cells, and its predicted values [cells of the block, features] float32.

        Probabilities that a peak is open, or expected log-normalised values, which are at least 0. The calibration
        concerns peaks alone.
        """
        left, right = self.left, self.right
        if self.missing == "atac":
            left, right = calibration.factors(left, right, self.n_detected)
        for start in range(0, len(left), size):
            rows = slice(start, start + size)
            values = product(left[rows], right)
            yield rows, expit(values) if self.missing == "atac" else np.maximum(values, 0)


def translate(saved: SavedModel, dataset: CellDataset, config: InferConfig, runtime: Runtime) -> Translation:
    """Predict the missing modality of all cells of a dataset, by a model with a student.

    Parameters
    ----------
    saved : a model with a student
    dataset : cells with the values of the measured modality
    config, runtime : how to run the model
    """
    missing, model = saved.options["missing"], saved.build()
    (embedding,) = infer(lambda batch: (model.embed(batch),), model, dataset, config, runtime, "embedding")
    decoder = model.decoders[missing].cpu()
    return Translation(
        missing,
        np.hstack([embedding, np.ones((len(embedding), 1), np.float32)]),
        np.vstack([decoder.weight.detach().numpy().T, decoder.bias.detach().numpy()]),
        row_lengths(dataset.values[other(missing)]),
    )


def at_most(numbers: np.ndarray, most: int) -> np.ndarray:
    """Return the numbers, or so many of them drawn at random, in order."""
    if len(numbers) <= most:
        return numbers
    return np.sort(np.random.default_rng(0).choice(numbers, most, replace=False))


def fit_calibration(saved: SavedModel, cells: Cells, config: InferConfig, runtime: Runtime) -> PeakCalibration:
    """Fit the calibration of predicted peaks: three numbers on the validation cells of a file, from which the model has
    not learned, and offsets of peaks on its training cells if validation cells show that they help.

    A model folder alone is not enough: its decoder's bias, the only training mean in it, has moved during training and
    says nothing about depth.

    Parameters
    ----------
    saved : a model with a student that replaces ATAC
    cells : paired cells that fit it
    config, runtime : how to run the model
    """
    sides = {}
    for split in ("val", "train"):
        rows = at_most(cells.rows(split), MOST_CELLS)
        if not len(rows):
            if split == "val":
                return PeakCalibration()
            sides[split] = None
            continue
        dataset = CellDataset({"rna": cells.values["rna"][rows]}, cells.obs.index[rows])
        found = translate(saved, dataset, config, runtime)
        sides[split] = found.left, found.right, found.n_detected, csr_matrix(cells.values["atac"][rows])
    return calibrate_peaks(sides["val"], sides["train"])


def write_cells(
    path: str | Path,
    found: Translation,
    calibration: PeakCalibration,
    obs: pd.DataFrame,
    features: np.ndarray,
    empty: np.ndarray,
    min_value: float,
    uns: dict,
) -> None:
    """Write predicted values as .h5ad, a block of cells at a time.

    Parameters
    ----------
    path : the file
    found, calibration : what is predicted
    obs : [cells] annotation to write; the column `translated` is added, False where a cell is empty
    features : [features] names
    empty : [cells] bool, cells without a count in the model's features; their rows stay empty
    min_value : smaller values are not stored
    uns : entries for the file's uns
    """
    frame = ad.AnnData(obs=obs.assign(translated=~empty), var=pd.DataFrame(index=features))
    with write_in_blocks(path, {found.missing: frame}, frame.obs, uns) as writer:
        for rows, values in found.blocks(calibration):
            values[empty[rows]] = 0
            values[values < min_value] = 0
            writer.append(found.missing, X=csr_matrix(values))


def mean_per_type(
    found: Translation, calibration: PeakCalibration, types: np.ndarray, features: np.ndarray, empty: np.ndarray
) -> ad.AnnData:
    """Average predicted values over the cells of each type, a block of cells at a time.

    Parameters
    ----------
    found, calibration : what is predicted
    types : [cells] type names, NaN where missing
    features : [features] names
    empty : [cells] bool, cells to leave out

    Returns
    -------
    Types × features with obs["n_cells"], for types with at least one cell
    """
    codes, names = pd.factorize(np.where(empty, None, types), sort=True)
    totals = np.zeros((len(names), len(features)))
    for rows, values in found.blocks(calibration):
        known = codes[rows] >= 0
        here = codes[rows][known]
        member = csr_matrix((np.ones(len(here)), (here, np.arange(len(here)))), shape=(len(names), len(here)))
        totals += member @ values[known]
    n_cells = np.bincount(codes[codes >= 0], minlength=len(names))
    obs = pd.DataFrame({"n_cells": n_cells}, index=pd.Index(names.astype(str), name="type"))
    return ad.AnnData((totals / n_cells[:, None]).astype(np.float32), obs, pd.DataFrame(index=features))
