"""Train the head for perturbations on control cells' embeddings, and predict changes with it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from models.objectives import OnEmbeddings
from models.perturbation_head import NO_GENE, PerturbationConfig, PerturbationHead
from utils.cells.conditions import Changes, Perturbed
from utils.cells.minibatches import CellDataset
from utils.evaluate.perturbation import Conditions, Fold, correlations
from utils.features.gene_vectors import GeneVectors
from utils.train.distributed import Quiet
from utils.train.model_folder import SavedModel, load_model
from utils.train.stage import Stage
from utils.train.tasks import Trained, register

OWN_PENALTIES, MAP_PENALTIES, RANKS, EVENNESS = (0.01, 0.1, 0.5, 2.0), (0.3, 3.0, 30.0), (4, 12, 40), (0.0, 1.0, 2.0)
"""Settings of the head's start that are tried on validation conditions; without vectors, one penalty of the map."""


class Perturbation(Trained):
    """The change of expression that perturbed genes cause."""

    name = "perturbation"
    title = "a head that predicts what perturbed genes change (downstream/perturbation.py)"
    shape = PerturbationConfig
    head = PerturbationHead


PERTURBATION = register(Perturbation())


@dataclass(frozen=True)
class Start:
    """Settings of the head's start; see `PerturbationHead.start`."""

    own_penalty: float
    map_penalty: float
    rank: int
    evenness: float


@dataclass
class Study:
    """What all folds share.

    Attributes
    ----------
    cells : the perturbed cells and their controls
    change : [conditions, genes] measured changes
    control : [control cells] their numbers in `cells`, sorted
    embedding : [control cells, latent_dim] float32
    perturbed : all perturbed genes, whose numbers a condition holds
    vectors : [perturbed genes, width] float32, zeros for a gene without a vector
    encoder : the model that embedded the cells
    """

    cells: Perturbed
    change: np.ndarray
    control: np.ndarray
    embedding: np.ndarray
    perturbed: list[str]
    vectors: np.ndarray
    encoder: SavedModel

    @property
    def conditions(self) -> Conditions:
        """Line and perturbed genes of each condition."""
        return self.cells.conditions

    def numbers(self, conditions: list[tuple[str, ...]]) -> np.ndarray:
        """[conditions, K] int64 numbers of the perturbed genes, padded."""
        number = {gene: i for i, gene in enumerate(self.perturbed)}
        out = np.full((len(conditions), max(map(len, conditions))), NO_GENE, dtype=np.int64)
        for row, genes in zip(out, conditions, strict=True):
            row[: len(genes)] = [number[gene] for gene in genes]
        return out

    def sums(self, vectors: np.ndarray) -> np.ndarray:
        """[conditions, width] sums of vectors [perturbed genes, width] over each condition's genes."""
        padded = np.vstack([vectors, np.zeros_like(vectors[:1])])  # NO_GENE is the last row
        return padded[self.numbers([genes for _, genes in self.conditions])].sum(1)

    def shape(self, start: Start) -> PerturbationConfig:
        """Shape of a head with this start."""
        return PerturbationConfig(",".join(self.perturbed), self.vectors.shape[1], start.rank)

    def head(self, start: Start, train: np.ndarray, seed: int = 0) -> PerturbationHead:
        """A head at its start, from the mean changes of training conditions."""
        torch.manual_seed(seed)
        head = PERTURBATION.make_head(self.shape(start), self.cells.genes)(self.embedding.shape[1])
        head.vectors.copy_(torch.from_numpy(self.vectors))
        head.standardise(torch.from_numpy(self.embedding))
        genes = torch.from_numpy(self.numbers([self.conditions[i][1] for i in train]))
        change = torch.from_numpy(self.change[train])
        return head.start(genes, change, start.own_penalty, start.map_penalty, start.evenness)

    def dataset(self, conditions: np.ndarray, seed: int) -> CellDataset:
        """The cells of some conditions, each paired with a control cell of its line."""
        rows = np.flatnonzero(np.isin(self.cells.code, conditions))
        partner = np.searchsorted(self.control, self.cells.pair(np.random.default_rng(seed))[rows])
        genes = self.numbers([genes for _, genes in self.conditions])[self.cells.code[rows]]
        return CellDataset(
            {},
            self.cells.barcodes[rows],
            seed,
            targets={"change": Changes(self.cells, rows)},
            latents={"cell": self.embedding[partner]},
            conditions={"genes": genes},
        )

    @torch.no_grad()
    def predict(self, head: PerturbationHead, conditions: Conditions) -> np.ndarray:
        """[conditions, genes] change that a head predicts, averaged over the control cells of the line."""
        head.cpu().eval()
        out = []
        for line, genes in conditions:
            cells = torch.from_numpy(self.embedding[self.cells.line[self.control] == line])
            number = torch.from_numpy(self.numbers([genes])).expand(len(cells), -1)
            out.append(head(cells, None, {"genes": number}).double().mean(0).numpy())
        return np.stack(out)

    def choose_start(self, inner: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Start, float]:
        """The start with the best mean Pearson correlation on validation conditions, and this correlation."""
        maps = MAP_PENALTIES if self.vectors.shape[1] else (1.0,)
        tried = [Start(*settings) for settings in product(OWN_PENALTIES, maps, RANKS, EVENNESS)]
        means = [self._mean_correlation(inner, lambda train, start=start: self.head(start, train)) for start in tried]
        best = int(np.argmax(means))
        return tried[best], means[best]

    def _mean_correlation(self, inner, make_head: Callable[[np.ndarray], PerturbationHead]) -> float:
        """Mean Pearson correlation on the validation conditions, of heads made from the training conditions."""
        parts = []
        for train, val in inner:
            predicted = self.predict(make_head(train), [self.conditions[i] for i in val])
            parts.append(correlations(predicted, self.change[val]))
        return float(np.concatenate(parts).mean())

    def fit(self, stage: Stage, folder: Path, fold: Fold, quiet: bool = True) -> tuple[PerturbationHead, dict]:
        """Choose a head's start and its training on validation conditions, and train it on all training conditions.

        A head is trained on cells only where this raises the mean correlation on the validation conditions of the inner
        splits, and then for the mean number of epochs that had the lowest loss there. Otherwise the learning rate is 0,
        so that the head stays at its start.

        Parameters
        ----------
        stage : the run, with its settings
        folder : the model folder to write
        fold : its inner splits are used for the choices, and its training conditions for the last fit
        quiet : do not print the last fit

        Returns
        -------
        the trained head, and its settings
        """
        start, untrained = self.choose_start(fold.inner)
        runtime, epochs = Quiet(stage.runtime.device, stage.runtime.rank, stage.runtime.world_size), []
        config = replace(stage.config, overwrite=True, resume=False)
        trial = replace(stage, folder=folder.with_name(f"{folder.name}_trial"), runtime=runtime, config=config)
        val_of = {tuple(some): val for some, val in fold.inner}

        def train_on(some: np.ndarray) -> PerturbationHead:
            epochs.append(self._fit(trial, start, some, val_of[tuple(some)])["epoch"])
            return load_model(trial.folder, PERTURBATION.name).build()

        gain = self._mean_correlation(fold.inner, train_on) - untrained
        rate, n_epochs = (config.learning_rate, max(1, round(float(np.mean(epochs))))) if gain > 0 else (0.0, 1)
        last = replace(stage.config, learning_rate=rate, epochs=n_epochs, keep="last")
        final = replace(stage, folder=folder, config=last, runtime=runtime if quiet else stage.runtime)
        head = self._fit(final, start, fold.train, None)
        return head, vars(start) | {"epochs": n_epochs if rate else 0, "gain": gain}

    def _fit(self, stage: Stage, start: Start, train: np.ndarray, val: np.ndarray | None):
        """Train one head; return the metrics of the kept epoch, or without validation conditions the head."""
        head, seed = self.head(start, train, stage.config.seed), stage.config.seed
        kept = stage.fit(
            OnEmbeddings(head),
            self.dataset(train, seed),
            self.dataset(np.empty(0, dtype=int) if val is None else val, seed + 1),
            {"head": self.shape(start)},
            like=self.encoder,
            saves=head,
            options={"latent_dim": self.embedding.shape[1]},
            outputs=list(self.cells.genes),
        )
        return head if val is None else kept


def perturbed_vectors(embedding: GeneVectors | None, genes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of perturbed genes, centred on their mean and scaled to length 1 on average.

    Returns
    -------
    vectors : [genes, width] float32; zeros, the mean, for a gene without a vector
    found : [genes] bool
    """
    if embedding is None:
        return np.zeros((len(genes), 0), dtype=np.float32), np.zeros(len(genes), dtype=bool)
    vectors, found = embedding.of(genes)
    if found.any():
        vectors[found] -= vectors[found].mean(0)
        vectors /= max(np.sqrt(np.square(vectors[found]).sum(1).mean()), 1e-9)
    return vectors, found
