"""The whole sequence on SNARE-seq2 mouse cortex: paired training cells, RNA alone at test time.

    python benchmarks/snareseq2.py --data_path snareseq2_mop.h5mu --out_path runs/snareseq2

8,622 cells, 1,677 genes, 25,734 peaks, ten batches; two of them are test cells (09J and 09K in fold 0). Trains all
stages at a size for two CPU cores, fine-tunes with the student, without it and with measured ATAC, and writes
results.json and results.md, the table of benchmarks/SNARESEQ2.md, into --out_path (an earlier run there is replaced).
Without the data file it says so.
"""

import json
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError
from utils.report.stages import Stages

RNA_SHAPE = "--tokens expressed --dim 128 --depth 3 --heads 4 --dim_head 32"
ATAC_SHAPE = "--dim 96 --depth 3 --heads 4 --dim_head 24"
FINE_TUNE = (
    "--epochs 5 --cycle_epochs 4 --batch_size 16 --grad_acc 2 --learning_rate 5e-4 --trainable_blocks -1 "
    "--class_balance 0.3"
)
FOLDS = ("09J,09K", "09H,09I", "09F,09G")  # the test batches; the other four are in no fold's
WAYS = {
    "student": ("RNA only, student for ATAC", "student"),
    "zeros": ("RNA only, no student", "multimodal"),
    "measured": ("RNA + measured ATAC", "multimodal"),
}


@dataclass
class Flags:
    data_path: str = flag("snareseq2_mop.h5mu, raw counts", "../shared/data/snareseq2_mop.h5mu")
    out_path: str = flag("folder for the runs and the table", "runs/snareseq2")
    fold: int = flag("which two batches are test cells: 0 09J and 09K, 1 09H and 09I, 2 09F and 09G", 0)
    seed: int = flag("of the split's validation cells and of all training", 0)


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    if not 0 <= flags.fold < len(FOLDS):
        raise UserError(f"--fold {flags.fold} is none of 0 … {len(FOLDS) - 1}")
    if not Path(flags.data_path).is_file():
        print(f"skipped: {flags.data_path} is not there; give --data_path")
        return
    out = Path(flags.out_path).resolve()
    data, ready, runs = (shlex.quote(str(p)) for p in (Path(flags.data_path).resolve(), out / "ready.h5mu", out))
    common = f"--data_path {ready} --ckpt_dir {runs} --seed {flags.seed} --overwrite --warmup_epochs 1"
    stages = Stages()
    stages.run(
        "preprocess",
        f"preprocess.py --data_path {data} --out_path {ready} --split_by batch --test_groups {FOLDS[flags.fold]} "
        f"--target_sum 1000 --seed {flags.seed}",
    )
    for name, command in training_commands(common, ready, runs).items():
        stages.run(name, command)
    for way, (_, parent) in WAYS.items():
        stages.run(
            f"fine-tune, {way}",
            f"train_missing_celltype_func.py {common} --model celltype_{way} --pretrained_model_path {runs}/{parent} "
            f"--other_modality {way} {FINE_TUNE}",
        )
    for model in (*(f"celltype_{way}" for way in WAYS), "student"):
        stages.run(f"evaluate {model}", f"evaluate.py --data_path {ready} --model_path {runs}/{model}")
    report(out, stages.used, flags.fold, flags.seed)


def training_commands(common: str, ready: str, runs: str) -> dict[str, str]:
    """Stage → command, from stage I to the student."""
    return {
        "pretrain RNA": f"pretrain_rna.py {common} --model_name rna {RNA_SHAPE} --mask_ratio 0.3 "
        "--epochs 5 --cycle_epochs 4 --batch_size 16 --grad_acc 2 --learning_rate 5e-4",
        "pretrain ATAC": f"pretrain_atac.py {common} --model_name atac {ATAC_SHAPE} "
        "--epochs 6 --cycle_epochs 5 --batch_size 32 --learning_rate 1e-3",
        "join": f"pretrain_multimodal.py {common} --model_name multimodal --rna_model_path {runs}/rna "
        f"--atac_model_path {runs}/atac --epochs 5 --cycle_epochs 4 --batch_size 16 --grad_acc 2 --learning_rate 1e-3",
        "latents": f"get_latent_emb.py --data_path {ready} --model_path {runs}/multimodal --ckpt_dir {runs}/latents",
        "student": f"pretrain_missing_mod.py {common} --model_name student --model_path {runs}/multimodal "
        f"--dir_train {runs}/latents --dir_val {runs}/latents --epochs 15 --cycle_epochs 14 --batch_size 32 "
        "--learning_rate 1e-3",
    }


def report(out: Path, stages: dict, fold: int, seed: int) -> None:
    """Write results.json and results.md."""
    load = lambda model: json.loads((out / model / "evaluation" / "evaluation_test.json").read_text())
    types = {title: load(f"celltype_{way}")["scmomer"] for way, (title, _) in WAYS.items()}
    for name in ("nearest neighbours", "logistic regression", "PCA + logistic regression"):
        types[f"RNA only, {name}"] = load("celltype_student")[name]
        types[f"RNA + measured ATAC, {name}"] = load("celltype_measured")[name]
    translation = {name: row for name, row in load("student").items() if isinstance(row, dict)}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, torch {torch.__version__}, CPU"
    total = sum(stage["seconds"] for stage in stages.values())
    told = {"fold": fold, "seed": seed, "machine": machine}
    told |= {"cell_types": types, "translation": translation, "stages": stages}
    (out / "results.json").write_text(json.dumps(told, indent=1))

    def scored(row: dict, name: str) -> str:
        low, high = row[f"{name}_95%"]
        return f"{row[name]:.3f} ({low:.3f}–{high:.3f})"

    lines = ["| cell types of the test batches | accuracy (95 %) | macro-F1 (95 %) |", "|---|---|---|"]
    lines += [f"| {name} | {scored(row, 'accuracy')} | {scored(row, 'macro_f1')} |" for name, row in types.items()]
    lines += ["", "| RNA → ATAC | AUROC per peak | AUROC per cell |", "|---|---|---|"]
    lines += [f"| {name} | {row['peak_auroc']:.3f} | {row['cell_auroc']:.3f} |" for name, row in translation.items()]
    lines += ["", "| stage | seconds | peak memory (GB) |", "|---|---|---|"]
    lines += [f"| {name} | {used['seconds']:.0f} | {used['peak_memory_gb']:.2f} |" for name, used in stages.items()]
    lines += [f"| all | {total:.0f} | |", "", f"Fold {fold}, seed {seed}; {machine}."]
    (out / "results.md").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    run_script(main)
