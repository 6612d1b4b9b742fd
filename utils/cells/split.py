"""The split into train, val and test. preprocess.py makes it once, and all later stages read it from the file."""

import numpy as np
import pandas as pd

from utils.cells.labels import clean_labels
from utils.errors import UserError

SPLITS = ("train", "val", "test")


def assign_split(
    obs: pd.DataFrame,
    val_fraction: float,
    seed: int,
    split_by: str | None = None,
    test_groups: str | None = None,
    label_column: str | None = None,
) -> np.ndarray:
    """Make whole groups test cells, and draw a share of each cell type's other cells for validation.

    Parameters
    ----------
    obs : [cells] annotation
    val_fraction : share of each type's cells outside the test groups, from 0 to below 1
    seed : random seed of the draw, which depends on the barcodes but not on their order
    split_by : column of `obs` (donor, batch …)
    test_groups : values of this column, separated by commas, whose cells are test cells
    label_column : column of `obs` with cell types; without it, the share is drawn from all cells together

    Returns
    -------
    [cells] "train", "val" or "test"

    Raises
    ------
    UserError
        If there is no such column or group, or if no cell is left for training.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val_fraction {val_fraction} must be at least 0 and below 1")
    if bool(split_by) != bool(test_groups):
        raise UserError("--split_by and --test_groups go together: a column, and which of its values are test cells")
    split = np.full(len(obs), "train", dtype=object)
    if split_by:
        if split_by not in obs:
            raise UserError(f"--split_by {split_by}: no such column; the file has {', '.join(map(str, obs.columns))}")
        group = obs[split_by].astype(str)
        wanted = {name.strip() for name in test_groups.split(",")}
        absent = sorted(wanted - set(group))
        if absent:
            raise UserError(
                f"--test_groups {','.join(absent)}: not in {split_by}, which has {', '.join(sorted(set(group)))}"
            )
        split[group.isin(wanted).to_numpy()] = "test"
    # Cells are drawn in the order of a hash of their barcodes, so the order of cells in the file does not matter.
    key = pd.util.hash_array(np.asarray([f"{seed} {barcode}" for barcode in obs.index], dtype=object))
    labels = clean_labels(obs[label_column]).fillna("").to_numpy() if label_column in obs else np.full(len(obs), "")
    for label in np.unique(labels):
        cells = np.flatnonzero((labels == label) & (split == "train"))
        cells = cells[np.argsort(key[cells], kind="stable")]
        split[cells[: round(val_fraction * len(cells))]] = "val"
    if not (split == "train").any():
        raise UserError("the split leaves no training cell; name fewer --test_groups or a smaller --val_fraction")
    return split


def types_that_lack_cells(labels: pd.Series, split: np.ndarray) -> list[str]:
    """Report cell types that have no training cell, and those that have no validation cell: a line each, if any.

    Parameters
    ----------
    labels : [cells] cell types; missing ones are ignored
    split : [cells] "train", "val" or "test"
    """
    labels = clean_labels(labels).to_numpy()
    sizes = pd.crosstab(labels[~pd.isna(labels)], split[~pd.isna(labels)]).reindex(columns=SPLITS, fill_value=0)
    unlearned, unchecked = sizes["train"] == 0, (sizes["val"] == 0) & (sizes["train"] > 0)
    lacking = {
        "no training cell, so no model can learn them": sizes.index[unlearned],
        "no validation cell, so their confidence cannot be checked": sizes.index[unchecked],
    }
    lines = []
    for lack, types in lacking.items():
        named = ", ".join(f"{name} ({sizes.loc[name].sum():,})" for name in types[:5]) + ", …" * (len(types) > 5)
        if len(types):
            lines.append(f"{len(types):,} of {len(sizes):,} cell types have {lack}: {named}")
    return lines
