"""Labelling new cells: from a file and a model folder to the file with predictions."""

from pathlib import Path

import anndata as ad
import mudata
import torch

from utils.cells.config import IngestConfig
from utils.cells.preprocessed import RawFile, open_cells
from utils.predict.annotate import Names, Query, read_query
from utils.predict.infer import predict
from utils.train.config import InferConfig, LabelConfig
from utils.train.distributed import Runtime
from utils.train.model_folder import SavedModel, load_model
from utils.train.tasks import TASKS


def label_cells(
    data: str | Path | RawFile,
    model: str | Path | SavedModel,
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
    model : folder of train_missing_celltype_func.py, or of another task
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
    runtime = runtime or Runtime(torch.device("cpu"))
    if not isinstance(data, RawFile):
        with open_cells(str(data), None, None) as file:
            return label_cells(file, model, prefix, ingest, config, runtime, choices)
    saved = model if isinstance(model, SavedModel) else load_model(model, *TASKS)
    return label_query(data, saved, prefix, ingest, config, runtime, choices)[0]


def label_query(
    data: RawFile,
    saved: SavedModel,
    prefix: str,
    ingest: IngestConfig | None,
    config: InferConfig | None,
    runtime: Runtime,
    choices: LabelConfig | None,
) -> tuple[ad.AnnData | mudata.MuData, Query]:
    """As `label_cells`, for an open file and a loaded model; also returns the cells as the model has read them."""
    names = Names.of(prefix, saved)
    replaced = names.claim(data)
    query = read_query(data, saved, ingest or IngestConfig(), progress=runtime.is_main)
    for line in query.report + saved.task.left_out(saved.fitted) + replaced:
        runtime.say(line)
    prediction = predict(saved, query.dataset, config or InferConfig(), runtime, choices, with_latents=True)
    return query.annotate(prediction, saved, names, choices), query
