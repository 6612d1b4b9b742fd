"""Which genes and peaks a model has used for a type, and a check of that answer: `predict_cell_type.py --explain N`.

The attribution of a gene (or peak) in a cell is gradient × input. The input is its presence, 1, in `Ragged.presence`;
the output is the calibrated log-odds of the cell's predicted type. So it says, to first order, by how much the log-odds
would fall without the gene. (The encoder reads whole bins of expression, so there is no gradient of the count itself.
Integrated gradients from a cell without counts predict removal worse: the latent is scaled to length 1, and most of the
path leads nowhere.) Attributions are averaged over cells of a type; a cell without the gene counts as 0.

The check removes the top features from other cells of the type, and, for comparison, random ones of equal expression.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from models.minibatch import Minibatch
from models.shapes import FEATURES
from utils.cells.minibatches import CellDataset
from utils.errors import UserError
from utils.evaluate.comparison import percentiles
from utils.evaluate.mixture import OURS
from utils.files.disk_rows import select
from utils.files.write import whole_file
from utils.predict.infer import decode, stream
from utils.predict.query import Query
from utils.train.config import InferConfig
from utils.train.distributed import Runtime
from utils.train.model_folder import SavedModel

CELLS = 50
"""Of each type, at most this many cells rank the features, and as many others check them; drawn at random."""
LEAST = 5
"""A type with fewer cells for the check is not checked."""
RANDOM_SETS = 5
"""Random sets of features that are removed for comparison."""
NEAREST = 8
"""A top feature is matched to one of this many other features whose mean value in the type is nearest to its own."""
GRADIENT_VALUES = 2**22
"""About how many values [cells, patches, width] one layer may hold for the gradient at a time: 16 MB."""
COLUMNS = ("type", "modality", "rank", "feature", "attribution", "cells")


@dataclass
class Explanation:
    """What a model has used, and whether it was so.

    Attributes
    ----------
    table : type, modality, rank (from 1), feature, attribution (log-odds per cell), and number of cells
    checks : type, modality, number of cells, and the mean fall of the confidence in the type without the top features,
        without random ones, their difference with its 95 % interval (low, high), whether the check holds: low > 0, and
        the mean value of the top and of the random features in the type, which should be alike
    n, seed : features per type and modality; of all draws
    share : weight of the model in its folder's mixture; None without one
    """

    table: pd.DataFrame
    checks: pd.DataFrame
    n: int
    seed: int
    share: float | None = None

    @property
    def lines(self) -> list[str]:
        """The check in words, a line for each modality, and one for each type that fails or was not checked."""
        lines = [self._line(row) for row in self.checks.itertuples() if row.type == ALL or not row.holds]
        checked = set(self.checks["type"])
        unchecked = [name for name in self.table["type"].unique() if name not in checked]
        if self.share is not None:
            lines.append(
                f"the attributions are those of the model alone, which has the weight {self.share:g} in the mixture "
                "that gives the probabilities; the check removes features from all members of it"
            )
        return lines + ([f"explanation not checked, too few cells: {', '.join(unchecked)}"] if unchecked else [])

    def _line(self, row) -> str:
        what = FEATURES[row.modality]
        verdict = "the check holds" if row.holds else f"THE CHECK FAILS, so do not believe these {what}"
        return (
            f"explanation of {row.type}: removing the top {self.n} {what} lowers the confidence by {row.top:.3f}, "
            f"removing as many random {what} of equal expression by {row.random:.3f} (difference {row.difference:.3f}, "
            f"95 % interval {row.low:.3f} to {row.high:.3f}; {row.cells:,} cells); {verdict}"
        )

    @property
    def entry(self) -> dict:
        """The explanation as an entry of uns."""
        tables = {"features": self.table, "checks": self.checks}
        tables = {name: table.set_axis(table.index.astype(str)) for name, table in tables.items()}
        return {"n": self.n, "seed": self.seed, **tables, "lines": np.array(self.lines, dtype=object)}

    def write(self, path: str | Path, comments: list[str]) -> None:
        """Write the table to .csv below comments, which the lines of the check join."""
        with whole_file(path) as partial, open(partial, "w", newline="") as file:
            file.writelines(f"# {' '.join(line.split())}\n" for line in [*comments, *self.lines])
            self.table.to_csv(file, index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")


ALL = "all types"
"""Stands for the cells of all checked types."""


def explained_path(path: str | Path) -> Path:
    """The table beside a labelled file: x.predicted.h5ad and x.h5ad both have x.explained.csv."""
    path = Path(path)
    return path.with_name(f"{path.stem.removesuffix('.predicted')}.explained.csv")


@dataclass
class Chosen:
    """The cells of one type: numbers of those that rank its features, and of those that check them."""

    code: int
    rank: np.ndarray
    check: np.ndarray
    top: dict[str, np.ndarray] = field(default_factory=dict)


def explain(
    saved: SavedModel,
    read: Callable[[np.ndarray], CellDataset],
    codes: np.ndarray,
    n: int,
    config: InferConfig | None = None,
    device: torch.device | None = None,
    seed: int = 0,
) -> Explanation:
    """Find the features that a cell type model uses most, for each predicted type, and check them.

    Memory is bounded: at most 2 · `CELLS` cells of a type are read.

    Parameters
    ----------
    saved : the model
    read : numbers of cells → these cells, with the modalities that the model reads
    codes : [cells] number of each cell's predicted type among `saved.outputs`; -1 for cells to leave out
    n : features of each modality to find, for each type
    config, device : how to run the model, in this process alone, and where; by default on the CPU
    seed : of all draws

    Raises
    ------
    UserError
        If the model knows one type only, or has no weight in its folder's mixture.
    """
    config = config or InferConfig()
    if len(saved.outputs) < 2:
        raise UserError(f"--explain {n}: {saved.path} knows one type only, so there is nothing to explain")
    share = saved.fitted.get("mixture", {}).get(OURS)
    if share == 0:
        raise UserError(
            f"--explain {n}: in the mixture of {saved.path} the model has no weight, so there is nothing to explain; "
            "run its fine-tuning again with --resume --mix_baselines no, which takes seconds"
        )
    runtime, rng = Runtime(device or torch.device("cpu")), np.random.default_rng(seed)
    types = choose_cells(codes, rng)
    every = np.concatenate([chosen.rank for chosen in types]) if types else np.arange(0)
    of_cell = np.repeat([chosen.code for chosen in types], [len(chosen.rank) for chosen in types])
    sums = attribute(saved, read(every), of_cell, config, runtime)
    rows = []
    for chosen in types:
        for modality, total in sums.items():
            mean = total[chosen.code] / len(chosen.rank)
            chosen.top[modality] = top = np.argsort(-mean, kind="stable")[:n][np.sort(-mean)[:n] < 0]
            rows += [
                (saved.outputs[chosen.code], modality, at, str(saved.features[modality][i]), mean[i], len(chosen.rank))
                for at, i in enumerate(top, 1)
            ]
    checks = self_check(saved, read, types, config, runtime, rng)
    return Explanation(pd.DataFrame(rows, columns=list(COLUMNS)), checks, n, seed, share)


def explain_query(query: Query, saved: SavedModel, labels: pd.Series, n: int, **how) -> Explanation:
    """Explain the types that the cells of a file were given.

    Parameters
    ----------
    query, saved : the cells as the model has read them, and the model
    labels : predicted types by barcode
    n, how : as for `explain`
    """
    codes = pd.Categorical(labels.reindex(query.barcodes), categories=saved.outputs).codes  # -1 for unassigned
    return explain(saved, lambda rows: query.take(rows).dataset(), codes.astype(int), n, **how)


def choose_cells(codes: np.ndarray, rng: np.random.Generator) -> list[Chosen]:
    """Draw the cells of each type: one half ranks, the other half checks; of one cell, it ranks."""
    found = []
    for code in np.unique(codes[codes >= 0]):
        cells = rng.permutation(np.flatnonzero(codes == code))[: 2 * CELLS]
        half = -(-len(cells) // 2)
        found.append(Chosen(int(code), np.sort(cells[:half]), np.sort(cells[half:])))
    return found


def take(dataset: CellDataset, rows: np.ndarray) -> CellDataset:
    """These cells of a dataset, in the order given."""
    values = {name: csr_matrix(select(matrix, rows)[:]) for name, matrix in dataset.values.items()}
    return CellDataset(values, dataset.barcodes[rows])


def log_odds(logits: Tensor, of: Tensor) -> Tensor:
    """[B] log-odds of one type for each cell, from [B, types] logits."""
    others = logits.scatter(1, of[:, None], -torch.inf)
    return logits.gather(1, of[:, None])[:, 0] - others.logsumexp(1)


def attribute(
    saved: SavedModel, dataset: CellDataset, codes: np.ndarray, config: InferConfig, runtime: Runtime
) -> dict[str, np.ndarray]:
    """Attributions, summed over the cells of each type.

    Parameters
    ----------
    saved, dataset, config, runtime : the model, the cells, how to run it and where
    codes : [cells] number of the type whose log-odds are attributed

    Returns
    -------
    modality → [types, features] float64
    """
    model = saved.build().requires_grad_(False)
    inputs, temperature = saved.model_config.inputs, saved.fitted.get("temperature", 1.0)
    temperature /= saved.fitted.get("mixture", {OURS: 1.0})[OURS]  # in a mixture, logits count by the model's weight
    wanted = torch.from_numpy(np.asarray(codes, dtype=np.int64)).to(runtime.device)
    sums = {name: np.zeros((len(saved.outputs), len(saved.features[name]))) for name in inputs}

    def gradients(batch: Minibatch) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            presence = {name: torch.ones_like(batch[name].values, requires_grad=True) for name in inputs}
            for name in inputs:
                batch[name].presence = presence[name]
            target = log_odds(model(batch)[1].float() / temperature, wanted[batch.row])
            return torch.autograd.grad(target.sum(), list(presence.values()), allow_unused=True, materialize_grads=True)

    config = InferConfig(min(config.batch_size, _cells_at_a_time(saved)), config.device, config.precision)
    for batch, found in stream(gradients, model, dataset, config, runtime, "explaining") if len(dataset) else ():
        for name, gradient in zip(inputs, found, strict=True):
            cells = batch[name]
            real = (batch.weight > 0)[cells.rows].cpu().numpy()
            at = wanted[batch.row][cells.rows].cpu().numpy()[real], cells.indices.cpu().numpy()[real]
            np.add.at(sums[name], at, gradient.double().cpu().numpy()[real])
    return sums


def _cells_at_a_time(saved: SavedModel) -> int:
    """Cells per gradient: that of peaks passes through all layers of the encoder, which keep their values for it."""
    shape = saved.config["atac"] if "atac" in saved.model_config.inputs else None
    return GRADIENT_VALUES if shape is None else max(1, GRADIENT_VALUES // (shape.n_patches * shape.dim))


def without(matrix: csr_matrix, features: np.ndarray) -> csr_matrix:
    """The cells without any value in these features."""
    out = matrix.copy()
    out.data[np.isin(out.indices, features)] = 0
    out.eliminate_zeros()
    return out


def random_match(mean: np.ndarray, top: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw for each top feature another one of nearly the same mean value, none twice, as far as there are enough.

    Parameters
    ----------
    mean : [features] mean values in the type
    top : numbers of the top features
    """
    free = np.flatnonzero(mean > 0)
    free, found = free[~np.isin(free, top)], []
    for feature in top[: len(free)]:
        near = np.argsort(np.abs(mean[free] - mean[feature]), kind="stable")[:NEAREST]
        at = rng.choice(near)
        found.append(free[at])
        free = np.delete(free, at)
    return np.array(found, dtype=int)


def self_check(
    saved: SavedModel,
    read: Callable[[np.ndarray], CellDataset],
    types: list[Chosen],
    config: InferConfig,
    runtime: Runtime,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Compare the confidence that is lost without the top features with that lost without random ones.

    The cells are not those that ranked the features. Random features are matched by their mean value in the type.
    Intervals are bootstrapped over cells, for all types within each type.

    Parameters
    ----------
    saved, read, config, runtime, rng : the model, the cells as in `explain`, how to run it, where, and the draws
    types : with the numbers of their `top` features

    Returns
    -------
    DataFrame as `Explanation.checks`, for each type with at least `LEAST` cells to check, and for all of them
    """
    rows = []
    types = [chosen for chosen in types if len(chosen.check) >= LEAST]
    for modality in saved.model_config.inputs if types else ():
        falls, means = {}, {}
        for chosen in types:
            cells = read(chosen.check)
            own = cells.values[modality]
            mean = np.asarray(own.mean(axis=0)).ravel()
            top = chosen.top[modality]
            removed = [np.arange(0), top, *(random_match(mean, top, rng) for _ in range(RANDOM_SETS))]
            values = {
                name: vstack([without(own, features) if name == modality else matrix for features in removed], "csr")
                for name, matrix in cells.values.items()
            }
            names = pd.Index([f"{i} {barcode}" for i in range(len(removed)) for barcode in cells.barcodes])
            _, decoded = decode(saved, CellDataset(values, names), config, runtime, "checking the explanation")
            found = saved.task.predict(decoded, saved.outputs, saved.fitted)["probability"][:, chosen.code]
            whole, without_top, *without_random = found.reshape(len(removed), -1).astype(float)
            name = saved.outputs[chosen.code]
            means[name] = np.array([mean[top].mean(), mean[np.concatenate(removed[2:])].mean()])
            falls[name] = np.stack([whole - without_top, whole - np.mean(without_random, 0)])
        drawn = {name: _bootstrap(fall[0] - fall[1], rng) for name, fall in falls.items()}
        sizes = np.array([fall.shape[1] for fall in falls.values()])
        falls[ALL] = np.concatenate(list(falls.values()), axis=1)
        drawn[ALL] = np.average(list(drawn.values()), axis=0, weights=sizes)
        means[ALL] = np.average(list(means.values()), axis=0, weights=sizes)
        for name, fall in falls.items():
            top, random = fall.mean(axis=1)
            low, high = percentiles(drawn[name])
            found = (fall.shape[1], top, random, top - random, low, high, bool(low > 0), *means[name])
            rows.append((name, modality, *found))
    columns = ["type", "modality", "cells", "top", "random", "difference", "low", "high", "holds"]
    columns += ["top_value", "random_value"]
    return pd.DataFrame(rows, columns=columns)


def _bootstrap(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[1000] means of the values drawn with replacement."""
    return values[rng.integers(0, len(values), (1000, len(values)))].mean(axis=1)
