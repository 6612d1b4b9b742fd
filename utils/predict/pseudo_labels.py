"""Labels for unlabelled training cells, by a model that was fine-tuned on few labels."""

import numpy as np

from models.heads import LEAST_DEVIATION
from models.shapes import MODALITIES
from utils.cells.labels import label_codes
from utils.cells.minibatches import CellDataset
from utils.cells.preprocessed import Cells
from utils.errors import UserError
from utils.evaluate.calibration import share_ratios, with_shares
from utils.evaluate.label_spreading import spread_labels
from utils.files.disk_rows import select
from utils.predict.infer import predict
from utils.train.config import InferConfig
from utils.train.distributed import Runtime
from utils.train.model_folder import SavedModel, check_fits, split_note


def pseudo_labels(
    codes: np.ndarray,
    classes: list[str],
    cells: Cells,
    teacher: SavedModel,
    config: InferConfig,
    runtime: Runtime,
) -> np.ndarray:
    """Class numbers, with a teacher's predictions for training cells that have none.

    The teacher sees whole cells, the model that learns from it only a part of their features (feature dropout), as in
    the noisy student of Xie et al. 2020. A pseudo-label is the most likely class alone, as in Lee 2013. Where the
    labelled cells have other shares of the classes than the validation cells, the teacher's probabilities are first
    corrected for these (`share_ratios`).

    Parameters
    ----------
    codes : [cells] int, class or -1 for none
    classes : names of the classes
    cells : with all modalities that the teacher reads
    teacher : a cell type model that was fine-tuned on cells of this file, with these labels
    config, runtime : how to run the teacher

    Returns
    -------
    [cells] int64; existing labels, and cells of other splits, are unchanged

    Raises
    ------
    UserError
        If the teacher has other genes, peaks or cell types, or reads a modality that is absent.
    """
    check_fits(teacher, cells.features, cells.stamp, cells.path)
    if note := split_note(teacher, cells.stamp, cells.path):
        runtime.say(note)
    lacking = [name for name in MODALITIES if name in teacher.model_config.inputs and name not in cells.values]
    if lacking:
        raise UserError(
            f"{teacher.path}: reads {lacking[0].upper()}, which this run does not; "
            "give a model that reads no more than this one"
        )
    unknown = sorted(set(teacher.outputs) - set(classes))
    if unknown:
        raise UserError(
            f"{teacher.path}: predicts cell types that no training cell has: {', '.join(unknown[:5])}; "
            "give a model that was fine-tuned on labels of this file"
        )
    train = cells.rows("train")
    rows = train[codes[train] < 0]
    if not len(rows):
        runtime.say("pseudo-labels: all training cells have a label; none is needed")
        return codes
    values = {name: select(cells.values[name], train) for name in teacher.model_config.inputs}
    prediction = predict(teacher, CellDataset(values, cells.obs.index[train]), config, runtime)
    known, val = codes[train], codes[cells.rows("val")]
    place = label_codes(np.asarray(teacher.outputs, dtype=object), classes)
    ratios = share_ratios(known[known >= 0], val[val >= 0], len(classes))
    probability = np.zeros((len(train), len(classes)))
    probability[:, place] = prediction["probability"]
    corrected = with_shares(probability, ratios)
    embedding = (prediction.embedding - prediction.embedding.mean(0)) / (prediction.embedding.std(0) + LEAST_DEVIATION)
    spread = spread_labels(corrected, embedding, known)
    plain, corrected, spread = (p.argmax(1)[known < 0] for p in (probability, corrected, spread))
    codes = codes.copy()
    codes[rows] = spread
    runtime.say(
        f"pseudo-labels: {len(rows):,} training cells without a label get the predictions of {teacher.path}; the "
        f"shares of types among validation cells change {(corrected != plain).sum():,} of them, and their nearest "
        f"neighbours {(spread != corrected).sum():,}"
    )
    if never := [classes[kind] for kind in np.setdiff1d(val[val >= 0], spread)]:
        runtime.say(
            f"warning: none of these cells is labelled {', '.join(never[:5])}{', …' if len(never) > 5 else ''}, though "
            f"validation cells are; if these types should be there, train {teacher.path} for longer or on more labels"
        )
    return codes
