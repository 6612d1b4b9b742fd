"""Minibatches: which cells, in which order, on which process, and with which data.

The order of an epoch is a function of (seed, epoch) alone. Within an optimiser step, cells are sorted by their number
of expressed genes before they are dealt to micro-batches and processes: the gradient is the same sum in another order,
and little time goes into padding.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from models.masking import mix
from models.minibatch import Minibatch, Ragged
from utils.cells.false_pairs import FalsePairs
from utils.files.disk_rows import Rows, hashes_of, row_lengths, select, shuffled

AHEAD = 2
"""Number of minibatches made ahead of their use."""


@dataclass(frozen=True)
class MicroBatch:
    """The cells of one forward pass.

    Attributes
    ----------
    rows : [B] positions in the dataset
    weight : [B] 1 for a cell, 0 for padding
    epoch : the epoch for the cells' keys
    step_cells : number of cells in the whole optimiser step
    padded_length : number of tokens to which each cell is padded; 0 for that of the longest cell
    """

    rows: np.ndarray
    weight: np.ndarray
    epoch: int
    step_cells: int
    padded_length: int = 0


class Plan:
    """The order of an epoch, cut into optimiser steps, micro-batches and this process's share of them.

    Iterating yields `micro_batches` MicroBatches per step, equally many on every process: where cells run out,
    repeats of weight 0 pad the step.

    Parameters
    ----------
    lengths : [cells] int, tokens of each cell
    batch_size : cells per micro-batch and process
    micro_batches : micro-batches per optimiser step
    rank, world_size : this process and how many there are
    seed : seed of the order
    shuffle : False keeps the file's order, except for the sorting by length within a step
    """

    def __init__(self, lengths, batch_size, micro_batches=1, rank=0, world_size=1, seed=0, shuffle=False):
        self.lengths = np.asarray(lengths)
        self.batch_size, self.micro_batches = batch_size, micro_batches
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self.epoch, self.first_step = 0, 0

    @property
    def step_size(self) -> int:
        """Cells per optimiser step, over all micro-batches and processes."""
        return self.batch_size * self.micro_batches * self.world_size

    @property
    def n_steps(self) -> int:
        """Optimiser steps per epoch."""
        return -(-len(self.lengths) // self.step_size)

    def __len__(self) -> int:
        return (self.n_steps - self.first_step) * self.micro_batches

    def __iter__(self) -> Iterator[MicroBatch]:
        order = np.arange(len(self.lengths))
        if self.shuffle:
            order = shuffled(len(order), np.random.default_rng([self.seed, self.epoch]))
        for step in range(self.first_step, self.n_steps):
            cells = order[step * self.step_size : (step + 1) * self.step_size]
            cells = cells[np.argsort(self.lengths[cells], kind="stable")]
            weight = np.zeros(self.step_size, np.float32)
            weight[: len(cells)] = 1.0
            filled = np.resize(cells, self.step_size)
            for start in range(0, self.step_size, self.batch_size * self.world_size):
                mine = slice(start + self.rank, start + self.batch_size * self.world_size, self.world_size)
                yield MicroBatch(filled[mine], weight[mine], self.epoch, len(cells))


def padded_length(lengths: np.ndarray) -> np.ndarray:
    """Padded length of each cell at inference, a function of its own length alone.

    The next of 8 steps between powers of two, at least 64.
    """
    step = 2 ** np.maximum(np.ceil(np.log2(np.maximum(lengths, 1))) - 4, 3).astype(np.int64)
    return np.maximum(-(-np.asarray(lengths) // step) * step, 64)


class LengthPlan:
    """Every cell once, in minibatches of cells that are padded alike, and this process's share of them.

    A cell's tensors then have the same shape in any minibatch, which is what bit-equal results need. One cell alone is
    taken twice, because libraries multiply single matrices by other routes than several.

    Parameters
    ----------
    lengths : [cells] int, tokens of each cell at most
    batch_size : cells per minibatch
    rank, world_size : this process and how many there are
    """

    def __init__(self, lengths, batch_size, rank=0, world_size=1):
        padded = padded_length(lengths)
        self.micro_batches = []
        for length in np.unique(padded):
            cells = np.flatnonzero(padded == length)
            for start in range(0, len(cells), batch_size):
                rows = cells[start : start + batch_size]
                weight = np.ones(max(len(rows), 2), np.float32)
                weight[len(rows) :] = 0.0
                self.micro_batches.append(
                    MicroBatch(np.resize(rows, len(weight)), weight, 0, len(rows), padded_length=int(length))
                )
        self.micro_batches = self.micro_batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)


class CellDataset:
    """The cells of one split, as minibatches.

    Parameters
    ----------
    values : modality → [cells, features] of the same cells, in memory or on disk; empty if `latents` has all that the
        model reads
    barcodes : [cells]
    seed : seed of the cells' keys
    targets : name → [cells, …], what a head learns to predict, or None
    latents : modality → [cells, latent_dim], the teacher's latents, or "cell" → embeddings, or None
    pairs : draws another cell's ATAC for about half of the cells; None gives each cell its own
    resample : True gives a cell a new key in every epoch; False keeps one key, for validation
    conditions : name → [cells, …], what a head is given besides the cell, or None
    """

    def __init__(
        self,
        values: dict[str, Rows],
        barcodes: pd.Index,
        seed: int = 0,
        targets: dict[str, np.ndarray] | None = None,
        latents: dict[str, np.ndarray] | None = None,
        pairs: FalsePairs | None = None,
        resample: bool = True,
        conditions: dict[str, np.ndarray] | None = None,
    ):
        self.values, self.targets, self.latents, self.conditions = values, targets, latents, conditions
        self.seed, self.pairs, self.resample = seed, pairs, resample
        self.barcodes = np.asarray(barcodes, dtype=object)
        self.barcode_hash = torch.from_numpy(pd.util.hash_array(self.barcodes).view(np.int64))

    def __len__(self) -> int:
        return len(self.barcode_hash)

    @property
    def lengths(self) -> np.ndarray:
        """[cells] number of expressed genes (or of open peaks, where there is no RNA); 1 where nothing is measured."""
        if not self.values:
            return np.ones(len(self), dtype=np.int64)
        return row_lengths(self.values.get("rna", next(iter(self.values.values()))))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of barcodes, conditions and hashes of measured values (or of what stands for these)."""
        digest = hashlib.sha256(self.barcode_hash.numpy().tobytes())
        for name in sorted(self.values):
            digest.update(hashes_of(self.values[name]).tobytes())
        for arrays in (self.conditions, None if self.values else self.latents):
            for name in sorted(arrays or ()):
                digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8))
        return digest.hexdigest()

    def keys(self, rows: np.ndarray, epoch: int) -> torch.Tensor:
        """[B] int64, a function of (seed, epoch, barcode) alone."""
        draw = epoch + 1 if self.resample else 0
        return mix(
            self.barcode_hash[torch.from_numpy(rows)] ^ mix(torch.tensor((self.seed * 1_000_003 + draw) % 2**63))
        )

    def __getitem__(self, cells: MicroBatch) -> Minibatch:
        rows = cells.rows
        batch = Minibatch(
            row=torch.from_numpy(rows),
            key=self.keys(rows, cells.epoch),
            weight=torch.from_numpy(cells.weight),
            step_cells=cells.step_cells,
        )
        if "rna" in self.values:
            batch.rna = replace(ragged(self.values["rna"], rows), padded_length=cells.padded_length)
        if self.targets is not None:
            batch.target = {name: torch.from_numpy(target[rows]) for name, target in self.targets.items()}
        if self.conditions is not None:
            batch.condition = {name: torch.from_numpy(given[rows]) for name, given in self.conditions.items()}
        if self.latents is not None:
            batch.latent = {name: torch.from_numpy(latent[rows]) for name, latent in self.latents.items()}
        atac_rows = rows
        if self.pairs is not None:
            atac_rows, batch.true_pair = self.pairs.draw(rows, batch.key)
        if "atac" in self.values:
            batch.atac = ragged(self.values["atac"], atac_rows)
        return batch


def ragged(matrix: Rows, rows: np.ndarray) -> Ragged:
    """These rows of a matrix as tensors, still sparse."""
    part = matrix[rows]
    return Ragged(
        torch.from_numpy(part.indices.astype(np.int64)),
        torch.from_numpy(part.data),
        torch.from_numpy(part.indptr.astype(np.int64)),
        part.shape[1],
        longest=max(int(np.diff(part.indptr).max(initial=1)), 1),
    )


def make_loader(
    dataset: CellDataset, plan: Plan | LengthPlan, device: torch.device | str = "cpu"
) -> Iterator[Minibatch]:
    """The minibatches of `plan`, made by a thread while the model computes on the one before.

    Reading and copying release Python's lock, so a thread is enough; worker processes would spend more time on passing
    tensors than they save.
    """
    with ThreadPoolExecutor(1, "loader") as pool:
        coming = deque()
        for cells in plan:
            coming.append(pool.submit(_make, dataset, cells, torch.device(device).type == "cuda"))
            if len(coming) > AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _make(dataset: CellDataset, cells: MicroBatch, pin_memory: bool) -> Minibatch:
    return dataset[cells].pin_memory() if pin_memory else dataset[cells]


def train_and_val(
    cells,
    seed: int,
    keep: np.ndarray | None = None,
    targets: dict[str, np.ndarray] | None = None,
    latents: dict[str, np.ndarray] | None = None,
    pairs: tuple[np.ndarray | None, np.ndarray | None] | None = None,
) -> tuple[CellDataset, CellDataset]:
    """The training and validation cells of a file as datasets.

    Parameters
    ----------
    cells : utils.cells.preprocessed.Cells
    seed : seed of masks and pairs; validation cells keep the same mask in every epoch
    keep : [cells] bool, cells to use, or None for all
    targets : name → [cells, …], what a head learns to predict, or None
    latents : modality → [cells, latent_dim], or None
    pairs : the cells' (types, groups) for `FalsePairs`, each [cells] or None; None for true pairs only
    """
    cells.need_training()
    datasets = []
    for split in ("train", "val"):
        rows = cells.rows(split)
        rows = rows if keep is None else rows[keep[rows]]
        datasets.append(
            CellDataset(
                {name: select(matrix, rows) for name, matrix in cells.values.items()},
                cells.obs.index[rows],
                seed,
                targets=None if targets is None else {name: target[rows] for name, target in targets.items()},
                latents=None if latents is None else {name: latent[rows] for name, latent in latents.items()},
                pairs=None
                if pairs is None
                else FalsePairs(len(rows), *(None if p is None else p[rows] for p in pairs)),
                resample=split == "train",
            )
        )
    return datasets[0], datasets[1]
