"""Stage I, ATAC: hide stretches of genome and let a transformer tell which of their peaks are open.

    python pretrain_atac.py --data_path cells.ready.h5mu --ckpt_dir runs --model_name atac
    torchrun --nproc_per_node=4 pretrain_atac.py --data_path … --ckpt_dir … --model_name …

Input: a file from preprocess.py. Output: the model folder <ckpt_dir>/<model_name>.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from models.atac_encoder import ATACEncoder, ATACEncoderConfig
from models.objectives import MaskedATAC
from utils.cli import check_name, flag, parse_flags, run_script, with_defaults
from utils.data.dataset import train_and_val
from utils.data.read import read_cells
from utils.train.checkpoint import SavedModel
from utils.train.distributed import distributed_run
from utils.train.engine import TrainConfig, fit


@dataclass
class Flags:
    data_path: str = flag("preprocessed cells with ATAC, .h5ad or .h5mu")
    ckpt_dir: str = flag("folder for model folders")
    model_name: str = flag("name of the model folder")
    mask_ratio: float = flag("share of the patches to hide and predict", 0.15)


def main() -> None:
    flags, config, shape = parse_flags(__doc__, Flags, with_defaults(TrainConfig, batch_size=32), ATACEncoderConfig)
    check_name(flags, "model_name")
    with distributed_run(config.device) as runtime:
        cells = read_cells(flags.data_path, ("atac",))
        torch.manual_seed(config.seed)
        objective = MaskedATAC(ATACEncoder(shape, len(cells.features["atac"])), flags.mask_ratio)
        train, val = train_and_val(cells, config.seed)
        saved = SavedModel(
            kind="atac",
            config={"atac": shape},
            features=cells.features,
            stamp=cells.stamp,
            training=asdict(flags) | asdict(config),
        )
        folder = Path(flags.ckpt_dir) / flags.model_name
        fit(objective, train, val, config, runtime, folder, saved.writer(objective), saved.identity)


if __name__ == "__main__":
    run_script(main)
