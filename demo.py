"""The demo: every stage of scMomer on a small data set, as a user would run them.

    make demo            or            python demo.py

It shows the case this model is made for: one donor was measured by RNA alone, and few cells have a label.

1. Simulate paired RNA + ATAC of five donors. Set the last donor aside; it comes back as RNA alone, without labels.
2. Pretrain the RNA and the ATAC encoder, join them on paired cells, and train a student for cells without ATAC.
3. Keep 30 labelled cells of each type, hide the other labels, and train cell types: with the student, without it, and
   with measured ATAC.
4. Label the RNA-only donor, compare with simpler methods on the same cells, and write one page: report.html.
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

LABELS = 30
"""Labelled training cells of each type; the labels of all other training cells are hidden."""
FEW_LABELS = f"--labels_per_type {LABELS} --epochs 30 --cycle_epochs 29 --val_every 30 --pretrained_lr_scale 0.3"
"""The labelled cells are few, so training sees each often, and changes the pretrained part slowly (docs/demo.md)."""
FINAL = "RNA only, with student"
WAYS = {  # row of the table → (model to start from, what takes the place of ATAC)
    FINAL: ("student", "student"),
    "RNA only, without student": ("multimodal", "zeros"),
    "RNA + ATAC": ("multimodal", "measured"),
}
COLUMNS = {"accuracy": "accuracy", "macro_f1": "macro-F1"}


@dataclass
class Flags:
    out_path: str = flag("folder for everything the demo writes; an earlier demo there is replaced", "demo_output")
    n_cells: int = flag("number of simulated cells over all donors", 2000)
    seed: int = flag("random seed of the simulation and the training", 0)
    precision: Literal["fp32", "bf16"] = flag("floating-point precision of training, prediction and evaluation", "fp32")


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    out = Path(flags.out_path).resolve()
    if out.exists() and any(out.iterdir()) and not (out / ".scmomer_demo").exists():
        raise UserError(f"{out}: exists and was not made by the demo; choose another --out_path")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / ".scmomer_demo").touch()

    last, truth = simulate_donors(out, flags)
    stages = Stages()
    train(stages, out, last, flags)
    evaluate(stages, out, flags)
    summary = summarise(out, stages.used, truth, flags)
    draw(out, truth, summary)
    write_page(out, last, summary)
    print_tables(out, summary)


def simulate_donors(out: Path, flags: Flags) -> tuple:
    """Write cells.h5mu and new_donor.h5ad; return the last donor's name and its cells' true types [cells]."""
    # Slow to import: --help and mistaken flags do not wait for it.
    from utils.cells.simulate import SimulationConfig, simulate
    from utils.files.write import write_whole

    print(f"simulating {flags.n_cells:,} paired cells of 5 donors", flush=True)
    mdata = simulate(SimulationConfig(n_cells=flags.n_cells, seed=flags.seed)).mdata
    write_whole(mdata, out / "cells.h5mu")
    last = sorted(mdata.obs["donor"].unique())[-1]
    rna = mdata.mod["rna"]
    new_donor = rna[rna.obs["donor"] == last].copy()
    truth = new_donor.obs["cell_type"].astype(str).to_numpy()
    new_donor.obs = new_donor.obs[[]]  # RNA alone, no labels: what a user has
    new_donor.write(out / "new_donor.h5ad")
    return last, truth


def shown(out: Path, name: str) -> str:
    """A file in the output folder as commands name it: relative to the repository where possible, and quoted."""
    path = out / name
    return shlex.quote(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path))


def train(stages: Stages, out: Path, last: str, flags: Flags) -> None:
    """Run the scripts from raw cells to the labelled donor."""
    names = ("cells.h5mu", "cells.ready.h5mu", "new_donor.h5ad", "predictions.h5ad", "runs")
    raw, ready, new, labelled, runs = (shown(out, name) for name in names)
    precise = f"--precision {flags.precision}"
    common = f"--data_path {ready} --ckpt_dir {runs} --preset tiny --seed {flags.seed} {precise}"
    stages.run(
        "preprocess",
        f"preprocess.py --data_path {raw} --out_path {ready} --split_by donor --test_groups {last} --target_sum 2000",
    )
    stages.run("pretrain RNA", f"pretrain_rna.py {common} --model_name rna")
    stages.run("pretrain ATAC", f"pretrain_atac.py {common} --model_name atac")
    stages.run(
        "join modalities",
        f"pretrain_multimodal.py {common} --model_name multimodal --rna_model_path {runs}/rna "
        f"--atac_model_path {runs}/atac",
    )
    stages.run(
        "teacher's latents",
        f"get_latent_emb.py --data_path {ready} --model_path {runs}/multimodal --ckpt_dir {runs}/latents {precise}",
    )
    stages.run(
        "train student",
        f"pretrain_missing_mod.py {common} --model_name student --model_path {runs}/multimodal "
        f"--dir_train {runs}/latents --dir_val {runs}/latents",
    )
    for parent, mode in WAYS.values():
        stages.run(
            f"cell types, {mode}",
            f"train_missing_celltype_func.py {common} --model_name celltype_{mode} "
            f"--pretrained_model_path {runs}/{parent} --other_modality {mode}"
            f"{' --train_student' if mode == 'student' else ''} {FEW_LABELS}",
        )
    stages.run(
        "label the new donor",
        f"predict_cell_type.py --data_path {new} --model_path celltype_student --ckpt_dir {runs} --out_path {labelled} "
        f"{precise}",
    )


def evaluate(stages: Stages, out: Path, flags: Flags) -> None:
    """Score every model on the donor set aside; the baselines once for each set of modalities."""
    ready, runs = shown(out, "cells.ready.h5mu"), shown(out, "runs")
    models = {"student": " --quick", "zeros": " --model_alone", "measured": " --quick"}
    for name, alone in models.items():
        stages.run(
            f"evaluate {name}",
            f"evaluate.py --data_path {ready} --model_path {runs}/celltype_{name} --precision {flags.precision}{alone}",
        )
    stages.run(
        "evaluate translation",
        f"evaluate.py --data_path {ready} --model_path {runs}/student --precision {flags.precision}",
    )


def summarise(out: Path, stages: dict, truth, flags: Flags) -> dict:
    """Collect what the stages wrote, write summary.json, and return it."""
    import anndata as ad

    from utils.evaluate.metrics import classification_scores

    def methods(name: str) -> dict[str, dict]:
        """The scores of the model and of each baseline, by name."""
        scores = json.loads((out / "runs" / name / "evaluation" / "evaluation_test.json").read_text())
        return {method: row for method, row in scores.items() if isinstance(row, dict) and method != "embeddings"}

    cell_types = {way: methods(f"celltype_{mode}")["scmomer"] for way, (_, mode) in WAYS.items()}
    for measured, model in (("RNA only", "celltype_student"), ("RNA + ATAC", "celltype_measured")):
        baselines = {method: row for method, row in methods(model).items() if method != "scmomer"}
        cell_types |= {f"{measured}, {method}": row for method, row in baselines.items()}
    predicted = ad.read_h5ad(out / "predictions.h5ad").obs["predicted_cell_type"].astype(str).to_numpy()
    summary = {
        "cells": {"simulated": flags.n_cells, "new_donor": len(truth), "labels_per_type": LABELS},
        "seed": flags.seed,
        "cell_types": cell_types,
        "labelled_file": classification_scores(truth, predicted),
        "translation_rna_to_atac": methods("student"),
        "stages": stages,
        "total_seconds": round(sum(stage["seconds"] for stage in stages.values()), 1),
        "peak_memory_gb": max(stage["peak_memory_gb"] for stage in stages.values()),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def draw(out: Path, truth, summary: dict) -> None:
    """Draw the figures."""
    import anndata as ad

    from utils.evaluate.plots import bars, confusion, umap_true_predicted

    for name in ("rna", "atac", "multimodal", "student", "celltype_student"):
        shutil.copy(out / "runs" / name / "loss_curve.png", out / f"loss_{name}.png")
    predictions = ad.read_h5ad(out / "predictions.h5ad")
    predicted = predictions.obs["predicted_cell_type"].astype(str).to_numpy()
    umap_true_predicted(predictions.obsm["X_scmomer"], truth, predicted, out / "umap.png", seed=summary["seed"])
    confusion(truth, predicted, out / "confusion.png")
    # RNA alone, the case in question; the majority class would only press the other bars together.
    rows = {
        name.removeprefix("RNA only, "): row
        for name, row in summary["cell_types"].items()
        if name.startswith("RNA only") and not name.endswith("majority class")
    }
    bars(
        {name: {score: row[score] for score in COLUMNS} for name, row in rows.items()},
        out / "comparison.png",
        f"Cell types of the RNA-only donor, learned from {LABELS} labelled cells of each type",
        {name: {score: row[f"{score}_95%"] for score in COLUMNS} for name, row in rows.items()},
    )


def type_rows(summary: dict) -> dict[str, dict]:
    """Method → accuracy and macro-F1 with their 95 % intervals."""
    return {
        name: {
            column: f"{row[score]:.3f} ({row[f'{score}_95%'][0]:.3f}–{row[f'{score}_95%'][1]:.3f})"
            for score, column in COLUMNS.items()
        }
        for name, row in summary["cell_types"].items()
    }


def translation_rows(summary: dict) -> dict[str, dict]:
    """Method → AUROC of the ATAC predicted from RNA: mean over peaks, and over cells."""
    columns = {"peak_auroc": "AUROC per peak", "cell_auroc": "AUROC per cell"}
    translation = summary["translation_rna_to_atac"]
    return {name: {column: row[score] for score, column in columns.items()} for name, row in translation.items()}


def write_page(out: Path, last: str, summary: dict) -> None:
    """Write report.html."""
    import pandas as pd

    from utils.evaluate.report_page import commands, figure, grid, paragraph, table, write_report

    n = summary["cells"]
    per_type = pd.read_csv(out / "runs" / "celltype_student" / "evaluation" / "per_type_test.csv", index_col=0)
    lead = (
        f"{n['simulated']:,} cells of five donors were simulated. Donor {last} ({n['new_donor']:,} cells) was set "
        f"aside and came back as RNA alone. The model learned from the other donors: RNA and ATAC of every cell, but "
        f"only {LABELS} labelled cells of each type. Simulated cells show how the stages work, not how well they do on "
        "real ones."
    )
    sections = {
        "The RNA-only donor, labelled": [
            paragraph(
                f"{summary['labelled_file']['accuracy']:.1%} of the donor's cells got their true type. The map is "
                "drawn from the model's cell embedding (obsm['X_scmomer'] of predictions.h5ad)."
            ),
            figure(out / "umap.png", "Each dot is a cell. Left: its true type. Right: the type the model predicts."),
            figure(out / "confusion.png", "A row shows where the cells of one true type went."),
            table(per_type.to_dict("index"), "cell type"),
        ],
        "Compared with simpler methods": [
            paragraph(
                f"All methods learned from the same {LABELS} labelled cells of each type and are scored on the same "
                "cells. Rows without a method's name are scMomer; the marked one labelled the donor. Principal "
                "components, the denoiser and self-trained methods use the unlabelled cells, too. “RNA + ATAC” rows "
                "read the donor's measured ATAC, which a donor with RNA alone does not have. 95 % intervals are in "
                "brackets."
            ),
            figure(out / "comparison.png", "Methods that read RNA alone; lines are 95 % intervals over cells."),
            table(type_rows(summary), "method", marked=(FINAL,)),
        ],
        "The missing ATAC, predicted from RNA": [
            paragraph(
                "How well a method ranks open peaks above closed ones: over the cells for each peak, and over the "
                "peaks for each cell. 0.5 is chance."
            ),
            table(translation_rows(summary), "method", marked=("scmomer",)),
        ],
        "How the training went": [
            grid(
                [
                    figure(out / f"loss_{name}.png", caption)
                    for name, caption in {
                        "rna": "RNA encoder",
                        "atac": "ATAC encoder",
                        "multimodal": "Both encoders joined",
                        "student": "Student",
                        "celltype_student": "Cell types",
                    }.items()
                ]
            )
        ],
        "The commands": [
            paragraph(
                f"{summary['total_seconds']:.0f} seconds in all, at most {summary['peak_memory_gb']:.2f} GB of memory. "
                "Each command runs from the repository's folder; add --overwrite to train a model again."
            ),
            commands(summary["stages"]),
        ],
    }
    write_report(out / "report.html", "scMomer: the demo", lead, sections)


def print_tables(out: Path, summary: dict) -> None:
    """Print the two tables and where to look."""
    import pandas as pd

    n = summary["cells"]
    print(f"\nCell types of the RNA-only donor ({n['new_donor']:,} cells; {LABELS} labelled cells of each type)")
    print(pd.DataFrame(type_rows(summary)).T.to_string())
    print("\nATAC predicted from RNA, on the same cells (AUROC)")
    print(pd.DataFrame(translation_rows(summary)).T.astype(float).round(3).to_string())
    print(f"\n{summary['total_seconds']:.0f} s, at most {summary['peak_memory_gb']:.2f} GB; open {out / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
