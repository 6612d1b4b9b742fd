"""Stage II: join the two encoders on paired cells.

    python pretrain_multimodal.py --preset small --data_path cells.ready.h5mu --rna_model_path runs/rna \\
        --atac_model_path runs/atac --ckpt_dir runs --model_name multimodal

The cell embedding learns to reconstruct both modalities of true pairs, and to tell true pairs from false ones. A false
pair joins the RNA of one cell with the ATAC of another. No label is used unless --pair_labels names a column: then two
cells known to be of the same type never make a false pair. --pairs_within draws both cells from one batch or donor, so
that a difference between batches does not reveal a false pair. The last two blocks of each encoder are trained, or
all blocks with --preset small and tiny (--trainable_blocks).

    python pretrain_multimodal.py --preset small --data_path cells.ready.h5ad --rna_model_path runs/rna \\
        --ckpt_dir runs --model_name denoiser

With one encoder, cells of one modality are enough: the embedding learns to reconstruct it from a part of its features
(--feature_dropout, which --preset small and tiny set to 0.3). Fine-tuning starts from this folder with --other_modality
zeros. Nothing here is about pairs then.

Input: cells from preprocess.py, paired unless there is one encoder, and the folders of stage I. Output:
<ckpt_dir>/<model_name>. Each epoch prints the loss and its parts: rna_mse (squared error of log-normalised RNA) and
atac_bce (cross-entropy of peaks) of true pairs, and pair_accuracy (0.5 is chance). With --alone_weight it adds
rna_mse_of_rna and rna_mse_of_atac: the RNA error when one latent alone reconstructs the cell. spread is the standard
deviation of the embedding over validation cells; if it is near 0, all cells get the same embedding.
"""

from dataclasses import dataclass

from models.shapes import FusionConfig, ScMomerConfig, other
from utils.cli import check_numbers, flag, parse_flags, run_script
from utils.errors import UserError
from utils.train.config import TrainConfig


@dataclass
class Flags:
    data_path: str = flag("preprocessed paired cells, .h5mu; with one encoder, any preprocessed cells")
    ckpt_dir: str = flag("folder for model folders")
    model_name: str = flag("name of the model folder to write", aliases=("--model",))
    atac_model_path: str | None = flag("model folder of pretrain_atac.py; without it, the model knows RNA alone", None)
    rna_model_path: str | None = flag("model folder of pretrain_rna.py; without it, the model knows ATAC alone", None)
    trainable_blocks: int = flag(
        "how many of each encoder's last blocks to train; a negative number trains the whole encoder", 2
    )
    feature_dropout: float = flag(
        "share of a cell's expressed genes and open peaks hidden from the towers while training", 0.0
    )
    pair_weight: float = flag("weight of the loss that separates true pairs from false ones", 1.0)
    pair_labels: str = flag("column of obs with cell types that false pairs must not share, or none", "none")
    pairs_within: str | None = flag("column of obs (batch, donor) that both cells of a false pair share", None)
    alone_weight: float = flag(
        "weight of reconstructing the cell from each modality alone; 0 is the published value", 0.0
    )


def main() -> None:
    flags, config, shape = parse_flags(__doc__, Flags, TrainConfig, FusionConfig, stage="pretrain_multimodal")
    if flags.rna_model_path is None and flags.atac_model_path is None:
        raise UserError("--rna_model_path is missing: give a folder of pretrain_rna.py, of pretrain_atac.py, or both")
    check_numbers(flags, "feature_dropout", below=1)
    check_numbers(flags, "alone_weight", "pair_weight")

    # Slow to import: --help and mistaken flags do not wait for them.
    import torch

    from models.objectives import Denoising, JointPairs
    from models.scmomer import ScMomer
    from utils.cells.minibatches import train_and_val
    from utils.train.model_folder import part
    from utils.train.stage import training_stage
    from utils.train.weights import load_strictly

    with training_stage("multimodal", flags, config) as stage:
        folders = {"rna": flags.rna_model_path, "atac": flags.atac_model_path}
        names = [name for name, folder in folders.items() if folder is not None]
        cells = stage.read(*names)
        parents = {name: stage.start_from(name, folders[name], name) for name in names}
        for parent in parents.values():
            stage.check_fits(parent, cells)

        torch.manual_seed(config.seed)
        parts = {name: parent.config[name] for name, parent in parents.items()} | {"fusion": shape}
        n_features = [len(cells.features.get(name, ())) for name in folders]
        model = ScMomer(ScMomerConfig(**parts), *n_features)
        for name, parent in parents.items():
            load_strictly(model.towers[name].encoder, part(parent.state, "encoder."), parent.path)
        model.start_decoders_at_mean({name: cells.train_mean(name) for name in names})

        if len(names) == 1:
            objective = Denoising(model, flags.trainable_blocks, flags.feature_dropout)
            options = {"missing": other(*names), "other_modality": "zeros"}
            stage.fit(objective, *train_and_val(cells, config.seed), parts, like=cells, saves=model, options=options)
            return
        types = None if flags.pair_labels == "none" else cells.codes(flags.pair_labels, "--pair_labels")
        groups = None if flags.pairs_within is None else cells.codes(flags.pairs_within, "--pairs_within")
        train, val = train_and_val(cells, config.seed, pairs=(types, groups))
        if not train.pairs.n_partners.any():
            raise UserError(
                f"{flags.data_path}: no training cell has a partner for a false pair; choose another --pairs_within "
                "or --pair_labels"
            )

        objective = JointPairs(
            model, flags.trainable_blocks, flags.feature_dropout, flags.alone_weight, flags.pair_weight
        )
        stage.fit(objective, train, val, parts, like=cells, saves=model)


if __name__ == "__main__":
    run_script(main)
