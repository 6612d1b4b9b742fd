"""Models without some of the batches, for calibration across batches (--calibrate_across)."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np

from utils.cells.minibatches import CellDataset, train_and_val
from utils.cells.preprocessed import Cells
from utils.errors import UserError
from utils.evaluate.across import LeftOut, batch_folds
from utils.evaluate.calibration import fit_temperature
from utils.evaluate.mixture import LEAST_GAIN, difference
from utils.evaluate.novelty import N_REFERENCE, fit_novelty
from utils.files.disk_rows import select
from utils.predict.calibrate import calibrate
from utils.predict.infer import decode, embed_sample, inputs_of
from utils.train.distributed import Quiet
from utils.train.log import training_folder
from utils.train.model_folder import SavedModel, load_model
from utils.train.stage import Stage

FLAG = "--calibrate_across"


def folds_of(cells: Cells, codes: np.ndarray, column: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each fold the rows that a model is trained without, and those of them that it can be scored on.

    Both are labelled training and validation cells of the fold's batches. Cells of a type that no other batch has are
    not scored, since no model without them can know it. A fold without cells to score is left out.

    Parameters
    ----------
    cells : the model-ready cells
    codes : [cells] class numbers, -1 for none
    column : column of obs with the batches

    Raises
    ------
    UserError
        If the column is missing, has one batch alone, a fold leaves fewer than two types to train on, or no batches
        share types.
    """
    if column not in cells.obs:
        known = ", ".join(map(str, cells.obs.columns))
        raise UserError(f"{FLAG} {column}: {cells.path} has no such column in obs, only {known}")
    batch, split = cells.obs[column], cells.obs["split"].to_numpy()
    known = np.flatnonzero((codes >= 0) & np.isin(split, ("train", "val")) & batch.notna().to_numpy())
    names = batch.astype(str).to_numpy()
    folds = [known[np.isin(names[known], some)] for some in batch_folds(names[known], f"{FLAG} {column}")]
    found = []
    for rows in folds:
        others = np.unique(codes[np.setdiff1d(np.flatnonzero((codes >= 0) & (split == "train")), rows)])
        if len(others) < 2:
            raise UserError(
                f"{FLAG} {column}: without the cells of {', '.join(sorted(set(names[rows])))}, fewer than two types "
                "are left to train on; name a column whose batches hold several types each"
            )
        if np.isin(codes[rows], others).any():
            found.append((rows, rows[np.isin(codes[rows], others)]))
    if not found:
        raise UserError(f"{FLAG} {column}: no type is in two of its batches; name a column whose batches share types")
    return found


def score_left_out(
    stage: Stage,
    fine_tune: Callable[[Stage, CellDataset, CellDataset], None],
    cells: Cells,
    codes: np.ndarray,
    column: str,
    mix: Literal["no", "auto", "yes"] = "no",
) -> LeftOut:
    """Train a model without each fold of batches, as the model itself was trained, and score the cells left out.

    Parameters
    ----------
    stage : the run that has trained the model
    fine_tune : trains a model on training and validation cells, and writes the folder of the stage that it is given
    cells, codes, column : as in `folds_of`
    mix : as for `calibrate`; each model has a mixture of its own, since what it is mixed with must not know the cells.
        With auto, the cells left out decide: mixtures are used if they gain enough in the mean of the models.
    """
    place, config = training_folder(stage.folder) / "left_out", replace(stage.config, overwrite=True, resume=False)
    quiet = Quiet(stage.runtime.device, stage.runtime.rank, stage.runtime.world_size)
    names, parts = cells.obs[column].astype(str).to_numpy(), {False: [], True: []}
    gains, has_mixture = [], False

    def score(saved: SavedModel, cells: CellDataset) -> tuple[np.ndarray, dict[bool, np.ndarray]]:
        """Embeddings, and the logits of the model (False) and of its mixture (True), if it has one."""
        alone = replace(saved, fitted={}, arrays={})
        embedding, found = decode(alone, cells, stage.infer_config, stage.runtime, "scoring")
        mixed = found | saved.task.decode_on_values(found, inputs_of(saved, cells), saved.fitted, saved.arrays)
        return embedding, {False: found["logits"], True: mixed["logits"]}

    for number, (without, rows) in enumerate(folds_of(cells, codes, column)):
        keep = codes >= 0
        keep[without] = False
        train, val = train_and_val(cells, stage.config.seed, keep, {"cell_type": codes})
        stage.runtime.say(
            f"calibrating across {column}: a model without {', '.join(sorted(set(names[rows])))} ({len(train):,} "
            f"training cells), scored on {len(rows):,} cells of these"
        )
        trial = replace(stage, folder=place / str(number), config=config, runtime=quiet)
        fine_tune(trial, train, val)
        if mix != "no":
            calibrate(trial.folder, stage.kind, val, stage.infer_config, quiet, train, mix="yes")
        values = {name: select(matrix, rows) for name, matrix in cells.values.items()}
        dataset, saved = CellDataset(values, cells.obs.index[rows]), load_model(trial.folder, stage.kind)
        embedding, logits = score(saved, dataset)
        gains.append(difference(logits[True], logits[False], codes[rows]))
        has_mixture |= "mixture" in saved.fitted
        # With fewer cells a model takes fewer steps and is less sure. Scaled by its own temperature within batches, its
        # logits are as sharp as the model's own will be, and what is left is the change from within to across.
        within = score(saved, val)[1] if len(val) else None
        sample = embed_sample(saved.build(), train, stage.infer_config, stage.runtime, 0, N_REFERENCE)
        distances = (fit_novelty(sample.numpy(), embedding) or {"held_out": []})["held_out"]
        for is_mixed, of_cells in logits.items():
            temperature = fit_temperature(within[is_mixed], val.targets["cell_type"]) if within else 1.0
            scaled = of_cells / np.float32(temperature)
            parts[is_mixed].append((names[rows], np.full(len(rows), number), scaled, codes[rows], np.array(distances)))
    stage.runtime.barrier()  # every process has read the folders
    if stage.runtime.is_main:
        shutil.rmtree(place, ignore_errors=True)
    gain = float(np.mean(gains)) if has_mixture else None
    use_mixed = mix == "yes" or (mix == "auto" and gain is not None and gain >= LEAST_GAIN)
    return LeftOut(column, *(np.concatenate(part) for part in zip(*parts[use_mixed], strict=True)), use_mixed, gain)
