"""Stage II: join the two encoders on paired cells.

The cell embedding must reconstruct both modalities of true pairs, and tell true pairs from false ones, which join the
RNA of one cell with the ATAC of a cell of another type. The encoders' lower blocks stay as stage I left them. With few
cells, each modality alone should reconstruct, too (--alone_weight 1), and pairs weigh little (--pair_weight 0.03).

    python pretrain_multimodal.py --data_path cells.ready.h5mu --rna_model_path runs/rna --atac_model_path runs/atac \\
        --ckpt_dir runs --model_name multimodal

Input: paired cells from preprocess.py and the two folders of stage I. Output: <ckpt_dir>/<model_name>.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from models.fusion import FusionConfig
from models.objectives import JointPairs
from models.scmomer import ScMomer, ScMomerConfig
from utils.cli import check_name, check_numbers, flag, parse_flags, run_script, with_defaults
from utils.data.dataset import train_and_val
from utils.data.read import read_cells
from utils.train.checkpoint import SavedModel, check_fits, load_model, load_strictly, part
from utils.train.distributed import distributed_run
from utils.train.engine import TrainConfig, fit


@dataclass
class Flags:
    data_path: str = flag("preprocessed paired cells, .h5mu")
    atac_model_path: str = flag("model folder of pretrain_atac.py")
    rna_model_path: str = flag("model folder of pretrain_rna.py")
    ckpt_dir: str = flag("folder for model folders")
    model_name: str = flag("name of the model folder")
    trainable_blocks: int = flag("last blocks of each encoder that are trained on; negative for everything", 2)
    feature_dropout: float = flag("share of a cell's expressed genes and open peaks that the towers are not shown", 0.0)
    pair_weight: float = flag("weight of telling true pairs from false ones", 1.0)
    alone_weight: float = flag("weight of reconstructing the cell from each modality alone; 0 as published", 0.0)


def main() -> None:
    flags, config, shape = parse_flags(__doc__, Flags, with_defaults(TrainConfig, batch_size=8), FusionConfig)
    check_name(flags, "model_name")
    check_numbers(flags, "feature_dropout", below=1)
    check_numbers(flags, "alone_weight", "pair_weight")
    with distributed_run(config.device) as runtime:
        cells = read_cells(flags.data_path, ("rna", "atac"))
        parents = {"rna": load_model(flags.rna_model_path, "rna"), "atac": load_model(flags.atac_model_path, "atac")}
        for parent in parents.values():
            check_fits(parent, cells.features, cells.stamp, flags.data_path)

        torch.manual_seed(config.seed)
        parts = {name: parent.config[name] for name, parent in parents.items()} | {"fusion": shape}
        model = ScMomer(ScMomerConfig(**parts), len(cells.features["rna"]), len(cells.features["atac"]))
        for name, parent in parents.items():
            load_strictly(model.towers[name].encoder, part(parent.state, "encoder."), parent.path)

        model.start_decoders_at_mean(cells.train_mean("rna"), cells.train_mean("atac"))

        train, val = train_and_val(cells, config.seed, labels=cells.label_codes(), false_pairs=True)
        saved = SavedModel(
            kind="multimodal",
            config=parts,
            features=cells.features,
            stamp=cells.stamp,
            training=asdict(flags) | asdict(config),
            parents={name: parent.hash for name, parent in parents.items()},
        )
        objective = JointPairs(
            model, flags.trainable_blocks, flags.feature_dropout, flags.alone_weight, flags.pair_weight
        )
        folder = Path(flags.ckpt_dir) / flags.model_name
        fit(objective, train, val, config, runtime, folder, saved.writer(model), saved.identity)


if __name__ == "__main__":
    run_script(main)
