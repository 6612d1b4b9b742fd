"""Cell types as class numbers."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from utils.errors import UserError


def check_labels(obs: pd.DataFrame, column: str, path: str | Path) -> str:
    """What the cell types of a raw file are like, in words.

    Parameters
    ----------
    column : of `obs`; only `cell_type`, the default, may be missing

    Raises
    ------
    UserError
        If the column is missing, or is there and says nothing.
    """
    if column not in obs:
        if column != "cell_type":
            raise UserError(f"--label_column {column}: no such column; obs has {', '.join(map(str, obs.columns))}")
        return "no cell types"
    labels = clean_labels(obs[column])
    sizes = labels.value_counts()
    if not len(sizes):
        raise UserError(
            f"{path}: all {len(labels):,} values of obs[{column!r}] are missing; drop the column or name another by "
            "--label_column"
        )
    words = f"{len(sizes):,} cell types in {column}"
    if labels.isna().any():
        words += f", {labels.isna().sum():,} cells without"
    if len(sizes) == 1:
        words += "; one class cannot be learned, pretraining can do without"
    alone = sizes.index[sizes == 1]
    if len(alone):
        words += f"; of a single cell, never validated: {', '.join(alone[:5])}{', …' if len(alone) > 5 else ''}"
    return words


def clean_labels(labels: pd.Series) -> pd.Series:
    """Labels as strings; missing and empty ones as NaN."""
    text = labels.astype(str)
    return text.where(labels.notna() & (text != ""))


def label_candidates(obs: pd.DataFrame, most: int = 6) -> dict[str, dict[str, int]]:
    """Columns that may hold cell types: text of 2 to 200 values, at most half as many as cells; likely names first.

    Returns
    -------
    column → class → number of cells, largest class first
    """
    found = {}
    for column in obs:
        values = obs[column]
        if values.dtype == object or isinstance(values.dtype, pd.CategoricalDtype | pd.StringDtype):
            sizes = clean_labels(values).value_counts()
            if 2 <= len(sizes) <= min(200, len(obs) / 2):
                found[str(column)] = {str(name): int(size) for name, size in sizes.items()}
    likely = [re.search("cell.?type|annot|label|class|lineage|cluster|leiden|louvain", name.lower()) for name in found]
    order = sorted(zip(found, likely, strict=True), key=lambda item: item[1] is None)
    return {name: found[name] for name, _ in order[:most]}


def encode_labels(cells, column: str) -> tuple[np.ndarray, list[str]]:
    """Class numbers of all cells; the classes are those of the training cells, in alphabetical order.

    Parameters
    ----------
    cells : utils.data.read.Cells
    column : of their obs

    Returns
    -------
    codes [cells] int64, -1 for cells without a label or with one that no training cell has; and the classes

    Raises
    ------
    UserError
        If the column is missing, or the training cells have fewer than two classes.
    """
    labels = cells.labels(column)
    if labels is None:
        raise UserError(f"{cells.path}: no column {column!r} in obs, only {', '.join(map(str, cells.obs.columns))}")
    cells.need_training()
    classes = sorted(set(labels.iloc[cells.rows("train")].dropna()))
    if len(classes) < 2:
        raise UserError(
            f"{cells.path}: training cells have {len(classes)} class(es) in {column}; at least 2 are needed"
        )
    return label_codes(labels, classes), classes


def limit_labels(codes: np.ndarray, cells, per_type: int, seed: int) -> np.ndarray:
    """Class numbers with those of all but `per_type` training cells of each type taken away, to learn from few labels.

    Parameters
    ----------
    codes : [cells] class numbers, -1 for none
    cells : utils.data.read.Cells
    per_type : 0 for all; validation and test cells keep theirs in any case
    seed : of the draw, which depends on barcodes but not on their order

    Returns
    -------
    [cells] int64
    """
    if not per_type:
        return codes
    train = cells.rows("train")
    draw = pd.util.hash_array(np.asarray([f"{seed} {barcode}" for barcode in cells.obs.index[train]], dtype=object))
    place = pd.DataFrame({"code": codes[train], "draw": draw}).groupby("code")["draw"].rank(method="first")
    codes = codes.copy()
    codes[train[place.to_numpy() > per_type]] = -1
    return codes


def label_codes(labels, classes: list[str]) -> np.ndarray:
    """[cells] int64 position of each label in `classes`, -1 where it is not there."""
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number.get(label, -1) for label in labels], dtype=np.int64)


def class_weights(labels: np.ndarray, n_classes: int, balance: float) -> torch.Tensor | None:
    """Weights proportional to (1 / class size)^balance whose mean over the cells is 1; None for no balance.

    Parameters
    ----------
    labels : [cells] int class of the training cells
    """
    if balance == 0:
        return None
    size = np.maximum(np.bincount(labels, minlength=n_classes), 1)
    weight = size ** -float(balance)
    return torch.from_numpy((weight * size.sum() / (weight * size).sum()).astype(np.float32))
