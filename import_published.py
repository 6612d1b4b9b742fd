"""Make a model folder of a published checkpoint of scBERT or scMomer.

    python import_published.py --checkpoint panglao_pretrain.pth --gene_reference panglao.h5ad \\
        --ckpt_dir runs --model_name panglao
    python import_published.py --checkpoint finetuned.pth --gene_reference genes.txt --labels labels.txt \\
        --ckpt_dir runs --model_name zheng
    python import_published.py --checkpoint scmomer.pth --gene_reference genes.txt --peak_reference peaks.bed \\
        --ckpt_dir runs --model_name multimodal

What the file is follows from the names and shapes of its tensors: an encoder of stage I or scBERT's masked language
model, a classifier of scBERT, a joined model of stage II or III, or one with a classifier of cell types. Files do not
name their genes, peaks and classes, so their lists are given, in the order of the weights. The folder is used like one
that was trained here (docs/published.md).
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from utils.cli import check_name, check_numbers, flag, parse_flags, run_script
from utils.errors import UserError


@dataclass
class Flags:
    checkpoint: str = flag("the published file, .pth")
    ckpt_dir: str = flag("folder for model folders")
    model_name: str = flag("name of the model folder to write", aliases=("--model",))
    gene_reference: str | None = flag("genes of the model: a text, one per line, or an .h5ad, in their order", None)
    peak_reference: str | None = flag("peaks of the model: a .bed, a list, or an .h5mu, in their order", None)
    gene2vec: str | None = flag("the gene embedding, .npy, if the file lacks it, or to compare the two", None)
    labels: str | None = flag("cell types of a classifier: a text, one per line, or a .npy, in their order", None)
    atac_heads: int = flag("attention heads of the ATAC encoder, which the weights do not show", 8)
    overwrite: bool = flag("replace a model folder of the same name", False)


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    check_name(flags, "model_name")
    check_numbers(flags, "atac_heads", least=1)
    folder = Path(flags.ckpt_dir) / flags.model_name

    # Slow to import: --help and mistaken flags do not wait for them.
    import torch

    from utils.train.distributed import Runtime
    from utils.train.folders import is_there, write_folder
    from utils.train.lock import sole_writer
    from utils.train.published import import_published, read_published

    runtime = Runtime(torch.device("cpu"))
    if is_there(folder) and not flags.overwrite:
        raise UserError(f"{folder}: exists already; add --overwrite, or choose another --model_name")
    source = read_published(flags.checkpoint)
    lists = (flags.gene_reference, flags.peak_reference, flags.gene2vec, flags.labels)
    imported = import_published(source, *lists, flags.atac_heads, asdict(flags))
    with sole_writer(folder, runtime):
        write_folder(folder, imported.write)
    for line in imported.report:
        runtime.say(line)
    runtime.say(f"wrote {folder}")


if __name__ == "__main__":
    run_script(main)
