"""Cells in memory, opened as a file of cells is."""

from pathlib import Path

import anndata as ad
import mudata

from utils.cells.annotation import annotation_of
from utils.cells.preprocessed import SIMULATED, STAMP, RawFile, stamp_in
from utils.errors import UserError
from utils.files.open_any import sources_in_memory

NAME = Path("the cells in memory")
"""Stands for the file's name in messages."""


def open_in_memory(cells: ad.AnnData | mudata.MuData) -> RawFile:
    """Open cells in memory; nothing is copied, and they stay as they are.

    Parameters
    ----------
    cells : AnnData with genes or peaks, or both by `var["feature_types"]`; or MuData with RNA, ATAC or both

    Raises
    ------
    UserError
        If they hold neither RNA nor ATAC, or their values are still on disk (backed).
    """
    if cells.isbacked:
        raise UserError(
            f"{NAME}: their values are still on disk (backed); load them (adata.to_memory()), or give "
            "label_cells of utils/predict/label.py the path of the file"
        )
    is_multi = isinstance(cells, mudata.MuData)
    sources = sources_in_memory(cells, NAME)
    obs = annotation_of(cells.obs.copy() if is_multi else None, sources)
    parts = (cells, *cells.mod.values()) if is_multi else (cells,)
    stamp = stamp_in(cells.uns.get(STAMP))
    simulated = any(SIMULATED in part.uns for part in parts) or bool((stamp or {}).get("simulated"))
    holds_all = is_multi or len(sources) == 1
    kind = ".h5mu" if is_multi else "in memory"
    return RawFile(NAME, kind, sources, obs, stamp, simulated, root=cells if holds_all else None)
