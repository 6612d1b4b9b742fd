"""Tasks: what a model with a head predicts, from the column it learns from to the columns it writes.

A head (`models.heads`) knows tensors; its task knows what they mean: which targets the cells have, what is fitted once
training is over, what is written for each cell, how predictions are scored. A new task is a subclass of `Task` and a
call of `register`; no other file changes (`docs/add_a_task.md`; an example is `tests/predict/test_new_task.py`).
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


class Task(ABC):
    """Base of all tasks.

    Attributes
    ----------
    name : the kind of its model folders
    title : the same in words, with the script that makes them
    shape : dataclass with the head's shape; its fields are flags
    head : class of the head, called with (shape, latent_dim, number of outputs)
    columns : column of obs → what it holds for cells without a count in the model's features
    """

    name: ClassVar[str]
    title: ClassVar[str]
    shape: ClassVar[type]
    head: ClassVar[type[Head]]
    columns: ClassVar[dict[str, object]]

    def make_head(self, shape, outputs: list[str]) -> Callable[[int], Head]:
        """A function latent_dim → head with one output per name, as `ScMomer` takes it."""
        return lambda latent_dim: self.head(shape, latent_dim, len(outputs))

    @abstractmethod
    def targets(self, cells, column: str) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
        """What the head learns from.

        Parameters
        ----------
        cells : utils.cells.preprocessed.Cells
        column : of their obs

        Returns
        -------
        targets, name → [cells, …]; which cells have one, [cells] bool; names of the head's outputs

        Raises
        ------
        UserError
            If the column cannot be learned from.
        """

    def fit_after_training(
        self, decoded: dict[str, np.ndarray], targets: dict[str, np.ndarray], outputs: list[str]
    ) -> dict:
        """What is fitted on validation cells when training is over, as plain numbers and text; it goes into the folder.

        Parameters
        ----------
        decoded : what the head decodes, name → [cells, …]; empty where there are no validation cells
        targets : name → [cells, …]
        outputs : names of the head's outputs
        """
        return {}

    def check(self, fitted: dict) -> None:  # noqa: B027 (most tasks fit nothing)
        """Raise ValueError, with the name, if what a folder says was fitted makes no sense."""

    def describe(self, fitted: dict) -> str:
        """What was fitted, in a line for people; empty for nothing."""
        return ""

    def doubts(self, fitted: dict) -> list[str]:
        """Why predictions deserve less trust than they seem to, a line each."""
        return []

    def provenance(self, fitted: dict) -> dict:
        """What uns keeps beside the predictions about what was fitted."""
        return fitted

    @abstractmethod
    def predict(self, decoded: dict[str, np.ndarray], outputs: list[str], fitted: dict) -> dict[str, np.ndarray]:
        """What is known of each cell, name → [cells, …]; the names in `columns` are written to obs."""

    @abstractmethod
    def scores(self, truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        """Scores of the first of `columns`, name → value."""


TASKS: dict[str, Task] = {}
"""All tasks by name. Loading a model folder looks its kind up here."""


def register(task: Task) -> Task:
    """Make a task known by its name."""
    TASKS[task.name] = task
    return task


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
        """A temperature, and the validation cells it was fitted on; 1 where there are too few (Guo et al. 2017)."""
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
        """As it was kept; None before training has ended, and in folders of the first version."""
        kept = fitted.get("calibration")
        return None if kept is None else Calibration(kept["n_cells"], kept["n_types"], tuple(kept["few"]))


CELL_TYPES = register(CellTypes())
