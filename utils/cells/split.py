"""The one split: every cell is assigned to train, val or test when its file is made, and never again."""

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
    """Whole groups become test cells; of each cell type's other cells a share is drawn for validation.

    Parameters
    ----------
    obs : [cells] annotation
    val_fraction : share of the non-test cells of each type, 0 … 1
    seed : of the draw, which depends on barcodes but not on their order
    split_by, test_groups : column of `obs` (donor, batch …) and its values that are set aside for testing
    label_column : cell types to balance the draw by, if there

    Returns
    -------
    [cells] array of "train", "val", "test"

    Raises
    ------
    UserError
        If the column or a group is not there, or if no cell is left for training.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val_fraction {val_fraction} must be at least 0 and below 1")
    if bool(split_by) != bool(test_groups):
        raise UserError("--split_by and --test_groups go together: the column, and which of its values are test cells")
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
    # A cell's place in the draw follows from its barcode, so another order of cells is the same split.
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
    """What a split does to cell types: those that cannot be learned, and those that are not validated, a line each.

    Parameters
    ----------
    labels : [cells] cell types, whatever names none included
    split : [cells] of "train", "val", "test"
    """
    labels = clean_labels(labels).to_numpy()
    sizes = pd.crosstab(labels[~pd.isna(labels)], split[~pd.isna(labels)]).reindex(columns=SPLITS, fill_value=0)
    words = lambda types: (
        ", ".join(f"{name} ({sizes.loc[name].sum():,})" for name in types[:5]) + ", …" * (len(types) > 5)
    )
    unlearned, lines = sizes.index[sizes["train"] == 0], []
    if len(unlearned):
        lines.append(
            f"{len(unlearned):,} of {len(sizes):,} cell types have no training cell, so that no model can learn them: "
            f"{words(unlearned)}"
        )
    unseen = sizes.index[(sizes["val"] == 0) & (sizes["train"] > 0)]
    if len(unseen):
        lines.append(
            f"{len(unseen):,} of {len(sizes):,} cell types have no validation cell, so that their confidence is not "
            f"checked: {words(unseen)}"
        )
    return lines
