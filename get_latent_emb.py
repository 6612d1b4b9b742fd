"""Stage III, first half: write the teacher's latents of the paired training and validation cells.

    python get_latent_emb.py --data_path cells.ready.h5mu --model_path runs/multimodal --ckpt_dir runs/latents

Input: paired cells from preprocess.py and the folder of stage II. Output: train.h5ad and val.h5ad in --ckpt_dir. Each
has one row per barcode, with the latents of both modalities (obsm["rna"], obsm["atac"]) and the joint embedding (X),
and the teacher's hash.
"""

from dataclasses import dataclass

from utils.cli import flag, parse_flags, run_script
from utils.train.config import InferConfig


@dataclass
class Flags:
    data_path: str = flag("preprocessed paired cells, .h5mu")
    model_path: str = flag("model folder of pretrain_multimodal.py")
    ckpt_dir: str = flag("folder for train.h5ad and val.h5ad")


def main() -> None:
    flags, config = parse_flags(__doc__, Flags, InferConfig)

    # Slow to import: --help and mistaken flags do not wait for them.
    from utils.cells.minibatches import CellDataset
    from utils.cells.preprocessed import read_cells
    from utils.files.disk_rows import select
    from utils.predict.infer import infer
    from utils.predict.latents import write_latents
    from utils.train.distributed import distributed_run
    from utils.train.model_folder import check_fits, load_model

    with distributed_run(config.device) as runtime:
        cells = read_cells(flags.data_path, ("rna", "atac"), say=runtime.say)
        teacher = load_model(flags.model_path, "multimodal")
        check_fits(teacher, cells.features, cells.stamp, flags.data_path)
        model = teacher.build()

        def latents(batch):
            latent = model.latents(batch)
            return latent["rna"], latent["atac"], model.fusion(latent)

        for split in ("train", "val"):
            rows = cells.rows(split)
            if not len(rows):
                runtime.say(f"{flags.data_path} has no {split} cells")
                continue
            values = {name: select(matrix, rows) for name, matrix in cells.values.items()}
            dataset = CellDataset(values, cells.obs.index[rows])
            rna, atac, embedding = infer(latents, model, dataset, config, runtime, split)
            if runtime.is_main:
                path = write_latents(
                    flags.ckpt_dir, split, cells.obs.index[rows], embedding, {"rna": rna, "atac": atac}, teacher.hash
                )
                runtime.say(f"wrote {path}: {len(rows):,} cells × {embedding.shape[1]}")


if __name__ == "__main__":
    run_script(main)
