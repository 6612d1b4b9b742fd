"""Stage I, RNA: mask expressed genes and predict their expression bins with a Performer.

    python pretrain_rna.py --preset small --data_path cells.ready.h5mu --ckpt_dir runs --model_name rna
    python pretrain_rna.py --continue_from runs/panglao --data_path cells.ready.h5ad --ckpt_dir runs --model_name rna
    torchrun --nproc_per_node=4 pretrain_rna.py --data_path … --ckpt_dir … --model_name …

Input: a file from preprocess.py. Output: the model folder <ckpt_dir>/<model_name>. Each epoch prints the loss
(cross-entropy of the masked genes' bins) and the accuracy (share of these bins predicted correctly), means over cells.
"""

from dataclasses import dataclass, replace
from typing import Literal

from models.shapes import RNAEncoderConfig
from utils.cli import flag, given, parse_flags, run_script
from utils.errors import UserError
from utils.train.config import TrainConfig

MAX_CELLS = 20_000
"""Co-expression is computed on at most this many training cells."""


@dataclass
class Flags:
    data_path: str = flag("preprocessed cells with RNA, .h5ad or .h5mu")
    ckpt_dir: str = flag("folder for model folders")
    model_name: str = flag("name of the model folder to write", aliases=("--model",))
    mask_ratio: float = flag("share of a cell's expressed genes to predict", 0.15)
    gene_embedding: Literal["learned", "coexpression"] = flag(
        "learned: random at first, then trained; coexpression: the genes' co-expression in the training cells (an SVD, "
        "each gene scaled to the same length), kept frozen",
        "learned",
    )
    gene_embedding_path: str | None = flag("file of gene vectors, word2vec text (gene2vec) or .h5ad, kept frozen", None)
    continue_from: str | None = flag(
        "model folder of stage I RNA, imported or trained here, to start from: shared genes keep their embedding, new "
        "ones begin at the mean",
        None,
    )


def main() -> None:
    flags, config, shape = parse_flags(__doc__, Flags, TrainConfig, RNAEncoderConfig, stage="pretrain_rna")
    if flags.gene_embedding_path and flags.gene_embedding != "learned":
        raise UserError(
            f"--gene_embedding {flags.gene_embedding} and --gene_embedding_path are two embeddings; give one"
        )
    if flags.continue_from and (flags.gene_embedding_path or flags.gene_embedding != "learned"):
        raise UserError(f"--continue_from {flags.continue_from} has its own gene embedding; give no other")

    # Slow to import: --help and mistaken flags do not wait for them.
    import numpy as np
    import torch

    from models.objectives import MaskedRNA
    from models.rna_encoder import RNAEncoder
    from utils.cells.minibatches import train_and_val
    from utils.evaluate.gene_features import coexpression_embedding
    from utils.features.gene_vectors import read_gene_embedding
    from utils.train.stage import training_stage

    with training_stage("rna", flags, config) as stage:
        cells = stage.read("rna")
        train, val = train_and_val(cells, config.seed)

        genes = cells.features["rna"]
        vectors = earlier = None
        if flags.continue_from:
            earlier = stage.continue_from("rna", flags.continue_from, cells, given(shape))
            shape = earlier.shape
        if flags.gene_embedding_path:
            vectors, found = read_gene_embedding(flags.gene_embedding_path, genes, shape.dim)
            stage.runtime.say(f"gene embedding: {found.sum():,} of {len(genes):,} genes found, the others are zero")
        elif flags.gene_embedding == "coexpression":
            rows = np.random.default_rng(config.seed).permutation(cells.rows("train"))[:MAX_CELLS]
            vectors = coexpression_embedding(cells.values["rna"][np.sort(rows)], shape.dim, config.seed)
        if vectors is not None:
            shape = replace(shape, freeze_gene_embedding=True)
        torch.manual_seed(config.seed)
        encoder = RNAEncoder(shape, len(genes))
        if vectors is not None:
            encoder.gene_embedding.weight.data.copy_(torch.from_numpy(vectors))

        objective = MaskedRNA(encoder, config.seed, flags.mask_ratio)
        if earlier:
            earlier.load_into(objective)
        stage.fit(objective, train, val, {"rna": shape}, like=cells)


if __name__ == "__main__":
    run_script(main)
