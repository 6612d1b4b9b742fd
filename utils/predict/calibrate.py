"""Making a fine-tuned model's confidence mean what it says, on its validation cells."""

from dataclasses import replace
from pathlib import Path

from utils.cells.minibatches import CellDataset
from utils.evaluate.calibration import Calibration, fit_temperature
from utils.predict.infer import infer
from utils.train.config import InferConfig, TrainConfig
from utils.train.distributed import Runtime
from utils.train.folders import write_folder
from utils.train.lock import sole_writer
from utils.train.log import copy_log
from utils.train.model_folder import load_model


def calibrate(folder: Path, val: CellDataset, config: TrainConfig, runtime: Runtime) -> float:
    """Fit the temperature of a saved cell type model on labelled validation cells and save it in the folder.

    The folder also keeps how many cells it was fitted on, so that confidence from too few is not called calibrated.

    Parameters
    ----------
    folder : of the best model
    val : labelled cells that were not trained on
    config, runtime : how to run it

    Returns
    -------
    The temperature; 1 when there are too few validation cells
    """
    saved, temperature = load_model(folder, "celltype"), 1.0
    if len(val):
        model = saved.build()
        how = InferConfig(config.batch_size or InferConfig.batch_size, config.device, config.precision)
        _, logits = infer(model, model, val, how, runtime, "calibrating")
        temperature = float(fit_temperature(logits, val.labels))
    calibration = Calibration.of(val.labels, saved.labels)
    runtime.barrier()  # all have read the folder before it is replaced
    with sole_writer(folder, runtime):
        if runtime.is_main:
            write_folder(folder, replace(saved, temperature=temperature, calibration=calibration).write)
            copy_log(folder)
    runtime.say(f"temperature {temperature:.3f}; {calibration}")
    runtime.barrier()
    return temperature
