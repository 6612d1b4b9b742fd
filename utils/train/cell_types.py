"""The task of cell types: what is fitted after training, and what each cell gets."""

import math
from dataclasses import asdict
from typing import ClassVar

import numpy as np
import torch

from models.heads import CellTypeHead
from models.shapes import ClassifierConfig
from utils.cells.labels import encode_labels
from utils.errors import UserError
from utils.evaluate import conformal
from utils.evaluate.calibration import Calibration, fit_temperature
from utils.evaluate.metrics import classification_scores
from utils.evaluate.novelty import MIN_CELLS as NOVELTY_CELLS
from utils.evaluate.novelty import N_REFERENCE, check_novelty, fit_novelty, novelty_p_values
from utils.train.config import LabelConfig
from utils.train.tasks import Task, check_positive, register


class CellTypes(Task):
    """Cell types: one class per type of the training cells, with a calibrated confidence."""

    name = "celltype"
    title = "a cell type model (train_missing_celltype_func.py)"
    shape = ClassifierConfig
    head = CellTypeHead
    columns: ClassVar[dict[str, object]] = {
        "predicted_cell_type": "unassigned",
        "confidence": 0.0,
        "second_cell_type": "unassigned",
        "margin": 0.0,
        "prediction_set": "",
        "novelty": math.nan,
        "is_novel": False,
    }
    table = "cell_type_probability"
    n_reference = N_REFERENCE

    def targets(self, cells, column: str) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
        codes, types = encode_labels(cells, column)
        return {"cell_type": codes}, codes >= 0, types

    def fit_after_training(self, decoded, targets, outputs) -> dict:
        """A temperature, 1 if there are too few validation cells (Guo et al. 2017), and the thresholds of sets.

        The temperature, one number, is fitted on the same cells as the thresholds.
        """
        labels = targets["cell_type"]
        temperature = float(fit_temperature(decoded["logits"], labels)) if len(labels) else 1.0
        fitted = {"temperature": temperature, "calibration": asdict(Calibration.of(labels, outputs))}
        sets = conformal.fit_sets(self._probability(decoded["logits"], fitted), labels) if len(labels) else None
        return fitted if sets is None else fitted | {"sets": sets}

    def fit_on_embeddings(self, train, val) -> dict:
        fitted = fit_novelty(train, val)
        return {} if fitted is None else {"novelty": fitted}

    def columns_of(self, fitted: dict) -> dict[str, object]:
        lacking = set() if "sets" in fitted else {"prediction_set"}
        lacking |= set() if "novelty" in fitted else {"novelty", "is_novel"}
        return {name: value for name, value in self.columns.items() if name not in lacking}

    def left_out(self, fitted: dict) -> list[str]:
        lacking = self.columns.keys() - self.columns_of(fitted).keys()
        named = ", ".join(name for name in self.columns if name in lacking)
        calibration = self._calibration(fitted)
        few = "it was trained before they existed"
        if calibration is not None and calibration.n_cells < NOVELTY_CELLS:
            few = f"it had only {calibration.n_cells} labelled validation cells"
        return [f"{named} left out: the model has not learned them ({few}); train it again"] if lacking else []

    def check(self, fitted: dict) -> None:
        check_positive("temperature", fitted.get("temperature", 1.0))
        self._calibration(fitted)
        if "sets" in fitted:
            conformal.check_sets(fitted["sets"])
        if "novelty" in fitted:
            check_novelty(fitted["novelty"])

    def describe(self, fitted: dict) -> str:
        calibration = self._calibration(fitted)
        text = "" if calibration is None else f"temperature {fitted['temperature']:.3f}; {calibration}"
        if "sets" in fitted:
            text += f"; prediction sets by {fitted['sets']['n_cells']:,} of them"
        return text + (f"; novelty by the {fitted['novelty']['method']}" if "novelty" in fitted else "")

    def doubts(self, fitted: dict) -> list[str]:
        calibration = self._calibration(fitted)
        is_doubtful = calibration is not None and (calibration.few or not calibration.is_enough)
        return [str(calibration)] if is_doubtful else []

    def provenance(self, fitted: dict, choices: LabelConfig | None = None) -> dict:
        calibration, choices = self._calibration(fitted), choices or LabelConfig()
        entry = {
            "temperature": float(fitted.get("temperature", 1.0)),
            "calibration": str(calibration or "unknown: the model folder does not say"),
            "left_out": np.array(self.left_out(fitted), dtype=object),
        }
        if sets := fitted.get("sets"):
            entry["prediction_sets"] = {
                "coverage": choices.coverage,
                "per_type": choices.coverage_per_type,
                "score": sets["score"],
                "n_cells": sets["n_cells"],
                "threshold": float(conformal.thresholds(sets, choices.coverage, 1)[0]),
            }
        if kept := fitted.get("novelty"):
            entry["novelty"] = {
                "method": kept["method"],
                "n_cells": kept["n_cells"],
                "novel_below": choices.novel_below,
                "rejected": choices.reject,
            }
        return entry

    def predict(self, decoded, outputs, fitted, choices: LabelConfig | None = None) -> dict[str, np.ndarray]:
        """As for all tasks; `choices` are the flags of predict_cell_type.py.

        Raises
        ------
        UserError
            If novel cells are to be rejected, and the folder cannot find them.
        """
        choices = choices or LabelConfig()
        probability, names = self._probability(decoded["logits"], fitted), np.array(outputs, dtype=object)
        rows, best = np.arange(len(probability)), probability.argmax(1)
        confidence = probability[rows, best]
        probability[rows, best] = -1  # for a moment, to find the second without a copy
        second = probability.argmax(1)
        probability[rows, best] = confidence
        found = {
            "predicted_cell_type": names[best],
            "confidence": confidence,
            "second_cell_type": names[second],
            "margin": confidence - probability[rows, second],
            "probability": probability,
        }
        if "sets" in fitted:
            sets = conformal.prediction_sets(fitted["sets"], probability, choices.coverage, choices.coverage_per_type)
            found["prediction_set"] = conformal.sets_as_text(sets, probability, outputs)
        if "novelty" in fitted and "embedding" in decoded:
            p = novelty_p_values(fitted["novelty"], decoded["embedding"])
            found |= {"novelty": (1 - p).astype(np.float32), "is_novel": p < choices.novel_below}
        if choices.reject:
            if "is_novel" not in found:
                raise UserError("--reject: the model cannot tell novel cells; " + " ".join(self.left_out(fitted)))
            found["predicted_cell_type"][found["is_novel"]] = self.columns["predicted_cell_type"]
        return found

    def scores(self, truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        return classification_scores(truth, predicted)

    @staticmethod
    def _probability(logits: np.ndarray, fitted: dict) -> np.ndarray:
        """[cells, types] float32 with the folder's temperature."""
        return torch.softmax(torch.from_numpy(logits) / fitted.get("temperature", 1.0), dim=1).numpy()

    @staticmethod
    def _calibration(fitted: dict) -> Calibration | None:
        """The summary of the validation cells; None before training has ended, and in folders of version 0.1."""
        kept = fitted.get("calibration")
        return None if kept is None else Calibration(kept["n_cells"], kept["n_types"], tuple(kept["few"]))


CELL_TYPES = register(CellTypes())
