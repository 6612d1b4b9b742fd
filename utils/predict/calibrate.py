"""After training, a task may fit constants on validation cells (for cell types, temperature, sets and novelty)."""

from dataclasses import replace
from pathlib import Path

from utils.cells.minibatches import CellDataset
from utils.predict.infer import decode, embed_sample
from utils.train.config import InferConfig
from utils.train.distributed import Runtime
from utils.train.folders import write_folder
from utils.train.lock import sole_writer
from utils.train.log import copy_log
from utils.train.model_folder import load_model


def calibrate(
    folder: Path,
    kind: str,
    val: CellDataset,
    config: InferConfig,
    runtime: Runtime,
    train: CellDataset | None = None,
) -> dict:
    """Let a trained model's task fit its constants on validation cells, and save them in the folder.

    Parameters
    ----------
    folder : the model that training has kept
    kind : name of its task
    val : cells with a target; the model was not trained on them
    config, runtime : how to run it
    train : the training cells, for a task that compares embeddings with theirs

    Returns
    -------
    What was fitted
    """
    saved, decoded, of_embeddings = load_model(folder, kind), {}, {}
    if len(val):
        embedding, decoded = decode(saved, val, config, runtime, "calibrating")
        if train is not None and saved.task.n_reference:
            sample = embed_sample(saved.build(), train, config, runtime, 0, saved.task.n_reference)
            of_embeddings = saved.task.fit_on_embeddings(sample.numpy(), embedding)
    fitted = saved.task.fit_after_training(decoded, val.targets, saved.outputs) | of_embeddings
    runtime.barrier()  # every process has read the folder before it is replaced
    with sole_writer(folder, runtime):
        if runtime.is_main:
            write_folder(folder, replace(saved, fitted=fitted).write)
            copy_log(folder)
    if text := saved.task.describe(fitted):
        runtime.say(text)
    runtime.barrier()
    return fitted
