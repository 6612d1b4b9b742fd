"""Compare a model folder with simple baselines, on the same cells.

    python evaluate.py --data_path cells.ready.h5mu --model_path runs/celltype
    python evaluate.py --data_path cells.ready.h5mu --model_path runs/student

A cell type model is scored on the labels of the test cells, beside the majority class, nearest neighbours, logistic
regression (on all features, and on principal components) and a neural network with one hidden layer (MLP). If some
training cells have no label, further rows are an MLP on a denoiser of all training cells, and each baseline
self-trained. Baselines are fitted on the same training cells (at most 50,000) and tuned on the same validation cells,
with 16 settings each (a self-trained one 16 for each set of labels). The model's embedding is scored beside principal
components, and its prediction sets beside those of logistic regression, at the same --coverage, also within and across
batches. How well the model's confidence and the agreement of simple classifiers mark its errors is scored, too. A model
with a student is scored on translation: how well it predicts, from the measured modality, the one it has not seen,
beside the mean, the mean times the cell's depth (also per type, by the cells' labels, which the model does not see),
nearest neighbours and ridge regression. Predicted peaks are also scored after calibration on validation cells. Each
score has its 95% interval, and a sentence says whether the model or the best of the others wins. Writes
evaluation_<split>.json, .csv and .png into --out_path. For cell types it also writes the confusion matrix, precision,
recall and F1 of each type (per_type_<split>.csv), and each method's prediction for each cell (predicted_<split>.csv).
With --report, the page report_<split>.html shows the model's predictions in figures.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from models.shapes import MODALITIES
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError
from utils.train.config import InferConfig, LabelConfig

RANKED = ("accuracy", "macro_f1")  # the best of each is printed
SHOWN = ("accuracy", "balanced_accuracy", "macro_f1", "peak_auroc", "cell_auroc", "peak_ap", "cell_ap", "rna_mse")


@dataclass
class Flags:
    data_path: str = flag("preprocessed cells, .h5ad or .h5mu")
    model_path: str = flag("folder of train_missing_celltype_func.py or pretrain_missing_mod.py")
    split: str = flag("which cells to score: test, val or train", "test")
    label_column: str | None = flag("column of obs with cell types; by default the one the model was trained on", None)
    out_path: str | None = flag("folder for the results; by default <model_path>/evaluation", None)
    model_alone: bool = flag("leave out the baselines of cell types", False)
    quick: bool = flag(
        "with unlabelled training cells, leave out the networks that learn from them, which take minutes", False
    )
    coverage: float = flag("share of prediction sets that hold the true type, from 0.5 to 0.99", 0.9)
    report: bool = flag("for cell types, also write a page of figures; takes about 15 seconds", False)
    sample_column: str | None = flag(
        "for the page: column of obs with samples; by default donor, sample or batch", None
    )

    def __post_init__(self):
        if self.sample_column is not None and not self.report:
            raise UserError(f"--sample_column {self.sample_column}: needs the page; add --report")


def main() -> None:
    flags, config = parse_flags(__doc__, Flags, InferConfig)
    LabelConfig(flags.coverage)  # refuses an impossible coverage

    # Slow to import: --help and mistaken flags do not wait for them.
    from utils.cells.preprocessed import read_cells
    from utils.evaluate.label_report import check_column
    from utils.files.write import check_folder
    from utils.predict.score_translation import score_translation
    from utils.predict.score_types import score_types
    from utils.train.distributed import lone_process
    from utils.train.hub import is_on_hub
    from utils.train.model_folder import check_fits, load_model, split_note

    if flags.out_path is None and is_on_hub(flags.model_path):
        raise UserError(f"--out_path is missing: {flags.model_path} has no folder for results; give one")
    runtime = lone_process(config.device)
    saved = load_model(flags.model_path, "celltype", "student")
    out = check_folder(flags.out_path or saved.path / "evaluation")
    is_types = saved.kind == "celltype"
    cells = read_cells(flags.data_path, saved.model_config.inputs if is_types else MODALITIES, say=print)
    check_fits(saved, cells.features, cells.stamp, flags.data_path)
    if note := split_note(saved, cells.stamp, flags.data_path):
        print(note)
    check_column(cells.obs, "--sample_column", flags.sample_column, flags.data_path)
    rows = cells.rows(flags.split)
    if not len(rows):
        raise UserError(
            f"{flags.data_path}: has no {flags.split} cells; choose another --split, or run preprocess.py again"
        )

    if is_types:
        table = score_types(
            *(saved, cells, flags.split, config, runtime, out, flags.label_column, flags.model_alone, flags.coverage),
            *(flags.report, flags.sample_column, flags.quick),
        )
    else:
        table = score_translation(saved, cells, rows, config, runtime)
    write_results(table, {"model": saved.address or str(saved.path), "hash": saved.hash, "split": flags.split}, out)


def write_results(table: dict, about: dict, out: Path) -> None:
    """Print the table, and write it as .json, .csv and .png into the folder `out`.

    Parameters
    ----------
    table : method → scores; also n_cells, and for cell types embeddings and calibration
    about : model, hash and split, kept in the .json
    """
    import pandas as pd

    from utils.as_json import to_json
    from utils.evaluate.plots import bars

    out.mkdir(parents=True, exist_ok=True)
    path = out / f"evaluation_{about['split']}.json"
    path.write_text(to_json(about | table))
    methods = {name: row for name, row in table.items() if isinstance(row, dict) and name != "embeddings"}
    scores = pd.DataFrame(methods).T
    scores.to_csv(path.with_suffix(".csv"))
    print(scores.map(_cell).to_string())
    for measure in [name for name in RANKED if name in scores]:
        best = scores[measure].astype(float)
        if best.isna().all():  # too few cells to score it
            continue
        print(f"best {measure.replace('_', ' ')}: {best.idxmax()}")
    if "verdict" in table:
        print("\n".join([*table["verdict"], f"intervals: {table['intervals']}"]))
    if "embeddings" in table:
        print(pd.DataFrame(table["embeddings"]).T.dropna(axis=1, how="all").map(_cell).to_string())
        print(table["calibration"])
    shown = [name for name in SHOWN if name in scores]
    values = {name: {measure: row[measure] for measure in shown} for name, row in methods.items()}
    intervals = {name: {m: row[f"{m}_95%"] for m in shown if f"{m}_95%" in row} for name, row in methods.items()}
    bars(values, path.with_suffix(".png"), f"{Path(about['model']).name}, {table['n_cells']:,} cells", intervals)
    print(f"wrote {path}")


def _cell(value) -> str:
    """A score with its interval, for the printed table."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_cell, value)) + "]"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.4f}"
    return str(value)


if __name__ == "__main__":
    run_script(main)
