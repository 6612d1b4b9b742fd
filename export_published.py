"""Write a model folder as a checkpoint with the published names of scBERT or scMomer.

    python export_published.py --model_path runs/rna --out_path rna.pth

A folder that import_published.py made, unchanged, gives back the very tensors of its file. One that was trained here
has the names that a published model of its stage has, under the key model_state_dict. Its genes, peaks and classes are
in the folder (genes.txt, peaks.txt, config.json): a checkpoint does not hold them (docs/published.md).
"""

from dataclasses import dataclass

from utils.cli import flag, parse_flags, run_script


@dataclass
class Flags:
    model_path: str = flag("model folder of stage I, II or III, or of a classifier")
    out_path: str = flag("file to write, .pth")


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)

    # Slow to import: --help and mistaken flags do not wait for them.
    import torch

    from utils.files.checkpoint import write_checkpoint
    from utils.files.write import check_target
    from utils.train.export_published import export_published

    check_target(flags.out_path, ".pth", [])
    tensors, notes = export_published(flags.model_path)
    write_checkpoint(tensors, flags.out_path)
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {flags.out_path}: {len(tensors):,} tensors, {sum(map(torch.numel, tensors.values())):,} numbers")


if __name__ == "__main__":
    run_script(main)
