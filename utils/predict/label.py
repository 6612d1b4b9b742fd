"""Labelling new cells: from a file and a model folder to the file with predictions."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import torch

from utils.cells.config import IngestConfig
from utils.cells.in_memory import open_in_memory
from utils.cells.preprocessed import RawFile, open_cells
from utils.files.additions import copied_file, parts_in_memory
from utils.files.write import write_whole
from utils.predict.infer import predict_blocks
from utils.predict.mixed import Share, lines_about, share_cells
from utils.predict.names import Names
from utils.predict.output import Output, provenance
from utils.train.config import InferConfig, LabelConfig
from utils.train.distributed import Runtime
from utils.train.model_folder import SavedModel, load_model
from utils.train.tasks import TASKS


@dataclass
class Labelled:
    """A file with predictions.

    Attributes
    ----------
    columns : [cells of the file] the predicted columns
    entry : what made them, as in uns
    names : the names that were written
    file : the input
    shares : the cells as each model folder has read them
    content : the whole file with its predictions, where it is in memory
    """

    columns: pd.DataFrame
    entry: dict
    names: Names
    file: RawFile
    shares: list[Share]
    content: ad.AnnData | mudata.MuData | None = None


def label_cells(
    data: str | Path | RawFile,
    model: str | Path | SavedModel | list,
    prefix: str = "",
    ingest: IngestConfig | None = None,
    config: InferConfig | None = None,
    runtime: Runtime | None = None,
    choices: LabelConfig | None = None,
) -> ad.AnnData | mudata.MuData:
    """Predict with a trained model folder, for all cells of a file.

        cells = label_cells("new_cells.h5ad", "runs/celltype")
        cells.obs[["predicted_cell_type", "confidence"]]

    Parameters
    ----------
    data : raw or preprocessed cells, a path or an open file
    model : folder of train_missing_celltype_func.py, or of another task; or a list of folders with the same types, of
        which the first that reads a cell's modalities labels it
    prefix : put before each name that is written
    ingest : overrides for what cannot be inferred from the file
    config, runtime : how to run the model; by default on the CPU
    choices : for cell types, the coverage of the sets and what is novel; by default those of predict_cell_type.py

    Returns
    -------
    The same cells in the same order with everything that the file holds, with the task's columns in obs, embeddings and
    probabilities in obsm, and a record of the model in uns

    Raises
    ------
    UserError
        If the file or the folder cannot be read, the file lacks the model's modality or most of its features, or has
        columns of its own under the names that are written.
    """
    if not isinstance(data, RawFile):
        with open_cells(str(data), None, None) as file:
            return label_cells(file, model, prefix, ingest, config, runtime, choices)
    saved = [
        one if isinstance(one, SavedModel) else load_model(one, *TASKS)
        for one in (model if isinstance(model, list) else [model])
    ]
    return label_file(data, saved, None, prefix, ingest, config, runtime, choices).content


def annotate(
    cells: ad.AnnData | mudata.MuData,
    model: str | Path | SavedModel | list,
    prefix: str = "",
    ingest: IngestConfig | None = None,
    config: InferConfig | None = None,
    runtime: Runtime | None = None,
    choices: LabelConfig | None = None,
) -> ad.AnnData | mudata.MuData:
    """Predict with a trained model folder, for cells in memory. No file is written, and the cells stay as they are.

        from utils.predict import annotate

        adata = annotate(adata, "reference/pbmc")
        adata.obs[["predicted_cell_type", "confidence"]]

    Parameters
    ----------
    cells : AnnData with the counts of genes or of peaks, or MuData with RNA, ATAC or both; what `label_cells` reads
        from a file, with the same results
    model, prefix, ingest, config, runtime, choices : as in `label_cells`

    Returns
    -------
    A copy of the cells with predictions, as `label_cells` returns it

    Raises
    ------
    UserError
        As `label_cells`.
    """
    return label_cells(open_in_memory(cells), model, prefix, ingest, config, runtime, choices)


def label_file(
    file: RawFile,
    saved: SavedModel | list[SavedModel],
    out_path: str | Path | None = None,
    prefix: str = "",
    ingest: IngestConfig | None = None,
    config: InferConfig | None = None,
    runtime: Runtime | None = None,
    choices: LabelConfig | None = None,
    more: Callable[[pd.Series, list[Share], dict], dict] | None = None,
) -> Labelled | None:
    """As `label_cells`, for an open file and loaded models.

    Parameters
    ----------
    saved : a model, or several of which the first that can read a cell labels it
    out_path : file to write, which only the first process does; for an .h5ad or .h5mu it is a copy of the input, to
        which the predictions are added, so that memory holds a block of the cells. None for the result in memory
    more : makes further entries for uns on the first process, from the first predicted column, the shares and the entry

    Returns
    -------
    The result; None on the other processes of a run that writes a file
    """
    runtime, models = runtime or Runtime(torch.device("cpu")), saved if isinstance(saved, list) else [saved]
    names = Names.of(prefix, *models)
    replaced = names.claim(file)
    shares = share_cells(file, models, ingest or IngestConfig(), runtime.is_main, runtime.in_turn)
    left_out = dict.fromkeys(line for share in shares for line in share.saved.task.left_out(share.saved.fitted))
    for line in [*lines_about(shares, file), *left_out, *replaced]:
        runtime.say(line)
    blocks = (
        (share, *found)
        for share in shares
        for found in predict_blocks(share.saved, share.query, config or InferConfig(), runtime, choices)
    )
    if out_path and not runtime.is_main:
        for _ in blocks:  # this process's share of the work
            pass
        return None
    with ExitStack() as stack:
        content = None
        if out_path and file.on_disk:
            parts = stack.enter_context(copied_file(file.path, out_path))
        else:
            content = file.content()
            parts = parts_in_memory(content)
        output = Output(parts, file, names, models[0].outputs)
        for share, block, prediction in blocks:
            output.add(share, block, prediction)
        entry = provenance(shares, names, choices)

        def last_entries(columns: pd.DataFrame) -> dict:
            bare = columns.rename(columns=lambda name: name.removeprefix(names.prefix))
            doubts = models[0].task.doubts_about(bare)
            for doubt in doubts:
                runtime.say(f"warning: {doubt}")
            entry["warnings"] = np.array([*entry["warnings"], *doubts], dtype=object)
            return more(bare[names.columns[0]], shares, entry) if more else {}

        columns = output.finish(entry, last_entries)
    if out_path and content is not None:
        write_whole(content, out_path)
    return Labelled(columns, entry, names, file, shares, content)
