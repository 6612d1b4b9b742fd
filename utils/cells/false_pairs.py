"""False pairs for stage II: the RNA of one cell with the ATAC of another."""

import numpy as np
import torch

from models.masking import mix
from models.objectives import FALSE_PAIR_SHARE


class FalsePairs:
    """Draws partners that are not known to be of the cell's own type, as a function of the cell's key alone.

    A partner is any other cell of the same group. Where both cells have a label, their labels differ. A cell without a
    label is a partner like any other: treated as one type of their own, the many unlabelled cells would all be given
    the ATAC of the few labelled ones.

    Parameters
    ----------
    n_cells : number of cells
    types : [cells] int type of each cell, -1 where unknown, or None where no label may be used
    groups : [cells] int batch or donor that partners must share, or None for any
    """

    def __init__(self, n_cells: int, types: np.ndarray | None = None, groups: np.ndarray | None = None):
        types = np.full(n_cells, -1) if types is None else np.asarray(types)
        groups = np.zeros(n_cells, np.int64) if groups is None else np.asarray(groups)
        # In this order a cell's group is one stretch, and the cells that it must not be paired with are one inside it:
        # those of its type, or itself alone.
        self.order = np.lexsort((types, groups))
        place = np.empty(n_cells, np.int64)
        place[self.order] = np.arange(n_cells)
        self.group_start, self.group_size = _stretches(groups[self.order], place)
        own_start, own_size = _stretches(groups[self.order] * (types.max(initial=-1) + 2) + types[self.order], place)
        unknown = types < 0
        self.own_start, self.own_size = np.where(unknown, place, own_start), np.where(unknown, 1, own_size)

    @property
    def n_partners(self) -> np.ndarray:
        """[cells] how many cells each may be paired with."""
        return self.group_size - self.own_size

    def draw(self, rows: np.ndarray, key: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """Whose ATAC each cell is shown with.

        Parameters
        ----------
        rows : [B] the cells
        key : [B] int64, their keys in this epoch

        Returns
        -------
        [B] the cells whose ATAC is shown, and [B] bool, whether it is their own; a cell without partners keeps its own
        """
        n_partners = self.n_partners[rows]
        bits = mix(key ^ 1).numpy().view(np.uint64) >> np.uint64(8)
        pick = self.group_start[rows] + (bits % np.maximum(n_partners, 1).astype(np.uint64)).astype(np.int64)
        pick += np.where(pick >= self.own_start[rows], self.own_size[rows], 0)  # step over the cell's own stretch
        coin = (mix(key ^ 2).numpy().view(np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        is_true = (coin >= FALSE_PAIR_SHARE) | (n_partners == 0)
        return np.where(is_true, rows, self.order[np.minimum(pick, len(self.order) - 1)]), torch.from_numpy(is_true)


def _stretches(sorted_values: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of the run of equal values that each cell lies in; cell i stands at `place[i]`."""
    _, start, number, size = np.unique(sorted_values, return_index=True, return_inverse=True, return_counts=True)
    return start[number][place], size[number][place]
