"""Stage I, ATAC: mask stretches of the genome and predict their open peaks with a transformer.

    python pretrain_atac.py --preset small --data_path cells.ready.h5mu --ckpt_dir runs --model_name atac
    torchrun --nproc_per_node=4 pretrain_atac.py --data_path … --ckpt_dir … --model_name …

Input: a file from preprocess.py. Output: the model folder <ckpt_dir>/<model_name>. Each epoch prints the loss (binary
cross-entropy of the masked peaks, open ones weighted) and expected_precision (share of the predicted
probability that falls on open peaks: 1 is perfect, the share of open peaks is chance).
"""

from dataclasses import dataclass

from models.shapes import ATACEncoderConfig
from utils.cli import flag, given, parse_flags, run_script
from utils.train.config import TrainConfig


@dataclass
class Flags:
    data_path: str = flag("preprocessed cells with ATAC, .h5ad or .h5mu")
    ckpt_dir: str = flag("folder for model folders")
    model_name: str = flag("name of the model folder to write", aliases=("--model",))
    mask_ratio: float = flag("share of the patches to hide and predict", 0.15)
    continue_from: str | None = flag(
        "model folder of stage I ATAC, imported or trained here, to start from: shared peaks keep their embedding, new "
        "ones begin at the mean",
        None,
    )


def main() -> None:
    flags, config, shape = parse_flags(__doc__, Flags, TrainConfig, ATACEncoderConfig, stage="pretrain_atac")

    # Slow to import: --help and mistaken flags do not wait for them.
    import torch

    from models.atac_encoder import ATACEncoder
    from models.objectives import MaskedATAC
    from utils.cells.minibatches import train_and_val
    from utils.train.stage import training_stage

    with training_stage("atac", flags, config) as stage:
        cells = stage.read("atac")
        train, val = train_and_val(cells, config.seed)

        earlier = None
        if flags.continue_from:
            earlier = stage.continue_from("atac", flags.continue_from, cells, given(shape))
            shape = earlier.shape
        torch.manual_seed(config.seed)
        encoder = ATACEncoder(shape, len(cells.features["atac"]))

        objective = MaskedATAC(encoder, flags.mask_ratio)
        if earlier:
            earlier.load_into(objective)
        stage.fit(objective, train, val, {"atac": shape}, like=cells)


if __name__ == "__main__":
    run_script(main)
