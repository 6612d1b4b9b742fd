"""A plain neural network for cell types, and a denoiser of expression that it can start from.

One hidden layer. Each training step leaves out a share of each cell's features (feature dropout), the strongest of the
simple ways to keep such a network from overfitting. Only non-zero values are read, so a step costs a few milliseconds.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import nn
from torch.nn import functional

HIDDEN, LATENT = 256, 64
"""Hidden units and latent of the denoiser. A narrow latent makes it find what genes have in common."""
MINIBATCH = 128
LEARNING_RATE = 1e-3
DENOISER_STEPS = 4000
DENOISER_DROPOUT = 0.5
MOST_EPOCHS = 200
"""No fit sees a cell more often, so that small data take little time."""
BLOCK = 4096


class Encoder(nn.Module):
    """Features → hidden units → a latent, or hidden units alone where `latent` is 0."""

    def __init__(self, n_features: int, hidden: int, latent: int = 0):
        super().__init__()
        self.first = nn.EmbeddingBag(n_features, hidden, mode="sum")  # a product with a sparse matrix
        nn.init.normal_(self.first.weight, std=n_features**-0.5)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.norm = nn.LayerNorm(hidden)
        self.last = nn.Sequential(nn.Linear(hidden, latent), nn.LayerNorm(latent)) if latent else nn.Identity()
        self.width = latent or hidden

    def forward(self, x: csr_matrix, keep: np.ndarray | None = None, scale: float = 1.0) -> torch.Tensor:
        """[cells, features] → [cells, width]; `keep` marks the non-zero values that are read."""
        columns, values, starts = x.indices, x.data, x.indptr[:-1]
        if keep is not None:
            starts = np.concatenate([[0], np.cumsum(keep)])[starts]
            columns, values = columns[keep], values[keep] * scale
        as_tensor = lambda array, kind: torch.from_numpy(np.ascontiguousarray(array, dtype=kind))
        summed = self.first(
            *(as_tensor(columns, np.int64), as_tensor(starts, np.int64)),
            per_sample_weights=as_tensor(values, np.float32),
        )
        return self.last(functional.gelu(self.norm(summed + self.bias)))


@dataclass
class DropoutMLP:
    """A fitted network, with the methods of a scikit-learn classifier."""

    classes_: np.ndarray
    encoder: Encoder
    head: nn.Linear

    def predict(self, x) -> np.ndarray:
        return self.classes_[self.predict_proba(x).argmax(1)]

    def predict_proba(self, x) -> np.ndarray:
        """[cells, classes]"""
        found = [np.zeros((0, len(self.classes_)), dtype=np.float32)]
        with torch.no_grad():
            for start in range(0, x.shape[0], BLOCK):
                hidden = self.encoder(csr_matrix(x[start : start + BLOCK]))
                found.append(self.head(hidden).softmax(1).numpy())
        return np.concatenate(found)


def fit_mlp(
    x,
    y: np.ndarray,
    seed: int,
    hidden: int = HIDDEN,
    dropout: float = 0.5,
    decay: float = 0.01,
    steps: int = 800,
    balance: float = 0.0,
    start: Encoder | None = None,
    start_rate: float = 1.0,
) -> DropoutMLP:
    """Fit the network by AdamW; the learning rate falls to zero along a half cosine.

    Parameters
    ----------
    x, y : values [cells, features] and labels [cells]
    seed : of the weights, the order of the cells and dropout
    hidden : units, unless `start` has some
    dropout : share of a cell's features that a step leaves out
    decay : weight decay
    steps : optimiser steps
    balance : a cell weighs (cells of its type)^-balance
    start : an encoder to begin with, of which a copy is trained; by default one with random weights
    start_rate : the learning rate of the encoder, as a multiple of the head's
    """
    classes, codes = np.unique(y, return_inverse=True)
    weight = torch.from_numpy(class_weights(codes, balance)).float()
    truth = torch.from_numpy(codes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(x.shape[1], hidden) if start is None else copy.deepcopy(start)
        head = nn.Linear(encoder.width, len(classes))

    def loss(rows: np.ndarray, part: csr_matrix, embedding: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(head(embedding), truth[rows], weight=weight)

    _train(encoder, head, loss, x, seed, dropout, decay, steps, start_rate)
    return DropoutMLP(classes, encoder, head)


def fit_denoiser(x, seed: int) -> Encoder:
    """Fit an encoder from which all features of a cell can be read, though it sees a half of them.

    Parameters
    ----------
    x : values [cells, features]; no label is used
    seed : as in :func:`fit_mlp`
    """
    x = csr_matrix(x)
    mean = np.asarray(x.mean(0)).ravel()
    deviation = np.sqrt(np.maximum(np.asarray(x.multiply(x).mean(0)).ravel() - mean**2, 0))
    scale = torch.from_numpy(deviation + deviation.mean() + 1e-6).float()  # rare features weigh less, common ones alike
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(x.shape[1], HIDDEN, LATENT)
        decoder = nn.Linear(LATENT, x.shape[1])
    with torch.no_grad():
        decoder.bias.copy_(torch.from_numpy(mean))

    def loss(rows: np.ndarray, part: csr_matrix, embedding: torch.Tensor) -> torch.Tensor:
        return ((decoder(embedding) - torch.from_numpy(part.toarray())) / scale).square().mean()

    _train(encoder, decoder, loss, x, seed, DENOISER_DROPOUT, 0.0, min(DENOISER_STEPS, most_steps(x.shape[0])))
    return encoder


def most_steps(n_cells: int) -> int:
    """Return the largest number of optimiser steps for so many cells."""
    return max(1, MOST_EPOCHS * n_cells // MINIBATCH)


def class_weights(codes: np.ndarray, balance: float) -> np.ndarray:
    """Return the weight of each class, (its number of cells)^-balance, with mean 1 over cells."""
    n = np.bincount(codes).astype(float)
    weight = n**-balance
    return weight * n.sum() / (weight * n).sum()


def _train(
    encoder: Encoder,
    head: nn.Linear,
    loss: Callable,
    x,
    seed: int,
    dropout: float,
    decay: float,
    steps: int,
    encoder_rate: float = 1.0,
) -> None:
    """Take the optimiser steps; each cell is seen once before any is seen again."""
    x = csr_matrix(x, dtype=np.float32)
    draw = np.random.default_rng(seed)
    rates = {head: LEARNING_RATE, encoder: LEARNING_RATE * encoder_rate}
    groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in rates.items() if rate]
    optimiser = torch.optim.AdamW(groups, weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    encoder.requires_grad_(encoder_rate > 0)
    order = np.zeros(0, dtype=np.int64)
    for _ in range(steps):
        while len(order) < min(MINIBATCH, x.shape[0]):
            order = np.concatenate([order, draw.permutation(x.shape[0])])
        rows, order = order[:MINIBATCH], order[MINIBATCH:]
        part = x[rows]
        keep = draw.random(part.nnz) >= dropout
        optimiser.zero_grad()
        loss(rows, part, encoder(part, keep, 1 / (1 - dropout))).backward()
        optimiser.step()
        schedule.step()
