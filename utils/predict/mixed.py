"""Files whose cells have RNA, ATAC or both: the first of several model folders that can read a cell labels it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from utils.cells.config import IngestConfig
from utils.cells.join import file_names
from utils.cells.preprocessed import RawFile, common_barcodes
from utils.errors import UserError
from utils.predict.query import Query, read_query
from utils.train.model_folder import SavedModel


@dataclass
class Share:
    """The cells of a file that one model folder labels.

    Attributes
    ----------
    saved, name : the folder, and its name, which differs from those of the other folders
    query : its cells; there may be none
    """

    saved: SavedModel
    name: str
    query: Query


def check_alike(models: list[SavedModel]) -> None:
    """Refuse folders whose predictions cannot stand in one column and one array.

    Raises
    ------
    UserError
        If they have other types or another width of the embedding than the first, or one is named twice.
    """
    first, *more = models
    if len({saved.path.resolve() for saved in models}) < len(models):
        raise UserError(f"--model_path {','.join(str(saved.path) for saved in models)}: names a folder twice")
    for saved in more:
        if (saved.kind, set(saved.outputs)) != (first.kind, set(first.outputs)):
            differ = sorted(set(saved.outputs) ^ set(first.outputs))
            raise UserError(
                f"--model_path: {first.path} and {saved.path} do not predict the same types (only one of them knows "
                f"{', '.join(differ[:5])}); give folders that were trained on the same labels"
            )
        widths = [model.model_config.fusion.latent_dim for model in (first, saved)]
        if widths[0] != widths[1] or saved.outputs != first.outputs:
            raise UserError(
                f"--model_path: {first.path} and {saved.path} have embeddings of different width ({widths[0]} and "
                f"{widths[1]}) or list their types in another order; give folders with one --latent_dim"
            )


def share_cells(
    file: RawFile, models: list[SavedModel], config: IngestConfig, progress: bool = False, in_turn: Callable = map
) -> list[Share]:
    """Read a file for one or several model folders, and choose the folder for each cell.

    A cell goes to the first folder for which it has counts in all modalities that the folder reads; a cell without
    counts goes to the first folder whose modalities hold it, which leaves it unassigned.

    Parameters
    ----------
    file, config, progress, in_turn : as in `read_query`
    models : one or several folders

    Returns
    -------
    One share per folder. With one folder, it has all cells that the folder can read

    Raises
    ------
    UserError
        As `read_query`; if the folders are not alike; if none can read any cell.
    """
    if len(models) == 1:
        return [Share(models[0], models[0].path.name, read_query(file, models[0], config, progress, None, in_turn))]
    check_alike(models)
    names, found = file_names([saved.path for saved in models]), []
    for saved, name in zip(models, names, strict=True):
        inputs = saved.model_config.inputs
        if set(inputs) <= file.modalities.keys() and len(common_barcodes(file.modalities, inputs)):
            found.append(Share(saved, name, read_query(file, saved, config, progress, None, in_turn)))
    if not found:
        raise UserError(
            f"{file.path}: holds {' and '.join(file.modalities)}, and no folder of --model_path reads such cells; "
            "name one that does"
        )
    rows = [file.obs.index.get_indexer(share.query.barcodes) for share in found]
    chosen = np.full(len(file.obs), -1)
    for with_counts in (True, False):
        for number, share in enumerate(found):
            fits = rows[number][~share.query.empty] if with_counts else rows[number]
            chosen[fits[chosen[fits] < 0]] = number
    return [
        Share(share.saved, share.name, share.query.take(np.flatnonzero(chosen[rows[number]] == number)))
        for number, share in enumerate(found)
    ]


def lines_about(shares: list[Share], file: RawFile) -> list[str]:
    """Report what was found, and how many cells are labelled by which folder or by none."""
    if len(shares) == 1:
        lines = list(shares[0].query.report)
    else:
        lines = [f"{share.name}: {line}" for share in shares for line in share.query.report]
        sizes = ", ".join(f"{len(share.query):,} by {share.name}" for share in shares)
        lines.append(f"{sum(len(share.query) for share in shares):,} of {len(file.obs):,} cells are labelled: {sizes}")
    left_out = len(file.obs) - sum(len(share.query) for share in shares)
    if left_out:
        reads = " or ".join(dict.fromkeys(" and ".join(share.saved.model_config.inputs) for share in shares))
        lines.append(
            f"{left_out:,} of {len(file.obs):,} cells were not measured in {reads} and get no prediction; --model_path "
            "takes several folders, separated by commas, for cells with other modalities"
        )
    if n_empty := sum(int(share.query.empty.sum()) for share in shares):
        lines.append(f"{n_empty:,} cells have no count in the model's features and stay unassigned")
    return lines
