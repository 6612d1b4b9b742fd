"""How a model folder stands against simple baselines, on the same cells.

    python evaluate.py --data_path cells.ready.h5mu --model_path runs/celltype
    python evaluate.py --data_path cells.ready.h5mu --model_path runs/student

A cell type model is scored on the labels of the test cells, beside logistic regression on all features and on 50
principal components, fitted on the same training cells and tuned on the same validation cells. A model with a student
is scored on translation: how well it tells, from the measured modality, the one it has not seen. Writes
evaluation_<split>.json (and a confusion matrix) into --out_path.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, hstack

from models.minibatch import other
from utils.cli import flag, parse_flags, run_script
from utils.data.dataset import CellDataset
from utils.data.read import Cells, read_cells
from utils.errors import UserError
from utils.report.baselines import logistic_regression, mean_accessibility, pca_logistic_regression
from utils.report.calibration import expected_calibration_error
from utils.report.metrics import bootstrap_interval, classification_scores, translation_scores
from utils.report.plots import confusion
from utils.train.checkpoint import SavedModel, check_fits, load_model
from utils.train.distributed import Runtime, choose_device
from utils.train.infer import InferConfig, infer, predict_types


@dataclass
class Flags:
    data_path: str = flag("preprocessed cells, .h5ad or .h5mu")
    model_path: str = flag("folder of train_missing_celltype_func.py or pretrain_missing_mod.py")
    split: str = flag("which cells to score: test, val or train", "test")
    label_column: str | None = flag("column of obs with cell types; by default the one the model was trained on", None)
    out_path: str | None = flag("folder for the results; by default <model_path>/evaluation", None)


def main() -> None:
    flags, config = parse_flags(__doc__, Flags, InferConfig)
    runtime = Runtime(choose_device(config.device))
    saved = load_model(flags.model_path, "celltype", "student")
    out = Path(flags.out_path or saved.path / "evaluation")
    is_types = saved.kind == "celltype"
    cells = read_cells(flags.data_path, saved.model_config.inputs if is_types else ("rna", "atac"))
    check_fits(saved, cells.features, cells.stamp, flags.data_path)
    rows = cells.rows(flags.split)
    if not len(rows):
        raise UserError(f"{flags.data_path}: has no {flags.split} cells; choose another --split, or split it anew")
    if is_types:
        table = score_types(saved, cells, rows, flags, config, runtime, out)
    else:
        table = score_translation(saved, cells, rows, config, runtime)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"evaluation_{flags.split}.json"
    path.write_text(json.dumps({"model": str(saved.path), "hash": saved.hash, "split": flags.split} | table, indent=1))
    scores = pd.DataFrame({name: row for name, row in table.items() if isinstance(row, dict)}).T
    print(scores.map(_cell).to_string())
    if len(scores) > 1:
        measure = next(name for name in ("macro_f1", "peak_auroc", "rna_mse") if name in scores)
        best = scores[measure].astype(float)
        winner = best.idxmin() if measure == "rna_mse" else best.idxmax()
        print(f"best {measure.replace('_', ' ')}: {winner}")
    print(f"wrote {path}")


def _cell(value) -> str:
    """A score with its interval, for the printed table."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(f"{v:.3f}" for v in value) + "]"
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.3f}"
    return str(value)


def score_types(
    saved: SavedModel, cells: Cells, rows: np.ndarray, flags: Flags, config: InferConfig, runtime: Runtime, out: Path
) -> dict:
    """Accuracy and macro-F1 of the model and of the baselines, with 95 % bootstrap intervals over cells."""
    column = flags.label_column or saved.training.get("label_column")
    labels = cells.labels(column)
    if labels is None:
        raise UserError(f"{cells.path}: no column {column!r} in obs; name the labels with --label_column")
    labelled = labels.notna().to_numpy()
    rows = rows[labelled[rows]]
    if not len(rows):
        raise UserError(f"{cells.path}: no {flags.split} cell has a label in {column}; choose another --label_column")
    truth = labels.iloc[rows].to_numpy()

    def data(which: np.ndarray) -> csr_matrix:
        return hstack([cells.values[name][which] for name in saved.model_config.inputs], format="csr")

    dataset = CellDataset({name: cells.values[name][rows] for name in saved.model_config.inputs}, cells.obs.index[rows])
    prediction = predict_types(saved, dataset, config, runtime)
    predicted = {"scmomer": prediction.types}
    known = [row[labelled[row]] for row in (cells.rows("train"), cells.rows("val"))]
    (x_train, x_val), (y_train, y_val) = [data(row) for row in known], [labels.iloc[row].to_numpy() for row in known]
    baselines = {"logistic regression": logistic_regression, "PCA + logistic regression": pca_logistic_regression}
    penalty = {}
    for name, fit in baselines.items():
        estimator, penalty[name] = fit(x_train, y_train, x_val, y_val, seed=0)
        predicted[name] = estimator.predict(data(rows))
    confusion(truth, prediction.types, out / f"confusion_{flags.split}.png")
    table = {}
    for name, types in predicted.items():
        table[name] = classification_scores(truth, types)
        for score in ("accuracy", "macro_f1"):
            table[name][f"{score}_95%"] = bootstrap_interval(truth, types, score)
        if name in penalty:
            table[name]["C"] = penalty[name]  # inverse strength of the penalty, chosen on validation cells
    codes = pd.Index(saved.labels).get_indexer(truth)
    in_model = codes >= 0
    return table | {
        "calibration_error": expected_calibration_error(prediction.probability[in_model], codes[in_model]),
    }


def score_translation(saved: SavedModel, cells: Cells, rows: np.ndarray, config: InferConfig, runtime: Runtime) -> dict:
    """Measured → missing modality, beside the training cells' mean: AUROC of peaks, or squared error of genes."""
    missing = saved.options["missing"]
    model = saved.build()
    dataset = CellDataset({other(missing): cells.values[other(missing)][rows]}, cells.obs.index[rows])
    (embedding,) = infer(lambda batch: (model.embed(batch),), model, dataset, config, runtime, "embedding")
    decoder = model.decoders[missing].cpu()
    weight, bias = decoder.weight.detach().numpy(), decoder.bias.detach().numpy()
    truth, train = cells.values[missing][rows], cells.values[missing][cells.rows("train")]
    mean = mean_accessibility(train)  # column means
    if missing == "atac":
        return {
            "scmomer": translation_scores(
                truth,
                lambda start, stop: embedding @ weight[start:stop].T + bias[start:stop],
                cell_scores=lambda start, stop: embedding[start:stop] @ weight.T + bias,
            ),
            "mean accessibility": translation_scores(
                truth,
                lambda start, stop: np.tile(mean[start:stop], (len(rows), 1)),
                cell_scores=lambda start, stop: np.tile(mean, (stop - start, 1)),
            ),
        }
    blocks = [slice(start, start + 1024) for start in range(0, len(rows), 1024)]
    errors = {
        "scmomer": [np.square(embedding[b] @ weight.T + bias - truth[b].toarray()).sum() for b in blocks],
        "mean expression": [np.square(mean - truth[b].toarray()).sum() for b in blocks],
    }
    return {name: {"rna_mse": float(sum(parts) / truth.shape[0] / truth.shape[1])} for name, parts in errors.items()}


if __name__ == "__main__":
    run_script(main)
