"""Label new cells with a fine-tuned model folder.

    python predict_cell_type.py --data_path new_cells.h5ad --model_path celltype --ckpt_dir runs

Input: raw counts (.h5ad or .h5mu); genes are renamed, aligned and normalised as the model's own were. Output: the same
file, in the same order, with obs["predicted_cell_type"], obs["confidence"] (calibrated probability of that type) and
the multi-omics embedding in obsm["X_scmomer"].
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.cli import flag, parse_flags, run_script
from utils.data.query import read_query
from utils.data.read import write_whole
from utils.errors import UserError
from utils.train.checkpoint import load_model
from utils.train.distributed import distributed_run
from utils.train.infer import InferConfig, predict_types


@dataclass
class Flags:
    data_path: str = flag("cells to label: raw counts, .h5ad or .h5mu")
    model_path: str = flag("model folder: its name in --ckpt_dir, or a path")
    ckpt_dir: str = flag("folder that holds the model folder", ".")
    out_path: str | None = flag("file to write; by default <data>.predicted.<h5ad|h5mu> beside the input", None)
    min_gene_coverage: float = flag("least share of the model's genes that the file must have", 0.3)


def main() -> None:
    flags, config = parse_flags(__doc__, Flags, InferConfig)
    data = Path(flags.data_path)
    out_path = Path(flags.out_path or data.with_name(f"{data.stem}.predicted{data.suffix}"))
    if out_path.resolve() == data.resolve():
        raise UserError(f"--out_path {out_path}: is the input; name another file")
    inside = Path(flags.ckpt_dir) / flags.model_path
    saved = load_model(inside if inside.exists() else flags.model_path, "celltype")
    with distributed_run(config.device) as runtime:
        query = read_query(flags.data_path, saved, flags.min_gene_coverage)
        for line in query.report:
            runtime.say(line)
        prediction = predict_types(saved, query.dataset, config, runtime)
        if not runtime.is_main:
            return
        prediction.types[query.empty] = "unassigned"
        prediction.confidence[query.empty] = 0.0
        write_whole(query.annotate(prediction), out_path)
        names, counts = np.unique(prediction.types, return_counts=True)
        runtime.say(
            f"wrote {out_path}: {len(prediction.types):,} cells; "
            + ", ".join(f"{names[i]} {counts[i]:,}" for i in np.argsort(-counts))
        )


if __name__ == "__main__":
    run_script(main)
