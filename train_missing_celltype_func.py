"""Fine-tuning: cell types, usually from one modality, with the student in place of the other.

    python train_missing_celltype_func.py --preset small --data_path cells.ready.h5mu \\
        --pretrained_model_path runs/student --train_student --ckpt_dir runs --model_name celltype

Input: labelled cells from preprocess.py and a folder of pretrain_missing_mod.py. Only the modality that the student
reads is used. For comparison, --other_modality zeros leaves the student out, and --other_modality measured (with a
folder of pretrain_multimodal.py) reads both modalities. If no cell was measured in both, start from a folder of
pretrain_multimodal.py with one encoder, and give --other_modality zeros. If few cells are labelled, train twice: the
second time with --pseudo_labels_from the first folder, so that the model learns from all training cells.
--other_modality none has the classifier of scBERT instead of ours: three linear layers on one number per gene
(--classifier_hidden 128 as there).

Output: <ckpt_dir>/<model_name>, for predict_cell_type.py. Each epoch prints the loss (cross-entropy) and the
accuracy; at the end a temperature is fitted on the validation cells, which calibrates the confidence, and so are the
thresholds of prediction sets and of novelty. Where cells come from several batches, --calibrate_across fits all of
these on batches that the model was not trained on. The folder also keeps three simple classifiers, whose disagreement
marks doubtful cells, the marker genes of each type, and with --label_hierarchy what each type is a kind of. With
--mix_baselines yes, the probabilities are a mixture of the model's and those of the three classifiers. With auto, they
are so only if this adds a point to the mean of accuracy and macro-F1 on validation cells, or with --calibrate_across on
the batches left out.
"""

from dataclasses import dataclass
from typing import Literal

from models.shapes import MODALITIES, ClassifierConfig, OtherModality, ScMomerConfig
from utils.cli import check_numbers, flag, parse_flags, run_script
from utils.errors import UserError
from utils.train.config import TrainConfig


@dataclass
class Flags:
    data_path: str = flag("preprocessed, labelled cells, .h5ad or .h5mu")
    pretrained_model_path: str = flag("model folder of pretrain_missing_mod.py (or of another stage, see above)")
    ckpt_dir: str = flag("folder for model folders")
    model: str = flag("name of the model folder to write", aliases=("--model_name",))
    label_column: str = flag("column of obs with cell types", "cell_type")
    other_modality: OtherModality = flag(
        "what replaces the other modality: the student's latent, zeros, the measured modality itself, or none: RNA "
        "alone through a classifier like scBERT's",
        "student",
    )
    missing: Literal["atac", "rna"] = flag("modality to leave out with --other_modality zeros", "atac")
    trainable_blocks: int = flag(
        "how many of the encoder's last blocks to train; a negative number trains the whole encoder", 2
    )
    train_student: bool = flag("also train the student", False)
    feature_dropout: float = flag("share of a cell's genes and peaks left out in each training step", 0.0)
    labels_per_type: int = flag(
        "use at most this many labelled training cells of each type and hide the other labels; 0 uses all", 0
    )
    pseudo_labels_from: str | None = flag(
        "cell type model folder whose predictions become the labels of training cells without one", None
    )
    pretrained_lr_scale: float = flag("learning rate of all but the new head, as a multiple of --learning_rate", 1.0)
    class_balance: float = flag(
        "weight rare types more: each type has weight (1 / its size)^b; 0 not at all, 1 fully", 0.0
    )
    mix_baselines: Literal["no", "auto", "yes"] = flag(
        "mix the probabilities with those of the simple classifiers in the folder; auto: where validation cells say "
        "that it helps (with --calibrate_across, the batches left out)",
        "no",
    )
    calibrate_across: str | None = flag(
        "column of obs with batches: confidence, sets and novelty are fitted on batches left out (2 or 3 more runs)",
        None,
    )
    label_hierarchy: str | None = flag(
        "a .csv or .tsv file with a type and its parent per line, or columns of obs from fine to coarse", None
    )

    def __post_init__(self):
        if self.calibrate_across and self.pseudo_labels_from:
            raise UserError(
                f"--calibrate_across {self.calibrate_across}: the labels of --pseudo_labels_from come from a model "
                "that knows all batches; leave one of the two out"
            )


def main() -> None:
    name = "train_missing_celltype_func"
    flags, config, shape = parse_flags(__doc__, Flags, TrainConfig, ClassifierConfig, stage=name)
    check_numbers(flags, "feature_dropout", below=1)
    check_numbers(flags, "labels_per_type", "pretrained_lr_scale")

    # Slow to import: --help and mistaken flags do not wait for them.
    import torch

    from models.objectives import FineTuning
    from utils.cells.hierarchy import read_hierarchy
    from utils.cells.labels import class_weights, limit_labels
    from utils.cells.minibatches import CellDataset, train_and_val
    from utils.predict.calibrate import calibrate
    from utils.predict.infer import embed_sample
    from utils.predict.left_out import folds_of, score_left_out
    from utils.predict.pseudo_labels import pseudo_labels
    from utils.train.cell_types import CELL_TYPES
    from utils.train.fine_tune import parts_for_head, with_head
    from utils.train.stage import Stage, training_stage

    with training_stage("celltype", flags, config) as stage:
        parent = stage.start_from("pretrained", flags.pretrained_model_path, "student", "multimodal", *MODALITIES)
        parts, options = parts_for_head(parent, flags.other_modality, flags.missing)
        cells = stage.read(*ScMomerConfig(**parts, **options).inputs)
        stage.check_fits(parent, cells)

        targets, _, types = CELL_TYPES.targets(cells, flags.label_column)
        codes = limit_labels(targets["cell_type"], cells, flags.labels_per_type, config.seed)
        if flags.pseudo_labels_from:
            teacher = stage.start_from("pseudo_labels", flags.pseudo_labels_from, "celltype")
            codes = pseudo_labels(codes, types, cells, teacher, stage.infer_config, stage.runtime)
        known = {}
        if flags.label_hierarchy:
            known["hierarchy"] = read_hierarchy(flags.label_hierarchy, cells, flags.label_column, types)
        if flags.calibrate_across:
            folds_of(cells, codes, flags.calibrate_across)  # refuses a single batch before anything slow
        train, val = train_and_val(cells, config.seed, keep=codes >= 0, targets={"cell_type": codes})

        def fine_tune(stage: Stage, train: CellDataset, val: CellDataset) -> None:
            torch.manual_seed(config.seed)
            model = with_head(parent, parts, options, CELL_TYPES.make_head(shape, types))
            if stage.starts_anew and flags.other_modality != "none":  # scBERT's head takes its hidden layer as is
                model.head.standardise(embed_sample(model, train, stage.infer_config, stage.runtime, config.seed))
            model.head.class_weight = class_weights(train.targets["cell_type"], len(types), flags.class_balance)
            objective = FineTuning(
                model, flags.trainable_blocks, flags.train_student, flags.feature_dropout, flags.pretrained_lr_scale
            )
            with_shape = parts | {"head": shape}
            stage.fit(objective, train, val, with_shape, like=parent, saves=model, options=options, outputs=types)

        fine_tune(stage, train, val)
        left_out, mix, how = None, flags.mix_baselines, (stage.infer_config, stage.runtime)
        if flags.calibrate_across:
            left_out = score_left_out(stage, fine_tune, cells, codes, flags.calibrate_across, mix)
            mix = "yes" if left_out.is_mixed else "no"  # what users will meet is cells of other batches
        calibrate(stage.folder, "celltype", val, *how, train, known, left_out, mix)


if __name__ == "__main__":
    run_script(main)
