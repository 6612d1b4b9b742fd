"""Predict the modality that cells lack: open peaks from RNA, or expression from ATAC.

    python -m downstream.translate --data_path new_cells.h5ad --model_path runs/student --ready_path cells.ready.h5mu
    python -m downstream.translate --data_path new_cells.h5ad --model_path runs/student --format types \\
        --label_column cell_type

Input: cells in any format that preprocess.py reads, raw or preprocessed, and a model folder of pretrain_missing_mod.py.
The model predicts what its student replaces (--missing of that script). Output: an .h5ad file of cells × peaks or
genes whose X holds the probability that a peak is open, or the expected log-normalised expression. With --format types
X holds the mean over the cells of each type. A file of cells is written one block at a time and as a sparse matrix: a
large one becomes smaller with --min_value. Cells without any count in the model's features get no values.

Probabilities are calibrated on --ready_path, the file that the model was trained on: three numbers for all peaks (a
slope, an offset, and the weight of the cell's depth), fitted on its validation cells, make the predicted share of open
peaks the observed one. Each peak may get a small offset of its own, fitted on training cells, if that improves the log
loss of validation cells; it keeps the order of the cells of a peak. Without --ready_path only the weight that training
gave to open peaks is undone. The calibration holds for cells whose depth and batches are like those of that file.
"""

from dataclasses import dataclass
from typing import Literal

from models.shapes import FEATURES, MODALITIES, other
from utils.cells.config import IngestConfig
from utils.cli import check_numbers, flag, parse_flags, run_script
from utils.errors import UserError
from utils.train.config import InferConfig


@dataclass
class Flags:
    model_path: str = flag("model folder of pretrain_missing_mod.py")
    data_path: str = flag("cells to translate: .h5ad, .h5mu, 10x .h5 or folder, .loom, .csv or .tsv")
    ready_path: str | None = flag("paired, preprocessed cells of the training, which calibrate the peaks", None)
    to: Literal["auto", "atac", "rna"] = flag("modality to predict; auto is the one that the model predicts", "auto")
    out_path: str | None = flag("file to write; by default <data>.<modality>.h5ad beside the input", None)
    format: Literal["layer", "types"] = flag("layer writes every cell, types the mean of each type", "layer")
    label_column: str | None = flag("column of obs with the types for --format types; by default cell_type", None)
    min_value: float = flag("with --format layer, smaller values are left out and read as 0", 0.0)

    def __post_init__(self):
        check_numbers(self, "min_value")


def main() -> None:
    flags, ingest, config = parse_flags(__doc__, Flags, IngestConfig, InferConfig)

    # Slow to import: --help and mistaken flags do not wait for them.
    from utils.cells.preprocessed import open_cells, read_cells
    from utils.evaluate.translation import PeakCalibration
    from utils.files.write import check_target, path_with_name, write_whole
    from utils.predict.query import read_query
    from utils.predict.translation import fit_calibration, mean_per_type, translate, write_cells
    from utils.train.distributed import lone_process
    from utils.train.model_folder import check_fits, load_model

    runtime = lone_process(config.device)
    saved = load_model(flags.model_path, "student")
    missing = saved.options["missing"]
    if flags.to not in ("auto", missing):
        raise UserError(
            f"--to {flags.to}: {saved.path} predicts {missing} from {other(missing)}; give a folder that "
            f"pretrain_missing_mod.py made with --missing {flags.to}"
        )
    with open_cells(flags.data_path, None, None) as file:
        path = path_with_name(file.path)
        out_path = flags.out_path or str(path.with_name(f"{path.name.removesuffix(file.suffix)}.{missing}.h5ad"))
        check_target(out_path, ".h5ad", [flags.data_path, flags.ready_path])
        types = _types(file, flags.label_column) if flags.format == "types" else None
        calibration = PeakCalibration()
        if missing == "atac" and flags.ready_path:
            cells = read_cells(flags.ready_path, MODALITIES, say=print)
            check_fits(saved, cells.features, cells.stamp, flags.ready_path)
            if not len(cells.rows("val")):
                raise UserError(f"--ready_path {flags.ready_path}: has no validation cells; preprocess it with some")
            calibration = fit_calibration(saved, cells, config, runtime)
            print(f"calibrated on {len(cells.rows('val')):,} validation cells: {calibration}")
        elif missing == "atac":
            print("not calibrated: only the training weight of open peaks is undone; --ready_path calibrates")
        query = read_query(file, saved, ingest, progress=True)
        for line in query.report:
            print(line)
        found = translate(saved, query.dataset(), config, runtime)
        about = {
            "model": saved.name,
            "model_hash": saved.hash,
            "calibration": calibration.fitted if missing == "atac" else {},
            "trained_on_simulated_cells": saved.is_simulated,
        }
        names = saved.features[missing]
        if types is None:
            obs = file.obs.loc[query.barcodes]
            write_cells(out_path, found, calibration, obs, names, query.empty, flags.min_value, {"scmomer": about})
            size = f"{len(obs):,} cells"
        else:
            means = mean_per_type(found, calibration, types.loc[query.barcodes].to_numpy(), names, query.empty)
            means.uns["scmomer"] = about
            write_whole(means, out_path)
            size = f"{means.n_obs:,} types"
    print(f"wrote {out_path}: {size} × {len(names):,} {FEATURES[missing]}")


def _types(file, column: str | None):
    """Return the type of each cell of an open file, NaN where missing."""
    from utils.cells.labels import clean_labels

    column = column or (file.stamp or {}).get("label_column") or "cell_type"
    if column not in file.obs:
        known = ", ".join(map(str, file.obs.columns)) or "none"
        raise UserError(f"--label_column {column}: {file.path} has no such column in obs, only {known}")
    labels = clean_labels(file.obs[column])
    if labels.isna().all():
        raise UserError(f"--label_column {column}: names no type of any cell of {file.path}; choose another column")
    return labels


if __name__ == "__main__":
    run_script(main)
