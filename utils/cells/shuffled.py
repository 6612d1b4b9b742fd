"""A control: give each cell the ATAC of another one, so that pairs keep their batch and depth but not their biology."""

from dataclasses import replace

import numpy as np
import pandas as pd

from utils.cells.ingest import Ingested
from utils.errors import UserError

DEPTH_BINS = 10


def partners(obs: pd.DataFrame, column: str, depth: np.ndarray, seed: int = 0) -> np.ndarray:
    """Choose for each training and validation cell another one of the same split, group and decile of depth.

    Within such a set, in an order drawn at random, each cell is given the next one. So every cell serves once, and none
    is its own partner, unless it is alone in its set.

    Parameters
    ----------
    obs : [cells] annotation, with `split`; barcodes as index
    column : of `obs`, the groups (batch, donor) that stay together; cells without a value make a group of their own
    depth : [cells] what the deciles are of, such as the number of open peaks
    seed : of the draw, which depends on the barcodes but not on their order

    Returns
    -------
    [cells] positions; a test cell keeps its own
    """
    draw = pd.util.hash_array(np.asarray([f"{seed} {barcode}" for barcode in obs.index], dtype=object))
    table = pd.DataFrame({"group": obs[column].astype(str).to_numpy(), "split": obs["split"].to_numpy()})
    table["depth"], table["draw"] = np.asarray(depth), draw
    table["decile"] = (
        table.groupby(["group", "split"])["depth"].rank(method="average", pct=True).mul(DEPTH_BINS).apply(np.ceil)
    )
    found = np.arange(len(obs))
    for (_, split, _), part in table.groupby(["group", "split", "decile"]):
        if split != "test":
            rows = part.sort_values("draw", kind="stable").index.to_numpy()
            found[rows] = np.roll(rows, -1)
    return found


def shuffle_pairs(atac: Ingested, obs: pd.DataFrame, column: str, seed: int = 0) -> Ingested:
    """Return the ATAC with the cells of `partners`, under the barcodes that they had before.

    Parameters
    ----------
    atac : what was ingested
    obs : [cells] annotation of the cells that are written, with their split
    column : of `obs`, the groups within which ATAC is exchanged
    seed : of the draw

    Raises
    ------
    UserError
        If `obs` has no such column.
    """
    if column not in obs:
        raise UserError(f"--shuffle_pairs {column}: no such column; the file has {', '.join(map(str, obs.columns))}")
    # Only measured cells take part; the others are not written.
    place = np.flatnonzero(atac.measured & atac.barcodes.isin(obs.index))
    order = np.arange(len(atac.barcodes))
    order[place] = place[partners(obs.loc[atac.barcodes[place]], column, atac.n_expressed[place], seed)]
    sums = {name: getattr(atac, name)[order] for name in ("totals", "all_totals", "n_expressed")}
    return replace(atac, source=atac.source.take(order, atac.barcodes), **sums)
