"""After training, a task may fit constants on validation cells (for cell types, temperature, sets and novelty)."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from utils.cells.minibatches import CellDataset
from utils.evaluate.across import LeftOut
from utils.predict.infer import decode, embed_sample, inputs_of
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
    known: dict | None = None,
    left_out: LeftOut | None = None,
    mix: Literal["no", "auto", "yes"] = "no",
) -> dict:
    """Let a trained model's task fit its constants on validation cells, and save them in the folder.

    Parameters
    ----------
    folder : the model that training has kept
    kind : name of its task
    val : cells with a target; the model was not trained on them
    config, runtime : how to run it
    train : the training cells, for a task that compares new cells with them
    known : what is saved with the fitted constants, as it is (for cell types, the hierarchy)
    left_out : cells of batches that were left out, for a task that is calibrated across batches
    mix : whether the task mixes the model's predictions with those of what it fits on the cells' values; auto: if the
        validation cells say that this is better

    Returns
    -------
    What was fitted
    """
    # What an earlier call has fitted must not count: what the model decodes would hold its mixture.
    saved, decoded, of_embeddings = replace(load_model(folder, kind), fitted={}, arrays={}), {}, {}
    of_values, arrays = {}, {}
    if len(val):
        embedding, decoded = decode(saved, val, config, runtime, "calibrating")
        if train is not None and saved.task.n_reference:
            sample = embed_sample(saved.build(), train, config, runtime, 0, saved.task.n_reference)
            of_embeddings = saved.task.fit_on_embeddings(sample.numpy(), embedding)
    if train is not None:
        features = {name: saved.features[name] for name in saved.model_config.inputs}
        of_values, arrays = saved.task.fit_on_values(train, val, features, saved.outputs)
    if mix != "no" and len(val):
        values = inputs_of(saved, val)
        of_values |= saved.task.fit_mixture(decoded, val.targets, values, arrays, if_better=mix == "auto")
        decoded |= saved.task.decode_on_values(decoded, values, of_values, arrays)
    fitted = saved.task.fit_after_training(decoded, val.targets, saved.outputs) | of_embeddings | of_values
    if left_out is not None:
        fitted = saved.task.fit_across(fitted, left_out, decoded, val.targets, saved.outputs)
    fitted |= known or {}
    runtime.barrier()  # every process has read the folder before it is replaced
    with sole_writer(folder, runtime):
        if runtime.is_main:
            write_folder(folder, replace(saved, fitted=fitted, arrays=arrays).write)
            copy_log(folder)
    if text := saved.task.describe(fitted):
        runtime.say(text)
    runtime.barrier()
    return fitted
