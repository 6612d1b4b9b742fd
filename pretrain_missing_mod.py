"""Stage III, second half: train a student that replaces the missing modality.

    python pretrain_missing_mod.py --preset small --data_path cells.ready.h5mu --model_path runs/multimodal \\
        --dir_train runs/latents --dir_val runs/latents --ckpt_dir runs --model_name student

From the measured modality alone, the student predicts the teacher's latent of the other modality. Fusion and decoders
are trained with it, so that the cell embedding still reconstructs both modalities.

Input: paired cells, the folder of stage II and the latents of get_latent_emb.py. Output: <ckpt_dir>/<model_name>.
Each epoch prints the loss and its parts: latent_mse and latent_cosine (student against teacher), rna_mse (squared
error of log-normalised RNA), atac_bce (cross-entropy of peaks), and with --alone_weight rna_mse_of_student (the cell
reconstructed from the student's latent alone, which then dominates the loss).
"""

from dataclasses import dataclass
from typing import Literal

from models.shapes import MODALITIES, ScMomerConfig, StudentConfig
from utils.cli import check_numbers, flag, parse_flags, run_script
from utils.train.config import TrainConfig


@dataclass
class Flags:
    data_path: str = flag("preprocessed paired cells, .h5mu")
    model_path: str = flag("model folder of pretrain_multimodal.py, the teacher")
    dir_train: str = flag("folder with train.h5ad of get_latent_emb.py (or the file itself)")
    dir_val: str = flag("folder with val.h5ad of get_latent_emb.py (or the file itself)")
    ckpt_dir: str = flag("folder for model folders")
    model_name: str = flag("name of the model folder to write", aliases=("--model",))
    missing: Literal["atac", "rna"] = flag("modality that will be missing, which the student replaces", "atac")
    feature_dropout: float = flag("share of the measured genes or peaks hidden from the student while training", 0.0)
    alone_weight: float = flag("weight of reconstructing the cell from the student's latent alone", 0.0)
    teacher_weight: float = flag("weight of the teacher's latent; at 0 the student only reconstructs the cell", 1.0)
    missing_weight: float = flag(
        "weight of reconstructing the missing modality; at 0 (and --teacher_weight 0) the student never sees it", 1.0
    )
    blank_decoders: bool = flag(
        "set the decoders back to the training means, which predicts the missing modality better", False
    )


def main() -> None:
    flags, config, shape = parse_flags(__doc__, Flags, TrainConfig, StudentConfig, stage="pretrain_missing_mod")
    check_numbers(flags, "feature_dropout", below=1)
    check_numbers(flags, "alone_weight", "teacher_weight", "missing_weight")

    # Slow to import: --help and mistaken flags do not wait for them.
    import torch

    from models.objectives import Distillation
    from models.scmomer import ScMomer
    from utils.cells.minibatches import train_and_val
    from utils.predict.latents import read_latents
    from utils.train.model_folder import load_parts
    from utils.train.stage import training_stage

    with training_stage("student", flags, config) as stage:
        cells = stage.read("rna", "atac")
        teacher = stage.start_from("teacher", flags.model_path, "multimodal")
        teacher.need_both()
        stage.check_fits(teacher, cells)
        latents = read_latents({"train": flags.dir_train, "val": flags.dir_val}, cells, teacher)
        train, val = train_and_val(cells, config.seed, latents=latents)

        torch.manual_seed(config.seed)
        parts, options = teacher.config | {"student": shape}, {"missing": flags.missing, "other_modality": "student"}
        model = ScMomer(ScMomerConfig(**parts, **options), len(cells.features["rna"]), len(cells.features["atac"]))
        load_parts(model, teacher.state, new="student.", path=teacher.path)
        if flags.blank_decoders:
            model.start_decoders_at_mean({name: cells.train_mean(name) for name in MODALITIES}, blank=True)

        objective = Distillation(
            model, flags.feature_dropout, flags.alone_weight, flags.teacher_weight, flags.missing_weight
        )
        stage.fit(objective, train, val, parts, like=cells, saves=model, options=options)


if __name__ == "__main__":
    run_script(main)
