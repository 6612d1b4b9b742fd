"""Fine-tuning: cell types from one modality, with the student in the other's place.

    python train_missing_celltype_func.py --preset small --data_path cells.ready.h5mu \\
        --pretrained_model_path runs/student --train_student --ckpt_dir runs --model_name celltype

Input: labelled cells from preprocess.py and a folder of pretrain_missing_mod.py. Only the modality that the student
reads is used. For comparison, --other_modality zeros leaves the student out, and --other_modality measured (with a
folder of pretrain_multimodal.py) reads both modalities. Where no cell was measured in both, start from a folder of
pretrain_rna.py or pretrain_atac.py with --other_modality zeros. Where few cells are labelled, train twice: the second
time with --pseudo_labels_from the first folder, so that all training cells are learned from.

Output: <ckpt_dir>/<model_name>, for predict_cell_type.py. Each epoch prints the loss (cross-entropy) and the
accuracy; at the end a temperature is fitted on the validation cells, so that confidence means what it says.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from models.shapes import MODALITIES, ClassifierConfig, OtherModality, ScMomerConfig, other
from utils.cli import check_numbers, flag, parse_flags, run_script
from utils.errors import UserError
from utils.train.config import InferConfig, TrainConfig


@dataclass
class Flags:
    data_path: str = flag("preprocessed, labelled cells, .h5ad or .h5mu")
    pretrained_model_path: str = flag("model folder of pretrain_missing_mod.py (or of another stage, see above)")
    ckpt_dir: str = flag("folder for model folders")
    model: str = flag("name of the model folder to write", aliases=("--model_name",))
    label_column: str = flag("column of obs with cell types", "cell_type")
    other_modality: OtherModality = flag(
        "what takes the place of the other modality: the student's latent, zeros, or the measured modality", "student"
    )
    missing: Literal["atac", "rna"] = flag("modality to leave out with --other_modality zeros", "atac")
    trainable_blocks: int = flag("number of last encoder blocks to train; negative for the whole encoder", 2)
    train_student: bool = flag("also train the student", False)
    feature_dropout: float = flag("share of a cell's genes and peaks left out in each training step", 0.0)
    labels_per_type: int = flag(
        "at most this many labelled training cells of each type are used, the others are hidden; 0 for all", 0
    )
    pseudo_labels_from: str | None = flag(
        "fine-tuned model folder whose predictions become the labels of training cells without one", None
    )
    pretrained_lr_scale: float = flag("learning rate of all but the classifier, as a multiple of --learning_rate", 1.0)
    class_balance: float = flag("exponent b of class weights (1 / class size)^b: 0 none, 1 full balance", 0.0)


def main() -> None:
    stage = "train_missing_celltype_func"
    flags, config, shape = parse_flags(__doc__, Flags, TrainConfig, ClassifierConfig, stage=stage)
    check_numbers(flags, "feature_dropout", below=1)
    check_numbers(flags, "labels_per_type", "pretrained_lr_scale")

    # Slow to import: --help and mistaken flags do not wait for them.
    import torch

    from models.objectives import CellTypes
    from models.scmomer import ScMomer
    from utils.cells.labels import class_weights, encode_labels, limit_labels
    from utils.cells.minibatches import train_and_val
    from utils.cells.preprocessed import read_cells
    from utils.predict.calibrate import calibrate
    from utils.predict.infer import embed_sample
    from utils.predict.pseudo_labels import pseudo_labels
    from utils.train.distributed import distributed_run
    from utils.train.loop import fit, starts_anew
    from utils.train.model_folder import SavedModel, check_fits, load_model, load_parts

    with distributed_run(config.device) as runtime:
        parent = load_model(flags.pretrained_model_path, "student", "multimodal", *MODALITIES)
        is_alone = parent.kind in MODALITIES
        if (flags.other_modality == "student" and parent.kind != "student") or (
            flags.other_modality != "zeros" and is_alone
        ):
            raise UserError(
                f"{parent.path}: has no student; run pretrain_missing_mod.py first, "
                f"or choose --other_modality {'zeros' if is_alone else 'zeros or measured'}"
            )
        parts = {name: part for name, part in parent.config.items() if name != "student"} | {"classifier": shape}
        missing = other(parent.kind) if is_alone else flags.missing
        options = {"missing": missing, "other_modality": flags.other_modality}
        if flags.other_modality == "student":
            parts["student"], options["missing"] = parent.config["student"], parent.options["missing"]
        model_config = ScMomerConfig(**parts, **options)
        cells = read_cells(flags.data_path, model_config.inputs, say=runtime.say)
        check_fits(parent, cells.features, cells.stamp, flags.data_path)
        codes, classes = encode_labels(cells, flags.label_column)
        codes = limit_labels(codes, cells, flags.labels_per_type, config.seed)
        infer_config = InferConfig(config.batch_size or InferConfig.batch_size, config.device, config.precision)
        parents = {"pretrained": parent.hash}
        if flags.pseudo_labels_from:
            teacher = load_model(flags.pseudo_labels_from, "celltype")
            parents["pseudo_labels"] = teacher.hash
            codes = pseudo_labels(codes, classes, cells, teacher, infer_config, runtime)

        torch.manual_seed(config.seed)
        n_features = [len(parent.features.get(name, ())) for name in MODALITIES]
        model = ScMomer(model_config, *n_features, len(classes))
        state, new = parent.state, ("classifier.",)
        if is_alone:
            tower = f"towers.{parent.kind}."
            state, new = {tower + name: weights for name, weights in state.items()}, ("classifier.", "fusion.", tower)
        load_parts(model, state, new, parent.path)

        train, val = train_and_val(cells, config.seed, keep=codes >= 0, labels=codes)
        folder = Path(flags.ckpt_dir) / flags.model
        if starts_anew(folder, config, runtime):
            model.classifier.standardise(embed_sample(model, train, infer_config, runtime, config.seed))
        weights = class_weights(train.labels, len(classes), flags.class_balance)
        saved = SavedModel(
            kind="celltype",
            config=parts,
            options=options,
            features=parent.features,
            stamp=parent.stamp,
            labels=classes,
            training=asdict(flags) | asdict(config),
            parents=parents,
        )
        objective = CellTypes(
            model,
            flags.trainable_blocks,
            flags.train_student,
            weights,
            flags.feature_dropout,
            flags.pretrained_lr_scale,
        )
        fit(objective, train, val, config, runtime, folder, saved.writer(model), saved.identity)
        calibrate(folder, val, config, runtime)


if __name__ == "__main__":
    run_script(main)
