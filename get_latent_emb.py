"""Write embeddings: the teacher's latents for stage III, or cell or gene embeddings of any model folder.

    python get_latent_emb.py --data_path cells.ready.h5mu --model_path runs/multimodal --ckpt_dir runs/latents
    python get_latent_emb.py --what cells --data_path new_cells.h5ad --model_path runs/student --out_path cells.h5ad
    python get_latent_emb.py --what genes --data_path new_cells.h5ad --model_path runs/rna --out_path genes.h5ad

--what teacher (stage III, first half): reads paired cells from preprocess.py and the folder of stage II. It writes
train.h5ad and val.h5ad to --ckpt_dir, for the paired training and validation cells. Each has one row per barcode, with
the latents of both modalities (obsm["rna"], obsm["atac"]) and the joint embedding (X), and the teacher's hash.
--what cells: reads raw or preprocessed cells, prepares them as for prediction, and writes one embedding per cell.
--what genes: writes the mean of each gene's contextual state over the cells that express it (X), with their number
(obs["n_cells"]) and the model's static gene embedding (obsm["static"]). A path like genes.txt gets the means as
word2vec text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.cells.config import IngestConfig
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError
from utils.train.config import InferConfig


@dataclass
class Flags:
    data_path: str = flag("cells: for the teacher preprocessed paired cells (.h5mu), otherwise any file of cells")
    model_path: str = flag("model folder: of pretrain_multimodal.py for the teacher, otherwise of any stage")
    what: Literal["teacher", "cells", "genes"] = flag("what to embed", "teacher")
    without: Literal["atac", "rna"] | None = flag(
        "cells: with a folder of stage II, leave this modality out and use zeros for its latent", None
    )
    ckpt_dir: str | None = flag("teacher: folder for train.h5ad and val.h5ad", None)
    out_path: str | None = flag("cells, genes: file to write, .h5ad, or .txt for genes as word2vec text", None)


def main() -> None:
    flags, ingest, config = parse_flags(__doc__, Flags, IngestConfig, InferConfig)
    missing = "ckpt_dir" if flags.what == "teacher" else "out_path"
    if getattr(flags, missing) is None:
        raise UserError(f"--{missing} is missing: --what {flags.what} needs to know where to write")
    if flags.without and flags.what != "cells":
        raise UserError(f"--without {flags.without}: is for --what cells alone; leave it out")
    if flags.what == "teacher":
        write_teacher(flags, config)
    else:
        write_embeddings(flags, ingest, config)


def write_teacher(flags: Flags, config: InferConfig) -> None:
    """Write the teacher's latents of the training and validation cells."""
    # Slow to import: --help and mistaken flags do not wait for them.
    from utils.cells.minibatches import CellDataset
    from utils.cells.preprocessed import read_cells
    from utils.files.disk_rows import select
    from utils.predict.infer import infer
    from utils.predict.latents import write_latents
    from utils.train.distributed import distributed_run
    from utils.train.model_folder import check_fits, load_model

    with distributed_run(config.device) as runtime:
        teacher = load_model(flags.model_path, "multimodal")
        teacher.need_both()
        cells = read_cells(flags.data_path, ("rna", "atac"), say=runtime.say)
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


def write_embeddings(flags: Flags, ingest: IngestConfig, config: InferConfig) -> None:
    """Write the embeddings of a file's cells, or of the genes that they express."""
    from utils.cells.preprocessed import read_raw
    from utils.features.gene_vectors import write_gene_vectors
    from utils.files.write import check_target, whole_file, write_whole
    from utils.predict.cell_embeddings import cell_embeddings, inputs_of, without
    from utils.predict.gene_embeddings import gene_embeddings
    from utils.predict.query import read_query
    from utils.train.distributed import distributed_run
    from utils.train.model_folder import PRETRAINED, load_model
    from utils.train.tasks import TASKS

    is_text = flags.what == "genes" and Path(flags.out_path).suffix == ".txt"
    check_target(flags.out_path, ".txt" if is_text else ".h5ad", [flags.data_path])
    with distributed_run(config.device) as runtime, read_raw(flags.data_path) as file:
        saved = load_model(flags.model_path, *PRETRAINED, *TASKS)
        if flags.without:
            saved = without(saved, flags.without)
        if flags.what == "genes" and "rna" not in saved.features:
            raise UserError(f"{saved.path}: has no genes; give the folder of a model that reads RNA")
        inputs = inputs_of(saved) if flags.what == "cells" else ("rna",)
        query = read_query(file, saved, ingest, runtime.is_main, inputs)
        for line in query.report:
            runtime.say(line)
        if flags.what == "cells":
            embedded = cell_embeddings(saved, query, config, runtime)
            shape, note = f"{embedded.n_obs:,} cells × {embedded.n_vars}", ""
        else:
            embedded = gene_embeddings(saved, query.dataset(), config, runtime)
            unseen = int((embedded.n_cells == 0).sum())
            shape = f"{len(embedded):,} genes × {embedded.width}"
            note = f"; {unseen:,} genes are expressed by no cell and have zeros" if unseen else ""
        if runtime.is_main:
            if flags.what == "cells":
                write_whole(embedded, flags.out_path)
            else:
                with whole_file(flags.out_path) as partial:
                    write_gene_vectors(embedded, partial)
            runtime.say(f"wrote {flags.out_path}: {shape}{note}")


if __name__ == "__main__":
    run_script(main)
