"""Tasks: what a model with a head predicts, from the column it learns to the columns it writes.

A head (`models.heads`) handles tensors; its task knows what they mean: the targets of the cells, what is fitted after
training, what is written for each cell, and how predictions are scored. A new task
is a head, a subclass of `Task` with a call of `register`, and a script (`docs/add_a_task.md`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from models.heads import Head
from utils.cells.minibatches import CellDataset
from utils.evaluate.across import LeftOut
from utils.files.disk_rows import Rows


class Trained:
    """What the loading of a model folder must know about its head.

    Attributes
    ----------
    name : kind of the model folders
    title : the kind in words, with the script that makes such folders
    shape : dataclass with the head's shape
    head : class of the head, called with (shape, latent_dim, number of outputs)
    pipeline : the Hugging Face hub's word for what such a model does; empty where none fits
    """

    name: ClassVar[str]
    title: ClassVar[str]
    shape: ClassVar[type]
    head: ClassVar[type[Head]]
    pipeline: ClassVar[str] = ""

    def make_head(self, shape, outputs: list[str]) -> Callable[[int], Head]:
        """A function latent_dim → head with one output per name, as `ScMomer` takes it."""
        return lambda latent_dim: self.head(shape, latent_dim, len(outputs))

    def check(self, fitted: dict) -> None:
        """Raise ValueError, naming the value, if the fitted values of a folder are impossible."""

    def check_arrays(self, arrays: dict[str, np.ndarray], fitted: dict, n_features: int, n_outputs: int) -> None:
        """Raise ValueError if the fitted arrays of a folder do not belong to its model.

        Parameters
        ----------
        arrays, fitted : as `Task.fit_on_values` returned them
        n_features, n_outputs : features of all modalities that the model reads, and outputs of its head
        """

    def describe(self, fitted: dict) -> str:
        """A line of text about what was fitted; empty if nothing was."""
        return ""

    def card(self, fitted: dict) -> str:
        """A section of the model card, in Markdown; empty for none."""
        return ""


class Task(Trained, ABC):
    """Base of all tasks that predict something for each cell of a file.

    Attributes
    ----------
    name, title, shape, head : as in `Trained`; the fields of `shape` are flags
    columns : column of obs → its value for cells without a count in the model's features
    table : key of obsm for the prediction `probability`, with a column for each output; empty for none
    n_reference : how many training cells `fit_on_embeddings` wants to see
    """

    columns: ClassVar[dict[str, object]]
    table: ClassVar[str] = ""
    n_reference: ClassVar[int] = 0

    @abstractmethod
    def targets(self, cells, column: str) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
        """Read the targets that the head learns.

        Parameters
        ----------
        cells : utils.cells.preprocessed.Cells
        column : column of their obs

        Returns
        -------
        targets, name → [cells, …]; [cells] bool, which cells have one; names of the head's outputs

        Raises
        ------
        UserError
            If the column cannot be learned from.
        """

    def fit_after_training(
        self, decoded: dict[str, np.ndarray], targets: dict[str, np.ndarray], outputs: list[str]
    ) -> dict:
        """Fit on validation cells after training. The result, plain numbers and text, is saved in the folder.

        Parameters
        ----------
        decoded : the head's predictions, name → [cells, …]; empty without validation cells
        targets : name → [cells, …]
        outputs : names of the head's outputs
        """
        return {}

    def fit_on_embeddings(self, train: np.ndarray, val: np.ndarray) -> dict:
        """Fit on embeddings after training. The result is saved together with that of `fit_after_training`.

        Parameters
        ----------
        train : [at most n_reference, latent_dim] embeddings of training cells, drawn at random
        val : [cells, latent_dim] embeddings of the validation cells
        """
        return {}

    def fit_on_values(
        self, train: CellDataset, val: CellDataset, features: dict[str, np.ndarray], outputs: list[str]
    ) -> tuple[dict, dict[str, np.ndarray]]:
        """Fit on the cells themselves after training, to be saved together with what the others return.

        Parameters
        ----------
        train, val : cells with a target
        features : modality that the model reads → names of the columns of its values
        outputs : names of the head's outputs

        Returns
        -------
        Plain numbers and text, and larger arrays, which a file of their own holds
        """
        return {}, {}

    def fit_mixture(
        self,
        decoded: dict[str, np.ndarray],
        targets: dict[str, np.ndarray],
        values: dict[str, Rows],
        arrays: dict[str, np.ndarray],
        if_better: bool = False,
    ) -> dict:
        """Fit on validation cells how `decode_on_values` mixes the head's predictions with those of the fitted arrays.

        Parameters
        ----------
        decoded, targets : as in `fit_after_training`, which sees the mixed predictions
        values : modality → [cells, features] model values
        arrays : from `fit_on_values`
        if_better : leave the head's predictions as they are, unless held-out cells show that the mixture is better
        """
        return {}

    def decode_on_values(
        self, decoded: dict[str, np.ndarray], values: dict[str, Rows], fitted: dict, arrays: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Those of the head's predictions that fitted arrays and the cells' values change, name → [cells, …].

        Parameters
        ----------
        decoded : the head's predictions
        values, arrays : as in `fit_mixture`
        fitted : the folder's fitted values
        """
        return {}

    def fit_across(
        self, fitted: dict, left_out: LeftOut, decoded: dict, targets: dict[str, np.ndarray], outputs: list[str]
    ) -> dict:
        """What was fitted, with the constants that cells of batches left out determine.

        Parameters
        ----------
        fitted : from the methods above
        left_out : such cells
        decoded, targets, outputs : of the validation cells, as in `fit_after_training`
        """
        return fitted

    def columns_of(self, fitted: dict) -> dict[str, object]:
        """Those of `columns` that a folder with these fitted values can fill."""
        return self.columns

    def left_out(self, fitted: dict) -> list[str]:
        """Why columns are left out, one line each."""
        return []

    def doubts(self, fitted: dict) -> list[str]:
        """Reasons to doubt the predictions, one line each."""
        return []

    def doubts_about(self, columns: dict[str, np.ndarray]) -> list[str]:
        """Reasons to doubt predictions that the columns show, once they have been made, one line each."""
        return []

    def provenance(self, fitted: dict) -> dict:
        """Entries of uns about what was fitted."""
        return fitted

    @abstractmethod
    def predict(self, decoded: dict[str, np.ndarray], outputs: list[str], fitted: dict) -> dict[str, np.ndarray]:
        """Predictions, name → [cells, …]; those named in `columns` are written to obs.

        `decoded` also holds the `embedding` of the cells.
        """

    def predict_on_values(
        self, arrays: dict[str, np.ndarray], values: dict[str, Rows], found: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """More predictions, from a model folder's fitted arrays and the values of the cells.

        Parameters
        ----------
        arrays : from `fit_on_values`
        values : modality → [cells, features] model values
        found : from `predict`
        """
        return {}

    @abstractmethod
    def scores(self, truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        """Scores of predictions in the first of `columns`, name → value."""


TRAINED: dict[str, Trained] = {}
"""All kinds of folders with a head, by name. Loading a model folder looks up its kind here."""
TASKS: dict[str, Task] = {}
"""Those that predict something for each cell of a file."""


def register(trained: Trained) -> Trained:
    """Add a kind of folder to `TRAINED`, and to `TASKS` if it predicts for each cell."""
    TRAINED[trained.name] = trained
    if isinstance(trained, Task):
        TASKS[trained.name] = trained
    return trained


def check_positive(name: str, value: object) -> None:
    """Raise ValueError unless a constant is a finite number above zero."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}, not a positive number")
