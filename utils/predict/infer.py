"""Running a trained model on cells: results come back in the file's order, from any number of processes."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models.minibatch import Minibatch
from models.scmomer import ScMomer
from models.shapes import MODALITIES
from utils.cells.minibatches import CellDataset, LengthPlan, make_loader
from utils.errors import UserError
from utils.files.disk_rows import Rows, select
from utils.memory import release_memory
from utils.progress import progress_bar
from utils.train.config import InferConfig
from utils.train.distributed import Runtime
from utils.train.model_folder import SavedModel
from utils.train.sums import read_together

if TYPE_CHECKING:  # running a model needs no file formats
    from utils.predict.query import Query


class CellByCell(TorchFunctionMode):
    """Within the block, linear layers compute one matrix product per cell, in one batched call.

    In one product over all cells, libraries choose the order of summation by the number of rows, so a cell's result
    would depend on the size of its minibatch in the last bits. A product per cell makes it independent. With many
    tokens per cell the cost is the same. A layer on single vectors is slower, and is computed in float32 (in bfloat16
    the library would copy the weights for every cell).
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.linear:
            return function(*args, **(kwargs or {}))
        return self._linear(*args, **(kwargs or {}))

    @staticmethod
    def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B, …, in] → [B, …, out]"""
        cells = input.reshape(len(input), -1, input.shape[-1])
        device, autocast = input.device.type, torch.is_autocast_enabled(input.device.type)
        if autocast and cells.shape[1] == 1:
            cells, weight, bias = cells.float(), weight.float(), None if bias is None else bias.float()
            autocast = False
        weights = weight.t().expand(len(input), -1, -1)
        with torch.autocast(device, enabled=autocast):
            out = torch.bmm(cells, weights) if bias is None else torch.baddbmm(bias, cells, weights)
        return out.reshape(*input.shape[:-1], len(weight))


@torch.no_grad()
def stream(
    function: Callable[[Minibatch], tuple[Tensor, ...]],
    model: torch.nn.Module,
    dataset: CellDataset,
    config: InferConfig,
    runtime: Runtime,
    title: str,
    progress: bool = True,
) -> Iterator[tuple[Minibatch, tuple[Tensor, ...]]]:
    """Yield each minibatch of this process, on the model's device, with the outputs of `function`.

    Parameters are those of `infer`. A cell of weight 0 repeats another one: leave it out.
    """
    model.to(runtime.device).eval()
    plan = LengthPlan(dataset.lengths, config.batch_size, runtime.rank, runtime.world_size)
    bar = progress_bar(len(dataset), title, shown=runtime.is_main and progress)
    for batch in make_loader(dataset, plan, runtime.device):
        n_cells = int((batch.weight > 0).sum()) * runtime.world_size
        batch = batch.to(runtime.device)
        autocast = torch.autocast(runtime.device.type, torch.bfloat16, enabled=config.precision == "bf16")
        with autocast, CellByCell() if runtime.device.type == "cpu" else nullcontext():
            outputs = function(batch)
        yield batch, outputs
        bar.update(n_cells)
    bar.close()


def infer(
    function: Callable[[Minibatch], tuple[Tensor, ...]],
    model: torch.nn.Module,
    dataset: CellDataset,
    config: InferConfig,
    runtime: Runtime,
    title: str,
    progress: bool = True,
) -> tuple[np.ndarray, ...]:
    """Apply a function of the model to all cells.

    Parameters
    ----------
    function : minibatch of B cells → tensors [B, …]
    model : the module that the function calls; it is moved to the device and put into eval mode
    dataset, config, runtime : which cells, how, and on which processes
    title, progress : title of the progress bar, and whether there is one

    Returns
    -------
    One float32 array [cells, …] per tensor, rows in the dataset's order. On a CPU a cell's row is the same to the bit
    for any minibatch size, any other cells and any number of processes.

    Raises
    ------
    UserError
        If a result is not finite; the message names the cells.
    """
    rows, results = [], []
    for batch, outputs in stream(function, model, dataset, config, runtime, title, progress):
        real = (batch.weight > 0).cpu()
        rows.append(batch.row.cpu()[real].numpy())
        results.append([output[real].numpy() for output in read_together(outputs)])
    mine = (np.concatenate(rows), [np.concatenate(parts) for parts in zip(*results, strict=True)]) if rows else None
    shares = [share for share in runtime.gather(mine) if share is not None]  # a process may have got no cells
    order = np.argsort(np.concatenate([rows for rows, _ in shares]), kind="stable")
    found = tuple(np.concatenate(parts)[order] for parts in zip(*(arrays for _, arrays in shares), strict=True))
    bad = np.zeros(len(dataset), dtype=bool)
    for array in found:
        bad |= ~np.isfinite(array).reshape(len(array), -1).all(1)
    if bad.any():
        named = ", ".join(map(str, dataset.barcodes[bad][:3]))
        raise UserError(
            f"{title}: the model gives values that are not finite for {bad.sum():,} of {len(bad):,} cells ({named}); "
            "use --precision fp32, look at these cells, or train the model again"
        )
    return found


def embed_sample(
    model: ScMomer, dataset: CellDataset, config: InferConfig, runtime: Runtime, seed: int, n: int = 2**13
) -> Tensor:
    """[at most n, latent_dim] embeddings of cells drawn by barcode from a dataset, the same on every process."""
    by_barcode = np.argsort(dataset.barcodes.astype(str), kind="stable")
    rows = np.sort(by_barcode[np.random.default_rng(seed).permutation(len(dataset))[:n]])
    sample = CellDataset(
        {name: select(matrix, rows) for name, matrix in dataset.values.items()}, dataset.barcodes[rows]
    )
    (embeddings,) = infer(lambda batch: (model.embed(batch),), model, sample, config, runtime, "embedding")
    return torch.from_numpy(embeddings)


@dataclass
class Prediction:
    """Predictions of a model with a head.

    Attributes
    ----------
    values : name → [cells, …], as its task names them (for cell types: predicted_cell_type, confidence, probability)
    embedding : [cells, latent_dim]
    latents : modality → [cells, latent_dim], measured or the student's; empty if not asked for
    """

    values: dict[str, np.ndarray]
    embedding: np.ndarray
    latents: dict[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[name]


def decode(
    saved: SavedModel,
    dataset: CellDataset,
    config: InferConfig,
    runtime: Runtime,
    title: str,
    with_latents: tuple[str, ...] = (),
    model: ScMomer | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Embeddings [cells, latent_dim] of a dataset, and what the model's head decodes, name → [cells, …].

    What the folder's task adds to it from the cells' values is added here, so that all that follows sees the same. The
    latents of the modalities `with_latents` [cells, latent_dim] are added under the names `latent rna` and so on.
    With a `model` from `saved.build()`, the cells are one block of many: the caller shows the progress.
    """
    is_block, model, names = model is not None, model or saved.build(), []

    def embed_and_decode(batch: Minibatch) -> tuple[Tensor, ...]:
        latents = model.latents(batch)
        embedding = model.fusion(latents)
        decoded = model.head.decode(model.head(embedding, batch.key, batch.condition))
        decoded = decoded | {f"latent {name}": latents[name] for name in with_latents}
        names[:] = decoded
        return embedding, *decoded.values()

    embedding, *decoded = infer(embed_and_decode, model, dataset, config, runtime, title, progress=not is_block)
    found = dict(zip(names, decoded, strict=True))
    return embedding, found | saved.task.decode_on_values(found, inputs_of(saved, dataset), saved.fitted, saved.arrays)


def inputs_of(saved: SavedModel, dataset: CellDataset) -> dict[str, Rows]:
    """The values of the modalities that a model reads, by name."""
    return {name: dataset.values[name] for name in saved.model_config.inputs}


def latents_of(saved: SavedModel) -> tuple[str, ...]:
    """The modalities whose latents a composed model knows: those it reads, and the one that its student predicts."""
    config = saved.model_config
    return tuple(name for name in MODALITIES if name in config.inputs or config.other_modality == "student")


def predict(
    saved: SavedModel,
    dataset: CellDataset,
    config: InferConfig,
    runtime: Runtime,
    choices: object = None,
    with_latents: bool = False,
    model: ScMomer | None = None,
) -> Prediction:
    """The predictions of a model folder with a head, for all cells of a dataset.

    Parameters
    ----------
    saved, dataset, config, runtime : the model, the cells, and how to run it
    choices : settings of the task's predictions (`LabelConfig` for cell types), or None for its defaults
    with_latents : keep the latent of each modality, too
    model : from `saved.build()`, for one block of many
    """
    names = latents_of(saved) if with_latents else ()
    embedding, decoded = decode(saved, dataset, config, runtime, "predicting", names, model)
    latents = {name: decoded.pop(f"latent {name}") for name in names}
    how = {} if choices is None else {"choices": choices}
    values = saved.task.predict(decoded | {"embedding": embedding}, saved.outputs, saved.fitted, **how)
    values |= saved.task.predict_on_values(saved.arrays, inputs_of(saved, dataset), values)
    return Prediction(values, embedding, latents)


def predict_blocks(
    saved: SavedModel,
    query: "Query",
    config: InferConfig,
    runtime: Runtime,
    choices: object = None,
) -> Iterator[tuple["Query", Prediction]]:
    """Predict for the cells of a file, of which a block is in memory at a time; processes take blocks in turn.

    Parameters
    ----------
    saved, query : the model, and the cells
    config, runtime, choices : as in `predict`

    Yields
    ------
    On every process, each block of cells and its predictions, in order

    Raises
    ------
    UserError
        If a result is not finite, on any process.
    """
    model, blocks = saved.build(), query.blocks(runtime.world_size)
    alone = replace(runtime, rank=0, world_size=1)

    def predict_block(rows: np.ndarray) -> Prediction:
        cells = query.take(rows).dataset()
        found = predict(saved, cells, config, alone, choices, with_latents=True, model=model)
        release_memory()
        return found

    with progress_bar(len(query), "predicting", shown=runtime.is_main) as bar:
        for rows, prediction in zip(blocks, runtime.in_turn(predict_block, blocks), strict=True):
            yield query.take(rows), prediction
            bar.update(len(rows))
