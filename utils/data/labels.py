"""Cell types as class numbers."""

import numpy as np
import torch

from utils.data.read import Cells
from utils.errors import UserError


def encode_labels(cells: Cells, column: str) -> tuple[np.ndarray, list[str]]:
    """Class numbers of all cells; the classes are those of the training cells, in alphabetical order.

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
    classes = sorted(set(labels.iloc[cells.rows("train")].dropna()))
    if len(classes) < 2:
        raise UserError(
            f"{cells.path}: training cells have {len(classes)} class(es) in {column}; at least 2 are needed"
        )
    return label_codes(labels, classes), classes


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
