"""The task of cell types: what is fitted after training, and what each cell gets."""

import math
from dataclasses import asdict
from typing import ClassVar

import numpy as np
import pandas as pd
import torch

from models.heads import CellTypeHead
from models.shapes import FEATURES, ClassifierConfig
from utils.cells.hierarchy import check_hierarchy, common_ancestors
from utils.cells.labels import encode_labels
from utils.errors import UserError
from utils.evaluate import boxed, conformal, mixture
from utils.evaluate.across import COVERAGE, coverage_across, coverage_of, coverage_text
from utils.evaluate.calibration import Calibration, fit_temperature
from utils.evaluate.markers import marker_table, markers
from utils.evaluate.metrics import classification_scores
from utils.evaluate.novelty import MIN_CELLS as NOVELTY_CELLS
from utils.evaluate.novelty import N_REFERENCE, check_novelty, fit_novelty, novelty_p_values, with_held_out
from utils.files.column_names import column_names
from utils.files.disk_rows import side_by_side
from utils.train.config import LabelConfig
from utils.train.tasks import Task, check_positive, register

LEAST_CELLS, MANY_NOVEL, NEARLY_ALL_NOVEL = 50, 0.25, 0.9
"""Cells from which on their novelty is looked at, and shares of novel cells above which a warning says so."""


class CellTypes(Task):
    """Cell types: one class per type of the training cells, with a calibrated confidence."""

    name = "celltype"
    title = "a cell type model (train_missing_celltype_func.py)"
    shape = ClassifierConfig
    head = CellTypeHead
    pipeline = "tabular-classification"
    columns: ClassVar[dict[str, object]] = {
        "predicted_cell_type": "unassigned",
        "confidence": 0.0,
        "second_cell_type": "unassigned",
        "margin": 0.0,
        "prediction_set": "",
        "parent_cell_type": "",
        "agreement": math.nan,
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

    def fit_on_values(self, train, val, features, outputs) -> tuple[dict, dict[str, np.ndarray]]:
        """The boxed baselines, and the markers of each type in the first modality that the model reads."""
        x, x_val = (side_by_side({name: cells.values[name] for name in features}) for cells in (train, val))
        labels, modality = train.targets["cell_type"], next(iter(features))
        arrays = boxed.fit_boxed(x, labels, x_val, val.targets["cell_type"])
        found = markers(train.values[modality], labels, features[modality], outputs)
        fitted = {f"marker_{FEATURES[modality]}": found} if found else {}
        return fitted | ({"baselines": list(boxed.NAMES)} if arrays else {}), arrays

    def fit_mixture(self, decoded, targets, values, arrays, if_better=False) -> dict:
        """The weights of the model and of the boxed baselines, and the gain; nothing without baselines or cells."""
        if not arrays:
            return {}
        members, labels = self._members(decoded, values, arrays), targets["cell_type"]
        gain = mixture.gain(members, labels)
        found = {} if gain is None else {"mixture_gain": gain}
        if if_better and (gain is None or gain < mixture.LEAST_GAIN):
            return found
        weights = mixture.fit_mixture(members, labels)
        return found | ({"mixture": weights} if weights else {})

    def decode_on_values(self, decoded, values, fitted, arrays) -> dict[str, np.ndarray]:
        """The logits of the mixture, if there is one: type, confidence and sets all follow from them."""
        if "mixture" not in fitted:
            return {}
        return {"logits": mixture.mixed_logits(fitted["mixture"], self._members(decoded, values, arrays))}

    @staticmethod
    def _members(decoded: dict, values: dict, arrays: dict) -> dict[str, np.ndarray]:
        """name → [cells, types] log probabilities of the members of a mixture."""
        logits = decoded["logits"]
        others = boxed.boxed_probabilities(arrays, side_by_side(values), logits.shape[1])
        return mixture.log_members(logits, others)

    def fit_across(self, fitted, left_out, decoded, targets, outputs) -> dict:
        """Temperature, sets and novelty by cells of batches left out, and what sets hold within and across batches."""
        pooled = self.fit_after_training({"logits": left_out.logits}, {"cell_type": left_out.labels}, outputs)
        pooled["calibration"] = asdict(Calibration.of(left_out.labels, outputs, left_out.column))
        pooled["temperature"] *= fitted["temperature"]  # that within batches, times the change from within to across
        if "novelty" in fitted:
            pooled["novelty"] = with_held_out(fitted["novelty"], left_out.distances)
        if left_out.gain is not None:
            pooled["mixture_gain"] = left_out.gain
        if "sets" not in pooled:
            return fitted | pooled

        def sets_from(logits: np.ndarray, labels: np.ndarray, others: np.ndarray) -> np.ndarray | None:
            found = self.fit_after_training({"logits": logits}, {"cell_type": labels}, outputs)
            return self._sets(found, others) if "sets" in found else None

        over_all, by_batch = coverage_across(left_out, sets_from)
        labels = targets["cell_type"]
        within = coverage_of(self._sets(pooled, decoded["logits"]), labels) if len(labels) else {}
        measured = {"column": left_out.column, "coverage": COVERAGE, "within": within, "across": over_all}
        return fitted | pooled | {"across": measured | {"batches": by_batch}}

    def columns_of(self, fitted: dict) -> dict[str, object]:
        lacking = set(self._lacking(fitted))
        lacking |= set() if "hierarchy" in fitted and "sets" in fitted else {"parent_cell_type"}
        return {name: value for name, value in self.columns.items() if name not in lacking}

    @staticmethod
    def _lacking(fitted: dict) -> list[str]:
        """The columns that a folder cannot fill and that a newly trained one could."""
        needs = {"sets": ["prediction_set"], "baselines": ["agreement"], "novelty": ["novelty", "is_novel"]}
        return [name for part, names in needs.items() if part not in fitted for name in names]

    def left_out(self, fitted: dict) -> list[str]:
        lacking = self._lacking(fitted)
        named = ", ".join(lacking)
        calibration = self._calibration(fitted)
        few = f"it was trained before they existed, or on fewer than {NOVELTY_CELLS} labelled validation cells"
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
        check_hierarchy(fitted.get("hierarchy", {}))
        gain = fitted.get("mixture_gain", 0.0)
        if not (isinstance(gain, float) and -1 <= gain <= 1):
            raise ValueError(f"mixture_gain is {gain}, not a number from -1 to 1")
        if "mixture" in fitted:
            named = fitted.get("baselines", ())
            mixture.check_mixture(fitted["mixture"], [name for name in named if name != boxed.CORRELATION])

    def check_arrays(self, arrays, fitted, n_features, n_outputs) -> None:
        if "baselines" in fitted or "mixture" in fitted:
            boxed.check_boxed(arrays, fitted.get("baselines", []), n_features, n_outputs)

    def describe(self, fitted: dict) -> str:
        calibration = self._calibration(fitted)
        text = "" if calibration is None else f"temperature {fitted['temperature']:.3f}; {calibration}"
        if "mixture_gain" in fitted:
            text += f"; a mixture with simple classifiers gains {fitted['mixture_gain'] * 100:+.1f} points"
            text += " on cells of batches left out" if "across" in fitted else ""
            text += "" if "mixture" in fitted else " and is not used"
        if "mixture" in fitted:
            text += "; the probability of a type is the product of the members' to the powers " + ", ".join(
                f"{weight:g} ({name})" for name, weight in fitted["mixture"].items()
            )
        if "sets" in fitted:
            text += f"; prediction sets by {fitted['sets']['n_cells']:,} of them"
        text += f"; novelty by the {fitted['novelty']['method']}" if "novelty" in fitted else ""
        return text + (f"; {coverage_text(fitted['across'])}" if "across" in fitted else "")

    def card(self, fitted: dict) -> str:
        """The markers of each type, and the hierarchy."""
        lines = []
        for feature in FEATURES.values():
            found = fitted.get(f"marker_{feature}", {})
            lines += [f"\n## Marker {feature}\n"] if found else []
            lines += [f"- {name}: {', '.join(best)}" for name, best in found.items()]
        parents = fitted.get("hierarchy", {})
        lines += ["\n## Hierarchy\n"] if parents else []
        lines += [f"- {child} → {parent}" for child, parent in parents.items()]
        return "\n".join([*lines, ""]) if lines else ""

    def doubts(self, fitted: dict) -> list[str]:
        calibration = self._calibration(fitted)
        is_doubtful = calibration is not None and (calibration.few or not calibration.is_enough)
        return [str(calibration)] if is_doubtful else []

    def doubts_about(self, columns) -> list[str]:
        """Many cells that are unlike all that the model has seen."""
        novelty = np.asarray(columns.get("novelty", ()), dtype=float)
        novelty = novelty[np.isfinite(novelty)]
        share = float((novelty > 0.95).mean()) if len(novelty) >= LEAST_CELLS else 0.0
        if share <= MANY_NOVEL:
            return []
        text = (
            f"{share:.0%} of the cells have a novelty above 0.95, where 5% are expected: check their labels before use"
        )
        return [text + ("; perhaps the model knows no such cells at all" if share > NEARLY_ALL_NOVEL else "")]

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
        for name in (f"marker_{feature}" for feature in FEATURES.values()):
            if name in fitted:
                entry[name] = marker_table(fitted[name]).set_axis(column_names(list(fitted[name])), axis=1)
        if "baselines" in fitted:
            entry["baselines"] = np.array(fitted["baselines"], dtype=object)
        if "mixture" in fitted:
            entry["mixture"] = fitted["mixture"]
        if parents := fitted.get("hierarchy"):
            entry["hierarchy"] = pd.DataFrame({"child": list(parents), "parent": list(parents.values())})
        if measured := fitted.get("across"):
            entry["across_batches"] = measured | {"batches": pd.DataFrame(measured["batches"])}
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
            if "hierarchy" in fitted:
                found["parent_cell_type"] = common_ancestors(sets, outputs, fitted["hierarchy"])
        if "novelty" in fitted and "embedding" in decoded:
            p = novelty_p_values(fitted["novelty"], decoded["embedding"])
            found |= {"novelty": (1 - p).astype(np.float32), "is_novel": p < choices.novel_below}
        if choices.reject:
            if "is_novel" not in found:
                raise UserError("--reject: the model cannot detect novel cells; " + " ".join(self.left_out(fitted)))
            found["predicted_cell_type"][found["is_novel"]] = self.columns["predicted_cell_type"]
        return found

    def predict_on_values(self, arrays, values, found) -> dict[str, np.ndarray]:
        """The agreement of the boxed baselines with the type of highest probability."""
        if not arrays:
            return {}
        return {"agreement": boxed.agreement(arrays, side_by_side(values), found["probability"].argmax(1))}

    def scores(self, truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        return classification_scores(truth, predicted)

    def _sets(self, fitted: dict, logits: np.ndarray) -> np.ndarray:
        """[cells, types] bool sets at the coverage at which batches are compared."""
        return conformal.prediction_sets(fitted["sets"], self._probability(logits, fitted), COVERAGE)

    @staticmethod
    def _probability(logits: np.ndarray, fitted: dict) -> np.ndarray:
        """[cells, types] float32 with the folder's temperature."""
        return torch.softmax(torch.from_numpy(logits) / fitted.get("temperature", 1.0), dim=1).numpy()

    @staticmethod
    def _calibration(fitted: dict) -> Calibration | None:
        """The summary of the validation cells; None before training has ended, and in folders of version 0.1."""
        kept = fitted.get("calibration")
        return None if kept is None else Calibration(**kept | {"few": tuple(kept["few"])})


CELL_TYPES = register(CellTypes())
