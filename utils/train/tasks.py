"""Tasks: what a model with a head predicts, from the column it learns to the columns it writes.

A head (`models.heads`) handles tensors; its task knows what they mean: the targets of the cells, what is fitted after
training, what is written for each cell, and how predictions are scored. A new task
is a head, a subclass of `Task` with a call of `register`, and a script (`docs/add_a_task.md`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from typing import ClassVar

import numpy as np
import torch

from models.heads import CellTypeHead, Head
from models.shapes import ClassifierConfig
from utils.cells.labels import encode_labels
from utils.evaluate.calibration import Calibration, fit_temperature
from utils.evaluate.metrics import classification_scores


class Trained:
    """What the loading of a model folder must know about its head.

    Attributes
    ----------
    name : kind of the model folders
    title : the kind in words, with the script that makes such folders
    shape : dataclass with the head's shape
    head : class of the head, called with (shape, latent_dim, number of outputs)
    """

    name: ClassVar[str]
    title: ClassVar[str]
    shape: ClassVar[type]
    head: ClassVar[type[Head]]

    def make_head(self, shape, outputs: list[str]) -> Callable[[int], Head]:
        """A function latent_dim → head with one output per name, as `ScMomer` takes it."""
        return lambda latent_dim: self.head(shape, latent_dim, len(outputs))

    def check(self, fitted: dict) -> None:
        """Raise ValueError, naming the value, if the fitted values of a folder are impossible."""

    def describe(self, fitted: dict) -> str:
        """A line of text about what was fitted; empty if nothing was."""
        return ""


class Task(Trained, ABC):
    """Base of all tasks that predict something for each cell of a file.

    Attributes
    ----------
    name, title, shape, head : as in `Trained`; the fields of `shape` are flags
    columns : column of obs → its value for cells without a count in the model's features
    """

    columns: ClassVar[dict[str, object]]

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

    def doubts(self, fitted: dict) -> list[str]:
        """Reasons to doubt the predictions, one line each."""
        return []

    def provenance(self, fitted: dict) -> dict:
        """Entries of uns about what was fitted."""
        return fitted

    @abstractmethod
    def predict(self, decoded: dict[str, np.ndarray], outputs: list[str], fitted: dict) -> dict[str, np.ndarray]:
        """Predictions, name → [cells, …]; those named in `columns` are written to obs."""

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


class CellTypes(Task):
    """Cell types: one class per type of the training cells, with a calibrated confidence."""

    name = "celltype"
    title = "a cell type model (train_missing_celltype_func.py)"
    shape = ClassifierConfig
    head = CellTypeHead
    columns: ClassVar[dict[str, object]] = {"predicted_cell_type": "unassigned", "confidence": 0.0}

    def targets(self, cells, column: str) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
        codes, types = encode_labels(cells, column)
        return {"cell_type": codes}, codes >= 0, types

    def fit_after_training(self, decoded, targets, outputs) -> dict:
        """A temperature, 1 if there are too few validation cells (Guo et al. 2017), and a summary of these cells."""
        labels = targets["cell_type"]
        temperature = float(fit_temperature(decoded["logits"], labels)) if len(labels) else 1.0
        return {"temperature": temperature, "calibration": asdict(Calibration.of(labels, outputs))}

    def check(self, fitted: dict) -> None:
        check_positive("temperature", fitted.get("temperature", 1.0))
        self._calibration(fitted)

    def describe(self, fitted: dict) -> str:
        calibration = self._calibration(fitted)
        return "" if calibration is None else f"temperature {fitted['temperature']:.3f}; {calibration}"

    def doubts(self, fitted: dict) -> list[str]:
        calibration = self._calibration(fitted)
        is_doubtful = calibration is not None and (calibration.few or not calibration.is_enough)
        return [str(calibration)] if is_doubtful else []

    def provenance(self, fitted: dict) -> dict:
        calibration = self._calibration(fitted)
        return {
            "temperature": float(fitted.get("temperature", 1.0)),
            "calibration": str(calibration or "unknown: the model folder does not say"),
        }

    def predict(self, decoded, outputs, fitted) -> dict[str, np.ndarray]:
        logits = torch.from_numpy(decoded["logits"])
        probability = torch.softmax(logits / fitted.get("temperature", 1.0), dim=1).numpy()
        best = probability.argmax(1)
        return {
            "predicted_cell_type": np.array(outputs, dtype=object)[best],
            "confidence": probability[np.arange(len(best)), best],
            "probability": probability,
        }

    def scores(self, truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        return classification_scores(truth, predicted)

    @staticmethod
    def _calibration(fitted: dict) -> Calibration | None:
        """The summary of the validation cells; None before training has ended, and in folders of version 0.1."""
        kept = fitted.get("calibration")
        return None if kept is None else Calibration(kept["n_cells"], kept["n_types"], tuple(kept["few"]))


CELL_TYPES = register(CellTypes())
