"""False pairs for stage II: the RNA of one cell with the ATAC of another."""

import numpy as np
import torch

from models.masking import mix
from models.objectives import FALSE_PAIR_SHARE


class FalsePairs:
    """Draws for each cell a partner whose ATAC it is shown with; the draw depends on the cell's key alone.

    A partner is any other cell of the same group that does not have the same label. Cells without a label can be
    partners of all others. (If they counted as one type, the many unlabelled cells would all be paired with the few
    labelled ones, and a model could recognise a false pair by its ATAC alone.)

    Parameters
    ----------
    n_cells : number of cells
    types : [cells] int type of each cell, -1 where unknown; None if no label may be used
    groups : [cells] int batch or donor that partners must share; None if any cell may be a partner
    """

    def __init__(self, n_cells: int, types: np.ndarray | None = None, groups: np.ndarray | None = None):
        types = np.full(n_cells, -1) if types is None else np.asarray(types)
        groups = np.zeros(n_cells, np.int64) if groups is None else np.asarray(groups)
        # Sorted by group, then type: the cells of a group are one run. Inside it, the cells that a cell must not be
        # paired with are one run too: those of its type, or the cell itself if its type is unknown.
        self.order = np.lexsort((types, groups))
        place = np.empty(n_cells, np.int64)
        place[self.order] = np.arange(n_cells)
        self.group_start, self.group_size = _runs(groups[self.order], place)
        own_start, own_size = _runs(groups[self.order] * (types.max(initial=-1) + 2) + types[self.order], place)
        unknown = types < 0
        self.own_start, self.own_size = np.where(unknown, place, own_start), np.where(unknown, 1, own_size)

    @property
    def n_partners(self) -> np.ndarray:
        """[cells] number of partners that each cell may be paired with."""
        return self.group_size - self.own_size

    def draw(self, rows: np.ndarray, key: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """Choose the cell whose ATAC each cell is shown with: itself, or a partner.

        Parameters
        ----------
        rows : [B] the cells
        key : [B] int64, their keys in this epoch

        Returns
        -------
        [B] cells whose ATAC is shown; [B] bool, True for true pairs. A cell without partners always is a true pair.
        """
        n_partners = self.n_partners[rows]
        # The key is hashed twice, with different bits flipped, for two independent draws: the partner and the coin.
        bits = mix(key ^ 1).numpy().view(np.uint64) >> np.uint64(8)
        pick = self.group_start[rows] + (bits % np.maximum(n_partners, 1).astype(np.uint64)).astype(np.int64)
        # Skip the run of cells that it must not be paired with.
        pick += np.where(pick >= self.own_start[rows], self.own_size[rows], 0)
        # The upper 53 bits, as many as a float64 holds, times 2^-53: uniform in [0, 1).
        coin = (mix(key ^ 2).numpy().view(np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        is_true = (coin >= FALSE_PAIR_SHARE) | (n_partners == 0)
        return np.where(is_true, rows, self.order[np.minimum(pick, len(self.order) - 1)]), torch.from_numpy(is_true)


def _runs(sorted_values: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return start and length of the run of equal values that holds each cell; cell i is at `place[i]`."""
    _, start, number, size = np.unique(sorted_values, return_index=True, return_inverse=True, return_counts=True)
    return start[number][place], size[number][place]
