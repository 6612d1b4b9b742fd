"""Cell types as class numbers."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from utils.errors import UserError

NO_TYPE = {"", "nan", "none", "na", "n/a", "<na>", "unassigned"}
"""Texts that mean a missing cell type, in lower case; predict_cell_type.py writes `unassigned` for empty cells."""
FEW, MOST_CLUSTERS, CELLS_PER_CLUSTER = 5, 200, 5
"""Numbers are accepted as cell types in two cases: at most FEW different ones, or, as for clusters, at most
MOST_CLUSTERS whole numbers with CELLS_PER_CLUSTER cells each on average."""
MANY = 20
"""A column with more cell types than this is checked for names that are nearly unique."""


def check_labels(obs: pd.DataFrame, column: str, path: str | Path, any_labels: bool = False) -> str:
    """Describe the cell types of a raw file in a sentence, or refuse them.

    Parameters
    ----------
    column : column of `obs`; only `cell_type`, the default, may be absent
    any_labels : accept numbers, and names that are nearly unique, as cell types

    Raises
    ------
    UserError
        If the column is absent, has only missing values, or does not look like cell types.
    """
    if column not in obs:
        if column != "cell_type":
            raise UserError(f"--label_column {column}: no such column; obs has {', '.join(map(str, obs.columns))}")
        return "no cell types"
    labels = clean_labels(obs[column])
    sizes = labels.value_counts()
    if not len(sizes):
        raise UserError(
            f"{path}: all {len(labels):,} values of obs[{column!r}] are missing; drop the column or name "
            "another one with --label_column"
        )
    if not any_labels:
        refuse_measurements(obs[column], column, path)
    words = f"{len(sizes):,} cell types in {column}"
    if labels.isna().any():
        words += f", {labels.isna().sum():,} cells without a label"
        named = obs[column][labels.isna() & obs[column].notna()].astype(str).value_counts()
        words += f" ({', '.join(f'{size:,} {name!r}' for name, size in named.items())})" if len(named) else ""
    if _are_numbers(obs[column]):
        words += "; they are numbers, taken as clusters"
    if len(sizes) == 1:
        words += "; a single type cannot be learned, but pretraining needs no types"
    alone = sizes.index[sizes == 1]
    if len(alone):
        named = ", ".join(alone[:5]) + (", …" if len(alone) > 5 else "")
        words += f"; types with only one cell, which cannot be validated: {named}"
    return words


def refuse_measurements(values: pd.Series, column: str, path: str | Path) -> None:
    """Refuse a column of measurements, or of names of single cells, as cell types.

    Raises
    ------
    UserError
        If it is one; the message names --any_labels, which makes preprocess.py accept it.
    """
    labels = clean_labels(values).dropna()
    n = labels.nunique()
    what = ""
    if _are_numbers(values) and n > FEW:
        numbers = pd.to_numeric(labels.drop_duplicates())
        if (numbers % 1 != 0).any() or n > MOST_CLUSTERS or len(labels) < CELLS_PER_CLUSTER * n:
            what = f"{n:,} different numbers"
    elif n > MANY and 2 * n > len(labels):
        what = f"{n:,} different names"
    if what:
        raise UserError(
            f"{path}: obs[{column!r}] holds {what} in {len(labels):,} cells, which do not look like cell types; name "
            "another column with --label_column, or give --any_labels to preprocess.py"
        )


def _are_numbers(values: pd.Series) -> bool:
    dtype = values.cat.categories.dtype if isinstance(values.dtype, pd.CategoricalDtype) else values.dtype
    return pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_bool_dtype(dtype)


def clean_labels(labels: pd.Series) -> pd.Series:
    """Labels as strings; NaN for those that name no cell type (missing, empty, `unassigned`)."""
    text = labels.astype(str)
    return text.where(labels.notna() & ~text.isin([name for name in text.unique() if _is_no_type(name)]))


def without_no_types(labels: pd.Series) -> pd.Series:
    """The labels, with those that name no cell type made missing, and without a category for them."""
    if isinstance(labels.dtype, pd.CategoricalDtype):
        return labels.cat.remove_categories([name for name in labels.cat.categories if _is_no_type(name)])
    return labels.where(clean_labels(labels).notna())


def _is_no_type(name) -> bool:
    return str(name).strip().lower() in NO_TYPE


def label_candidates(obs: pd.DataFrame, most: int = 6) -> dict[str, dict[str, int]]:
    """Columns that may hold cell types: text with 2 to 200 values, at most one per two cells; likely names first.

    Returns
    -------
    column → class → number of cells, largest class first
    """
    found = {}
    for column in obs.columns.drop("split", errors="ignore"):  # ours, in a preprocessed file
        values = obs[column]
        if values.dtype == object or isinstance(values.dtype, pd.CategoricalDtype | pd.StringDtype):
            sizes = clean_labels(values).value_counts()
            if 2 <= len(sizes) <= min(200, len(obs) / 2):
                found[str(column)] = {str(name): int(size) for name, size in sizes.items()}
    likely = [re.search("cell.?type|annot|label|class|lineage|cluster|leiden|louvain", name.lower()) for name in found]
    order = sorted(zip(found, likely, strict=True), key=lambda item: item[1] is None)
    return {name: found[name] for name, _ in order[:most]}


def encode_labels(cells, column: str) -> tuple[np.ndarray, list[str]]:
    """Class numbers of all cells. The classes are the labels of the training cells, in alphabetical order.

    Parameters
    ----------
    cells : utils.cells.preprocessed.Cells
    column : column of their obs

    Returns
    -------
    codes [cells] int64, -1 for cells without a label or with a label that no training cell has; and the classes

    Raises
    ------
    UserError
        If the column is absent or does not look like cell types, or the training cells have fewer than two classes.
    """
    labels = cells.labels(column)
    if labels is None:
        raise UserError(
            f"{cells.path}: no column {column!r} in obs, only {', '.join(map(str, cells.obs.columns))}; "
            "name the one with cell types with --label_column"
        )
    if column != cells.stamp.get("label_column"):  # preprocess.py has checked that one
        refuse_measurements(cells.obs[column], column, cells.path)
    cells.need_training()
    classes = sorted(set(labels.iloc[cells.rows("train")].dropna()))
    if len(classes) < 2:
        raise UserError(
            f"{cells.path}: training cells have {len(classes)} class(es) in {column}; at least 2 are needed"
        )
    return label_codes(labels, classes), classes


def limit_labels(codes: np.ndarray, cells, per_type: int, seed: int) -> np.ndarray:
    """Class numbers with at most `per_type` labelled training cells of each type; the other labels are hidden.

    Parameters
    ----------
    codes : [cells] class numbers, -1 for none
    cells : utils.cells.preprocessed.Cells
    per_type : 0 for all; validation and test cells always keep their labels
    seed : seed of the draw, which depends on the barcodes but not on their order

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
    """[cells] int64 position of each label in `classes`, -1 for labels that are not in it."""
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number.get(label, -1) for label in labels], dtype=np.int64)


def class_weights(labels: np.ndarray, n_classes: int, balance: float) -> torch.Tensor | None:
    """[n_classes] weights (1 / class size)^balance, scaled to a mean of 1 over the cells; None for no balance.

    Parameters
    ----------
    labels : [cells] int class of the training cells
    """
    if balance == 0:
        return None
    size = np.maximum(np.bincount(labels, minlength=n_classes), 1)
    weight = size ** -float(balance)
    return torch.from_numpy((weight * size.sum() / (weight * size).sum()).astype(np.float32))
