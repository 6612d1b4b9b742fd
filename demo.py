"""The living tutorial: every stage of scMomer on a small data set that it simulates, as a user would run them.

    make demo            or            python demo.py

1. simulates paired RNA + ATAC of five donors; the last donor is set aside, and comes back as RNA alone
2. pretrains the RNA and the ATAC encoder, joins them on paired cells, distils a student for cells without ATAC
3. fine-tunes cell types three times: with the student, without it, and with measured ATAC
4. labels the RNA-only donor, compares with logistic regression, and writes demo_output/
"""

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.lib.stages import ROOT, Stages
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError


@dataclass
class Flags:
    out_path: str = flag("folder for everything the demo writes; replaced when it is there", "demo_output")
    n_cells: int = flag("simulated cells, all donors", 2000)
    seed: int = flag("of the simulation and of the training", 0)
    precision: Literal["fp32", "bf16"] = flag("of training, prediction and evaluation", "fp32")


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)

    # Slow to import: --help and mistaken flags do not wait for them.
    from utils.cells.simulate import SimulationConfig, simulate
    from utils.files.write import write_whole

    out = Path(flags.out_path).resolve()
    if out.exists() and any(out.iterdir()) and not (out / ".scmomer_demo").exists():
        raise UserError(f"{out}: exists and was not made by the demo; choose another --out_path")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / ".scmomer_demo").touch()
    names = ("cells.h5mu", "cells.ready.h5mu", "new_donor.h5ad", "predictions.h5ad", "runs")
    shown = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out  # short enough to read and to type
    raw, ready, new, labelled, runs = (shlex.quote(str(shown / name)) for name in names)

    print(f"simulating {flags.n_cells:,} paired cells of 5 donors", flush=True)
    simulation = simulate(SimulationConfig(n_cells=flags.n_cells, seed=flags.seed))
    mdata = simulation.mdata
    write_whole(mdata, out / "cells.h5mu")
    last = sorted(mdata.obs["donor"].unique())[-1]
    rna = mdata.mod["rna"]
    new_donor = rna[rna.obs["donor"] == last].copy()
    truth = new_donor.obs["cell_type"].astype(str).to_numpy()
    new_donor.obs = new_donor.obs[[]]  # RNA alone, no labels: what a user has
    new_donor.write(out / "new_donor.h5ad")

    stages, precise = Stages(), f"--precision {flags.precision}"
    common = f"--ckpt_dir {runs} --preset tiny --seed {flags.seed} {precise}"
    stages.run(
        "preprocess",
        f"preprocess.py --data_path {raw} --out_path {ready} --split_by donor --test_groups {last} --target_sum 2000",
    )
    stages.run("pretrain RNA", f"pretrain_rna.py --data_path {ready} {common} --model_name rna")
    stages.run("pretrain ATAC", f"pretrain_atac.py --data_path {ready} {common} --model_name atac")
    stages.run(
        "join modalities",
        f"pretrain_multimodal.py --data_path {ready} {common} --model_name multimodal --rna_model_path {runs}/rna "
        f"--atac_model_path {runs}/atac",
    )
    stages.run(
        "teacher's latents",
        f"get_latent_emb.py --data_path {ready} --model_path {runs}/multimodal --ckpt_dir {runs}/latents {precise}",
    )
    stages.run(
        "distil student",
        f"pretrain_missing_mod.py --data_path {ready} {common} --model_name student --model_path {runs}/multimodal "
        f"--dir_train {runs}/latents --dir_val {runs}/latents",
    )
    ways = {
        "with student": ("student", "student"),
        "without student": ("multimodal", "zeros"),
        "paired": ("multimodal", "measured"),
    }
    for way, (parent, mode) in ways.items():
        stages.run(
            f"fine-tune {way}",
            f"train_missing_celltype_func.py --data_path {ready} {common} --model_name celltype_{mode} "
            f"--pretrained_model_path {runs}/{parent} --other_modality {mode}"
            f"{' --train_student' if mode == 'student' else ''}",
        )
    stages.run(
        "label the new donor",
        f"predict_cell_type.py --data_path {new} --model_path celltype_student --ckpt_dir {runs} --out_path {labelled} "
        f"{precise}",
    )
    for mode in ("student", "zeros", "measured"):
        stages.run(f"evaluate {mode}", f"evaluate.py --data_path {ready} --model_path {runs}/celltype_{mode} {precise}")
    stages.run("evaluate translation", f"evaluate.py --data_path {ready} --model_path {runs}/student {precise}")
    summarise(out, stages.used, truth, ways, flags)


def summarise(out: Path, stages: dict, truth, ways: dict, flags: Flags) -> None:
    """Collect what the stages wrote into summary.json, a table and figures."""
    import anndata as ad
    import pandas as pd

    from utils.evaluate.metrics import classification_scores
    from utils.evaluate.plots import bars, confusion, umap_true_predicted

    results = lambda name: json.loads((out / "runs" / name / "evaluation" / "evaluation_test.json").read_text())
    predictions = ad.read_h5ad(out / "predictions.h5ad")
    predicted = predictions.obs["predicted_cell_type"].astype(str).to_numpy()
    scored = {f"RNA only, {way}" if way != "paired" else "RNA + ATAC": mode for way, (_, mode) in ways.items()}
    cell_types = {name: results(f"celltype_{mode}")["scmomer"] for name, mode in scored.items()}
    for measured, mode in (("RNA only", "student"), ("RNA + ATAC", "measured")):
        for name in ("nearest neighbours", "logistic regression", "PCA + logistic regression"):
            cell_types[f"{measured}, {name}"] = results(f"celltype_{mode}")[name]
    translation = {name: row for name, row in results("student").items() if isinstance(row, dict)}
    summary = {
        "cells": {"simulated": flags.n_cells, "new_donor": len(truth)},
        "seed": flags.seed,
        "cell_types": cell_types,
        "labelled_file": classification_scores(truth, predicted),
        "translation_rna_to_atac": translation,
        "stages": stages,
        "total_seconds": round(sum(stage["seconds"] for stage in stages.values()), 1),
        "peak_memory_gb": max(stage["peak_memory_gb"] for stage in stages.values()),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    for name in ("rna", "atac", "multimodal", "student", "celltype_student"):
        shutil.copy(out / "runs" / name / "loss_curve.png", out / f"loss_{name}.png")
    umap_true_predicted(predictions.obsm["X_scmomer"], truth, predicted, out / "umap.png", seed=flags.seed)
    confusion(truth, predicted, out / "confusion.png")
    columns = ("accuracy", "macro_f1")
    bars(
        {name: {column: row[column] for column in columns} for name, row in cell_types.items()},
        out / "comparison.png",
        "Cell types of the donor set aside",
        {name: {column: row[f"{column}_95%"] for column in columns} for name, row in cell_types.items()},
    )
    print(f"\nCell types of the donor set aside ({len(truth):,} cells)")
    print(pd.DataFrame(cell_types).T[list(columns)].astype(float).round(3).to_string())
    print("\nRNA → ATAC on the same cells, AUROC (mean over peaks; mean over cells)")
    print(pd.DataFrame(translation).T[["peak_auroc", "cell_auroc"]].astype(float).round(3).to_string())
    print(f"\n{summary['total_seconds']:.0f} s, at most {summary['peak_memory_gb']:.2f} GB; look into {out}")


if __name__ == "__main__":
    run_script(main)
