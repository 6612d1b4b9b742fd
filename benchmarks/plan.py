"""Estimate how long pretraining will take on this machine, and how much memory.

    python -m benchmarks.plan --cells 1e6 --genes 16906 --peaks 1154464 --device auto
    python -m benchmarks.plan --cells 50000 --genes 2000 --peaks 100000 --dim 64 --depth 2 --heads 2 --dim_head 32

Measures a few training steps (forward and backward pass) on simulated cells of that size. The RNA encoder has its
published shape, or the one given by flags. For each setting, prints the largest minibatch that fits into 80 % of the
free memory, the fastest minibatch measured, its memory, and the time of an epoch. The training scripts make the same
measurement on their own cells with --batch_size auto.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.lib.bench import machine, random_cells
from models.atac_encoder import ATACEncoder, ATACEncoderConfig
from models.objectives import MaskedATAC, MaskedRNA, Objective
from models.rna_encoder import RNAEncoder, RNAEncoderConfig
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError
from utils.progress import duration
from utils.train.batch_size import SHARE, Step, free_memory, largest_fit, measure_steps
from utils.train.distributed import choose_device


@dataclass
class Flags:
    cells: float = flag("training cells", 1e6)
    genes: int = flag("genes in the vocabulary; 0 leaves RNA out", 16_906)
    peaks: int = flag("peaks in the vocabulary; 0 leaves ATAC out", 1_154_464)
    expressed: int = flag("expressed genes per cell", 2_000)
    open_peaks: int = flag("open peaks per cell", 10_000)
    epochs: int = flag("epochs of training", 20)
    most: int = flag("largest minibatch to try", 32)
    device: str = flag("auto, cpu, cuda or mps; auto uses a GPU if there is one", "auto")


def rna(shape: RNAEncoderConfig, flags: Flags, tokens: str) -> tuple[Objective, partial]:
    torch.manual_seed(0)
    encoder = RNAEncoder(replace(shape, tokens=tokens), flags.genes)
    return MaskedRNA(encoder, seed=0), partial(random_cells, "rna", flags.genes, min(flags.expressed, flags.genes))


def atac(flags: Flags) -> tuple[Objective, partial]:
    torch.manual_seed(0)
    encoder = ATACEncoder(ATACEncoderConfig(), flags.peaks)
    return MaskedATAC(encoder), partial(random_cells, "atac", flags.peaks, min(flags.open_peaks, flags.peaks))


def row(name: str, steps: list[Step], memory: float, flags: Flags, processes: int = 1) -> str:
    """Return one line of the table; several processes are assumed to share the work without loss."""
    if not [step for step in steps if step.peak <= memory]:
        return f"| {name} | none | | | | | |"
    best = min((step for step in steps if step.peak <= memory), key=lambda step: step.seconds_per_cell)
    per_cell = best.seconds_per_cell / processes
    epoch = flags.cells * per_cell
    # A few small cells hardly change the memory; a straight line through them must not be extrapolated too far.
    largest = min(largest_fit(steps, memory), 64 * steps[-1].cells)
    more = "more than " if largest == 64 * steps[-1].cells else ""
    return (
        f"| {name} | {more}{largest:,} | {best.cells} | {1 / per_cell:,.3g} | {best.peak / 1e9:.2f} GB | "
        f"{duration(epoch)} | {duration(epoch * flags.epochs)} |"
    )


def main() -> None:
    flags, shape = parse_flags(__doc__, Flags, RNAEncoderConfig)
    if flags.cells < 1 or max(flags.genes, flags.peaks) < 1:
        raise UserError("--cells must be at least 1, and --genes or --peaks, too")
    device = choose_device(flags.device)
    memory = SHARE * free_memory(device)
    ways = []
    if flags.genes:
        ways += [
            (f"RNA, {tokens}, {precision}", partial(rna, shape, flags, tokens), precision, False)
            for tokens in ("all", "expressed")
            for precision in ("fp32", "bf16")
        ]
    if flags.peaks:
        ways += [(f"ATAC, {precision}", partial(atac, flags), precision, False) for precision in ("fp32", "bf16")]
    threads = torch.get_num_threads()
    if device.type == "cpu" and threads > 1:
        if flags.genes:
            ways += [("RNA, expressed, fp32", partial(rna, shape, flags, "expressed"), "fp32", True)]
        if flags.peaks:
            ways += [("ATAC, fp32", partial(atac, flags), "fp32", True)]

    print(f"{machine()}; {memory / 1e9:.1f} GB of memory to use")
    print(
        f"{flags.cells:,.0f} cells, {flags.epochs} epochs; RNA: {shape.dim} wide, {shape.depth} blocks of "
        f"{shape.heads} heads of {shape.dim_head}; ATAC at its published shape\n"
    )
    print("| stage I | largest minibatch | fastest | cells/s | its memory | epoch | training |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, make, precision, is_shared in ways:
        processes = threads if is_shared else 1
        torch.set_num_threads(threads // processes)
        objective, make_batch = make()
        sizes = [2**i for i in range(flags.most.bit_length())]
        steps = measure_steps(objective.to(device), make_batch, sizes, device, precision, memory / processes)
        name += f", {processes} processes of one thread" if is_shared else ""
        print(row(name, steps, memory / processes, flags, processes), flush=True)
        del objective
    if device.type == "cuda":
        print(
            f"\n{torch.cuda.device_count()} GPUs here: N processes take 1/N of the time, plus the exchange of "
            "gradients."
        )
    else:
        print("\nThe rows with several processes do not include the exchange of gradients.")


if __name__ == "__main__":
    run_script(main)
