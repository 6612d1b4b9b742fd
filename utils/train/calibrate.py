"""Making a fine-tuned model's confidence mean what it says, on its validation cells."""

from dataclasses import replace
from pathlib import Path

from utils.data.dataset import CellDataset
from utils.report.calibration import fit_temperature
from utils.train.checkpoint import load_model
from utils.train.distributed import Runtime
from utils.train.engine import TrainConfig
from utils.train.folders import write_folder
from utils.train.infer import InferConfig, infer
from utils.train.lock import sole_writer
from utils.train.log import copy_log


def calibrate(folder: Path, val: CellDataset, config: TrainConfig, runtime: Runtime) -> float:
    """Fit the temperature of a saved cell type model on labelled validation cells and save it in the folder.

    Parameters
    ----------
    folder : of the best model
    val : labelled cells that were not trained on
    config, runtime : how to run it

    Returns
    -------
    The temperature; 1 when there are too few validation cells
    """
    if not len(val):
        return 1.0
    saved = load_model(folder, "celltype")
    model = saved.build()
    how = InferConfig(config.batch_size or InferConfig.batch_size, config.device, config.precision)
    _, logits = infer(model, model, val, how, runtime, "calibrating")
    temperature = float(fit_temperature(logits, val.labels))
    runtime.barrier()  # all have read the folder before it is replaced
    with sole_writer(folder, runtime):
        if runtime.is_main:
            write_folder(folder, replace(saved, temperature=temperature).write)
            copy_log(folder)
            print(f"temperature {temperature:.3f} from {len(val):,} validation cells", flush=True)
    runtime.barrier()
    return temperature
