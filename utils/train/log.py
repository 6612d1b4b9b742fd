"""What a training run leaves to look at: metrics.jsonl, TensorBoard events and the loss curve."""

import json
import shutil
from pathlib import Path

from utils.train.folders import CURVE, METRICS, TENSORBOARD


class RunLog:
    """Keeps the records of a run in a folder; does nothing on all but the main process.

    Parameters
    ----------
    folder : where the files go
    enabled : whether this process writes
    upto_step : when a run is resumed, records behind this optimiser step are dropped: they will be made again
    """

    def __init__(self, folder: Path, enabled: bool, upto_step: int = 0):
        self.folder, self.enabled, self.records = folder, enabled, []
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed on one process only

        folder.mkdir(parents=True, exist_ok=True)
        if upto_step and (folder / METRICS).is_file():
            lines = map(json.loads, (folder / METRICS).read_text().splitlines())
            self.records = [record for record in lines if record["step"] <= upto_step]
        else:
            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        (folder / METRICS).write_text("".join(f"{json.dumps(record)}\n" for record in self.records))
        self.board = SummaryWriter(str(folder / TENSORBOARD), purge_step=upto_step or None)

    def add(self, phase: str, epoch: float, step: int, metrics: dict[str, float]) -> None:
        """Append one record of a phase (train or val) at the end of an epoch."""
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
        """Draw the loss curve.

        Parameters
        ----------
        title, loss_name : above it, and beside its axis
        kept, keep : the epoch whose model was kept, and why: the best or the last
        """
        if not self.enabled:
            return
        self.board.close()
        if self.records:
            from utils.evaluate.plots import loss_curve  # here, because matplotlib is slow to import

            loss_curve(self.records, self.folder / CURVE, title, loss_name, round(kept, 4), keep)


def training_folder(model_folder: Path) -> Path:
    """The folder beside a model's where its training state and log are; it may be deleted once training is over."""
    return model_folder.with_name(model_folder.name + ".training")


def copy_log(model_folder: Path) -> None:
    """Put what was logged into the saved model's folder."""
    source = training_folder(model_folder)
    for name in (METRICS, CURVE):
        if (source / name).is_file():
            shutil.copy(source / name, model_folder / name)
    if (source / TENSORBOARD).is_dir():
        shutil.copytree(source / TENSORBOARD, model_folder / TENSORBOARD, dirs_exist_ok=True)
