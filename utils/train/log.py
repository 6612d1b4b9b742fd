"""Log a training run: metrics.jsonl, TensorBoard events and the figure of the loss."""

import json
import shutil
from pathlib import Path

from utils.train.folders import CURVE, METRICS, TENSORBOARD


class RunLog:
    """Writes the records of a run into a folder.

    Parameters
    ----------
    folder : folder for the files
    enabled : False on all processes but the first; then nothing is written
    upto_step : optimiser step at which the run is resumed; later records are dropped, since they will be written again
    """

    def __init__(self, folder: Path, enabled: bool, upto_step: int = 0):
        self.folder, self.enabled, self.records = folder, enabled, []
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # here, because it is slow to import

        folder.mkdir(parents=True, exist_ok=True)
        if upto_step and (folder / METRICS).is_file():
            lines = map(_record, (folder / METRICS).read_text().splitlines())
            self.records = [record for record in lines if record and record["step"] <= upto_step]
        else:
            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        (folder / METRICS).write_text("".join(f"{json.dumps(record)}\n" for record in self.records))
        self.board = SummaryWriter(str(folder / TENSORBOARD), purge_step=upto_step or None)

    def add(self, phase: str, epoch: float, step: int, metrics: dict[str, float]) -> None:
        """Append a record.

        Parameters
        ----------
        phase : train or val
        epoch, step : completed epochs (fractions included) and optimiser steps
        metrics : the values to log
        """
        if not self.enabled:
            return
        record = {"phase": phase, "epoch": round(epoch, 4), "step": step} | metrics
        self.records.append(record)
        with open(self.folder / METRICS, "a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(f"{name}/{phase}", value, step)
        self.board.flush()

    def close(self, title: str, loss_name: str, kept: float, keep: str) -> None:
        """Close the TensorBoard file and draw the loss curve.

        Parameters
        ----------
        title : title of the figure
        loss_name : label of the loss axis
        kept : the epoch whose model was saved
        keep : why that epoch: "best" or "last"
        """
        if not self.enabled:
            return
        self.board.close()
        if self.records:
            from utils.evaluate.plots import loss_curve  # here, because matplotlib is slow to import

            loss_curve(self.records, self.folder / CURVE, title, loss_name, round(kept, 4), keep)


def training_folder(model_folder: Path) -> Path:
    """Return the folder of a model's training state and log, beside the model; it may be deleted after training."""
    return model_folder.with_name(model_folder.name + ".training")


def copy_log(model_folder: Path) -> None:
    """Copy the log of a run into the saved model's folder."""
    source = training_folder(model_folder)
    for name in (METRICS, CURVE):
        if (source / name).is_file():
            shutil.copy(source / name, model_folder / name)
    if (source / TENSORBOARD).is_dir():
        shutil.copytree(source / TENSORBOARD, model_folder / TENSORBOARD, dirs_exist_ok=True)


def _record(line: str) -> dict | None:
    """Return a logged record; None for the part of a line that a kill or a full disk has left."""
    try:
        return json.loads(line)
    except ValueError:
        return None
