"""Labels for unlabelled training cells, by a model that was fine-tuned on few labels."""

import numpy as np

from models.shapes import MODALITIES
from utils.cells.labels import label_codes
from utils.cells.minibatches import CellDataset
from utils.cells.preprocessed import Cells
from utils.errors import UserError
from utils.files.disk_rows import select
from utils.predict.infer import predict_types
from utils.train.config import InferConfig
from utils.train.distributed import Runtime
from utils.train.model_folder import SavedModel, check_fits


def pseudo_labels(
    codes: np.ndarray,
    classes: list[str],
    cells: Cells,
    teacher: SavedModel,
    config: InferConfig,
    runtime: Runtime,
) -> np.ndarray:
    """Class numbers in which training cells without one have what a teacher predicts.

    The teacher sees its cells whole and its pupil does not (feature dropout), as in the noisy student of Xie et al.
    2020; labels are single classes, as in Lee 2013.

    Parameters
    ----------
    codes : [cells] int, class or -1 for none
    classes : names of the classes
    cells : of the file, with all modalities that the teacher reads
    teacher : fine-tuned on cells of this file
    config, runtime : how to run the teacher

    Returns
    -------
    [cells] int64; labels that were there, and cells of other splits, stay as they are

    Raises
    ------
    UserError
        If the teacher was made for other genes or peaks, knows other cell types, or reads what is not there.
    """
    check_fits(teacher, cells.features, cells.stamp, cells.path)
    lacking = [name for name in MODALITIES if name in teacher.model_config.inputs and name not in cells.values]
    if lacking:
        raise UserError(
            f"{teacher.path}: reads {lacking[0].upper()}, which is not read here; give a model that does not"
        )
    unknown = sorted(set(teacher.labels) - set(classes))
    if unknown:
        raise UserError(
            f"{teacher.path}: knows cell types that no training cell has: {', '.join(unknown[:5])}; "
            "give a model that was fine-tuned on labels of this file"
        )
    train = cells.rows("train")
    rows = train[codes[train] < 0]
    if not len(rows):
        runtime.say("pseudo-labels: all training cells have a label, there is nothing to do")
        return codes
    values = {name: select(cells.values[name], rows) for name in teacher.model_config.inputs}
    prediction = predict_types(teacher, CellDataset(values, cells.obs.index[rows]), config, runtime)
    codes = codes.copy()
    codes[rows] = label_codes(prediction.types, classes)
    runtime.say(f"pseudo-labels: {len(rows):,} training cells without a label take those of {teacher.path}")
    return codes
