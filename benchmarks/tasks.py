"""Run all tasks of the paper on real data, from models that are trained on the same data, and write docs/tasks.md.

    python -m benchmarks.tasks --data_path ../shared/data
    python -m benchmarks.tasks --data_path ../shared/data --only drug_response,perturbation
    python -m benchmarks.tasks --data_path ../shared/data --quick --results_path runs/quick_results

STEPS lists each command with its settings. A step that is recorded in <out_path>/stages.json with the same command does
not run again. One that fails does not stop the others; it is reported at the end, and the exit code is then 1. Output:
<results_path>/<step>.json and .png for each task, tasks.csv, and the table of docs/tasks.md. --quick trains every model
for one epoch and leaves the page as it is: it shows that all commands run, and its numbers mean nothing.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.bench import when_and_where
from benchmarks.lib.stages import ROOT, Stages, from_root
from benchmarks.lib.tasks import Goal, collect, rows_of, write_table
from utils.cli import check_numbers, flag, parse_flags, run_script
from utils.errors import UserError

PAGE = ROOT / "docs" / "tasks.md"
TRAINING = ("pretrain_", "downstream.perturbation", "downstream.drug_response")
"""Scripts with these in their name train a model, and have --seed and --epochs."""
SEEDED = (*TRAINING, "preprocess.py", "downstream.gene_property", "downstream.gene_pairs")


@dataclass(frozen=True)
class Step:
    """One command, and what is shown of its results.

    Attributes
    ----------
    name : unique; a task writes into the folder of this name
    group : what --only chooses; `models` are those that tasks need
    command : script or module and its flags; {d} is the data, {o} the folder of models and results
    needs : groups of models without which it cannot run
    result : name of the JSON that it writes, without .json; empty if it writes none
    title, split, page : of its rows in the table
    goals : what it should reach
    folder : where the JSON lies below {o}, if not in `name`
    """

    name: str
    group: str
    command: str
    needs: tuple[str, ...] = ()
    result: str = ""
    title: str = ""
    split: str = ""
    page: str = ""
    goals: tuple[Goal, ...] = ()
    folder: str = ""


SMALL = "--preset small --overwrite"
HUMAN = ",".join(
    f"{{d}}/{name}.h5ad"
    for name in ("immune_rna", "scrna/pbmc_3tech", "multiome/bmmc/v1_rna", "multiome/a549_scicar/rna")
)
PAIRED = f"--data_path {{o}}/cortex.h5mu --ckpt_dir {{o}} {SMALL}"
EMBEDDING = "--embedding_path {o}/genes.h5ad"
DRUG = (
    "-m downstream.drug_response --model_path {o}/rna_lines --ic50_path {d}/drug/GDSC_IC50.csv.gz "
    "--expression_path {d}/drug/ccle_expression_525celllines_697genes.csv.gz "
    "--drug_list_path {d}/drug/gdsc_drug_list_2019-06-24.csv --smiles_path {d}/drug/223drugs_pubchem_smiles.txt "
    "--annotation_path {d}/drug/Cell_lines_annotations_20181226.txt --overwrite"
)
CHANGE = (
    "-m downstream.perturbation --data_path {d}/perturb/norman19_mcfaline23_subset_counts.h5ad "
    f"--model_path {{o}}/rna {EMBEDDING} --min_gene_coverage 0.01 --overwrite"
)


def drug(split: str, words: str, *goals: Goal) -> Step:
    name = f"drug_response_{split}"
    command = f"{DRUG} --split {split} --out_path {{o}}/{name}"
    texts = "drug_response", "drug response", words, "drug_response.md"
    return Step(name, "drug_response", command, ("lines",), *texts, goals)


def perturbation(split: str, words: str, *goals: Goal) -> Step:
    name = f"perturbation_{split}"
    command = f"{CHANGE} --split {split} --out_path {{o}}/{name}"
    return Step(
        *(name, "perturbation", command, ("human",), "perturbation", "perturbation", words, "perturbation.md"), goals
    )


def translation(name: str, words: str, *goals: Goal) -> Step:
    command = f"evaluate.py --data_path {{o}}/cortex.h5mu --model_path {{o}}/{name}"
    where = f"{name}/evaluation"
    return Step(
        *(f"translate_{name}", "translate", command, ("cortex",), "evaluation_test", "translation", words),
        *("translate.md", goals, where),
    )


STEPS = (
    # What takes longest comes first: if a later command changes, it does not run again.
    # Paired cells of mouse cortex: translation in both directions
    Step(
        "cortex cells",
        "cortex",
        "preprocess.py --data_path {d}/snareseq2_mop.h5mu --out_path {o}/cortex.h5mu --split_by batch "
        "--test_groups 09J,09K --target_sum 1000",
    ),
    Step("cortex RNA", "cortex", f"pretrain_rna.py {PAIRED} --model_name cortex_rna --epochs 3 --cycle_epochs 2"),
    Step("cortex ATAC", "cortex", f"pretrain_atac.py {PAIRED} --model_name cortex_atac"),
    Step(
        "cortex RNA and ATAC",
        "cortex",
        f"pretrain_multimodal.py {PAIRED} --model_name cortex --rna_model_path {{o}}/cortex_rna "
        "--atac_model_path {o}/cortex_atac --epochs 4 --cycle_epochs 3",
    ),
    Step(
        "cortex latents",
        "cortex",
        "get_latent_emb.py --data_path {o}/cortex.h5mu --model_path {o}/cortex --ckpt_dir {o}/latents",
    ),
    *(
        Step(
            f"student of {missing}",
            "cortex",
            f"pretrain_missing_mod.py {PAIRED} --model_name {name} --model_path {{o}}/cortex --dir_train {{o}}/latents "
            f"--dir_val {{o}}/latents --missing {missing} --epochs 10 --cycle_epochs 9",
        )
        for missing, name in (("atac", "rna_to_atac"), ("rna", "atac_to_rna"))
    ),
    translation(
        *("rna_to_atac", "RNA → ATAC, two unseen batches"),
        Goal("peak_auroc", "above ridge and type mean × depth"),
        Goal("peak_auroc_within_depth", ""),
        Goal("pseudobulk_rmse", "at most ridge's", level=True),
        Goal("pseudobulk_correlation", ""),
        Goal("calibration_error", ""),
    ),
    translation(
        *("atac_to_rna", "ATAC → RNA, two unseen batches"),
        Goal("rna_mse", ""),
        Goal("pseudobulk_rmse", ""),
    ),
    *(
        Step(
            f"translate {words}, means of types",
            "translate",
            f"-m downstream.translate --data_path {{o}}/cortex.h5mu --model_path {{o}}/{name}"
            f"{' --ready_path {o}/cortex.h5mu' if name == 'rna_to_atac' else ''} --format types "
            f"--out_path {{o}}/{name}.h5ad",
            ("cortex",),
        )
        for name, words in (("rna_to_atac", "RNA"), ("atac_to_rna", "ATAC"))
    ),
    # Cell lines: the encoder reads their bulk expression
    Step(
        "cell lines",
        "lines",
        "preprocess.py --data_path {d}/drug/ccle_expression_525celllines_697genes.csv.gz --out_path {o}/lines.h5ad "
        "--values log2",
    ),
    Step(
        "RNA of cell lines",
        "lines",
        f"pretrain_rna.py --data_path {{o}}/lines.h5ad --ckpt_dir {{o}} --model_name rna_lines {SMALL} --epochs 20 "
        "--cycle_epochs 19",
    ),
    drug(
        *("lines", "unseen lines"),
        Goal("per_drug_pearson", "at least ridge and random forest on the same expression", level=True),
    ),
    drug("drugs", "unseen drugs", Goal("per_drug_pearson", "above the line's mean")),
    drug("both", "both unseen", Goal("per_drug_pearson", "")),
    drug("pairs", "random pairs", Goal("pearson", "level with drug + line + rank-10 factors", level=True)),
    # Human cells of four studies in one vocabulary: embeddings of genes
    Step("human cells", "human", f"preprocess.py --data_path {HUMAN} --out_path {{o}}/human.h5ad --batch_column file"),
    Step(
        "human RNA",
        "human",
        f"pretrain_rna.py --data_path {{o}}/human.h5ad --ckpt_dir {{o}} --model_name rna {SMALL} --gene_embedding "
        "coexpression --batch_size 8 --epochs 6 --cycle_epochs 5",
    ),
    Step(
        "gene embeddings",
        "human",
        "get_latent_emb.py --what genes --data_path {o}/human.h5ad --model_path {o}/rna --out_path {o}/genes.h5ad",
    ),
    Step(
        "gene_property_dosage",
        "gene_property",
        f"-m downstream.gene_property --lists {{d}}/gene_class/dosage_sens_tf_labels.csv {EMBEDDING} "
        "--data_path {o}/human.h5ad --out_path {o}/gene_property_dosage",
        *(("human",), "gene_property", "gene property", "dosage-sensitive TFs", "gene_property.md"),
        (Goal("auroc, logistic regression", "above all"), Goal("auroc, random forest", "above all")),
    ),
    Step(
        "gene_pairs_ggi",
        "gene_pairs",
        f"-m downstream.gene_pairs {EMBEDDING} --cells_path {{o}}/human.h5ad --train_path {{d}}/ggi/train_text.txt.gz "
        "--valid_path {d}/ggi/valid_text.txt --test_path {d}/ggi/test_text.txt --out_path {o}/gene_pairs_ggi",
        *(("human",), "gene_pairs", "gene–gene interaction", "published, no shared gene", "gene_pairs.md"),
        (Goal("auroc", "above detection + mean and SVD"),),
    ),
    Step(
        "gene_pairs_ppi",
        "gene_pairs",
        f"-m downstream.gene_pairs {EMBEDDING} --cells_path {{o}}/human.h5ad --pairs_path {{d}}/ppi/HuRI.tsv.gz "
        "--out_path {o}/gene_pairs_ppi",
        *(("human",), "gene_pairs", "protein–protein interaction", "HuRI, disjoint genes, degree-matched"),
        *("gene_pairs.md", (Goal("auroc", "above all"),)),
    ),
    # Perturbed cells: the encoder is that of the human cells, none of which is a perturbed one
    perturbation(
        *("singles", "unseen singles"),
        Goal("pearson", "above the training mean", against="mean of training conditions"),
        Goal("pearson", ""),
    ),
    perturbation(
        *("doubles", "unseen doubles"),
        Goal("pearson, both of the singles seen", "level with the sum of the singles", level=True),
        Goal("pearson", ""),
    ),
    perturbation("lines", "another cell line", Goal("pearson", "")),
)
TASKS = tuple(dict.fromkeys(step.group for step in STEPS if step.result))


@dataclass
class Flags:
    data_path: str = flag("folder with the data sets", "../shared/data")
    results_path: str = flag("folder for the results", "benchmarks/results/tasks")
    out_path: str = flag("folder for the models; by default runs/tasks", "runs/tasks")
    only: str | None = flag(f"tasks to run, separated by commas, of {', '.join(TASKS)}; by default all", None)
    seed: int = flag("random seed of all steps", 0)
    quick: bool = flag("one epoch of training each, to see that all commands run", False)

    def __post_init__(self):
        check_numbers(self, "seed", below=2**20)
        if unknown := [name for name in (self.only or "").split(",") if name and name not in TASKS]:
            raise UserError(f"--only {self.only}: {unknown[0]!r} is none of {', '.join(TASKS)}")


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    if not Path(flags.data_path).is_dir():
        raise UserError(f"--data_path {flags.data_path} is no folder; give the one with the data sets")
    data, out, results = (Path(path).resolve() for path in (flags.data_path, flags.out_path, flags.results_path))
    out.mkdir(parents=True, exist_ok=True)
    stages, failed = Stages(out / "stages.json"), {}
    for step in chosen_steps(flags.only):
        try:
            stages.run(step.name, command_of(step, data, out, flags.seed, flags.quick))
            if step.result:
                used = stages.used[step.name]
                about = {"command": used["command"], "seed": flags.seed, "seconds": used["seconds"]}
                about |= when_and_where() | {"quick": flags.quick}
                hidden = [(str(ROOT) + "/", ""), (str(data), from_root(data))]
                collect(step.name, out / (step.folder or step.name), step.result, results, about, hidden)
        except UserError as error:
            failed[step.name] = str(error)
            print(f"{step.name} failed: {error}", flush=True)
    rows = all_rows(results)
    if rows and not flags.quick:
        write_table(rows, results, PAGE)
        print(f"wrote {from_root(results / 'tasks.csv')} and {from_root(PAGE)}")
    print(f"{sum(row['seconds'] for row in stages.used.values()) / 60:.0f} minutes in {len(stages.used)} steps")
    for name, error in failed.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


def chosen_steps(only: str | None) -> list[Step]:
    """Return the steps of the chosen tasks, after those of the models that they need."""
    tasks = [name for name in (only or "").split(",") if name] or TASKS
    needed = {group for step in STEPS if step.group in tasks for group in step.needs}
    return [step for step in STEPS if step.group in tasks or step.group in needed]


def command_of(step: Step, data: Path, out: Path, seed: int, quick: bool = False) -> str:
    """Return the command of a step, as in a shell, without `python`."""
    command = step.command.format(d=from_root(data), o=from_root(out))
    words = shlex.split(command)
    script = words[1] if words[0] == "-m" else words[0]
    if script.startswith(SEEDED):
        command += f" --seed {seed}"
    # Of two flags of the same name, the last one holds.
    return command + (" --epochs 1 --cycle_epochs 1 --warmup_epochs 0" if quick and script.startswith(TRAINING) else "")


def all_rows(results: Path) -> list[dict]:
    """Return the rows of the table, of all steps that have results."""
    rows = []
    for step in STEPS:
        path = results / f"{step.name}.json"
        if step.result and path.is_file():
            rows += rows_of(step.title, step.split, step.page, step.goals, json.loads(path.read_text()))
    return rows


if __name__ == "__main__":
    run_script(main)
