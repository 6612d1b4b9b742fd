"""Run one fold and one seed of the study on SNARE-seq2 mouse cortex, with RNA alone at test time.

    python -m benchmarks.snareseq2 --data_path snareseq2_mop.h5mu --fold 0 --seed 0

The data have 8,622 cells, 1,677 genes, 25,734 peaks and ten batches; a fold sets two batches aside for testing. --rows
chooses what to run:

    scMomer    all stages with --preset small (for two CPU cores), fine-tuning with the student and without it, on all
               labels and on few, and simple baselines
    ablations  without stage I, without stage II, without pretraining, with measured ATAC, and with ATAC alone
    scANVI, MultiVI  other methods (`make study` installs them)

Results are added to a JSON file, from which benchmarks/study.py makes tables. An interrupted run continues with the
stage that was interrupted.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.lib.bench import when_and_where
from benchmarks.lib.stages import Stages, from_root
from benchmarks.lib.study import load_run, save_run
from benchmarks.study import ALL, types_table
from utils.cells.preprocessed import read_cells
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError

FOLDS = ("09J,09K", "09H,09I", "09F,09G")  # the test batches of each fold; the other four batches are never tested
FEW_LABELS = (10, 30, 100)
PSEUDO_LABELS = "--epochs 6 --cycle_epochs 5 --val_every 6"
ROWS = ("scMomer", "ablations", "scANVI", "MultiVI")
UNTRAINED = "--max_steps 1 --learning_rate 0"  # leaves the weights at their random initial values


@dataclass
class Flags:
    data_path: str = flag("snareseq2_mop.h5mu, raw counts", "../shared/data/snareseq2_mop.h5mu")
    out_path: str | None = flag("folder for the models; by default runs/snareseq2/fold<f>_seed<s>", None)
    fold: int = flag("which two batches to test on: 0 is 09J and 09K, 1 is 09H and 09I, 2 is 09F and 09G", 0)
    seed: int = flag("random seed of the choice of validation cells and of few labels, and of all training", 0)
    rows: str = flag(f"what to run and add to the results, a comma-separated list of {', '.join(ROWS)}", "scMomer")
    results_path: str | None = flag("the JSON file; by default results/<name of out_path>.json beside out_path", None)


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    rows = flags.rows.split(",")
    if not 0 <= flags.fold < len(FOLDS):
        raise UserError(f"--fold {flags.fold} must be between 0 and {len(FOLDS) - 1}")
    if unknown := [row for row in rows if row not in ROWS]:
        raise UserError(f"--rows {flags.rows}: {unknown[0]!r} is none of {', '.join(ROWS)}")
    if not Path(flags.data_path).is_file():
        raise UserError(
            f"--data_path {flags.data_path} does not exist; make it with python -m benchmarks.snareseq2_data"
        )
    out = Path(flags.out_path or f"runs/snareseq2/fold{flags.fold}_seed{flags.seed}").resolve()
    results = Path(flags.results_path or out.parent / "results" / f"{out.name}.json")
    study = Study(Path(flags.data_path).resolve(), out, results, flags.fold, flags.seed)
    for row in rows:
        study.add(row)
    run = load_run(results)
    print(f"\n{types_table([run], ALL, n=1000)}\n\n{results} holds {', '.join(run.metadata['rows'])}")


class Study:
    """Runs the scripts for one fold and one seed, and keeps their results."""

    def __init__(self, data: Path, out: Path, results: Path, fold: int, seed: int):
        out.mkdir(parents=True, exist_ok=True)
        self.data, self.out, self.ready = from_root(data), out, from_root(out / "ready.h5mu")
        self.fold, self.seed, self.results, self.stages = fold, seed, results, Stages(out / "stages.json")
        self.metadata: dict = {"fold": fold, "seed": seed, "rows": {}, "stages": {}, "translation": {}, "settings": {}}
        self.cells: dict[str, pd.DataFrame] = {}
        if results.is_file():
            earlier = load_run(results)
            if (earlier.fold, earlier.metadata["seed"]) != (fold, seed):
                raise UserError(
                    f"{results}: has results of fold {earlier.fold}, seed {earlier.metadata['seed']}, not of fold "
                    f"{fold}, seed {seed}; choose another --results_path"
                )
            self.metadata, self.cells = earlier.metadata, earlier.names()

    def add(self, row: str) -> None:
        """Run everything that belongs to a row and add it to the results, unless they have it already."""
        if row in self.metadata["rows"]:
            print(f"{row}: is in {self.results}; to run it again, delete that file or choose another --results_path")
            return
        self.preprocess()
        if row == "scMomer":
            self.ours()
        elif row == "ablations":
            self.ablations()
        else:
            self.peer(row)
        self.metadata["rows"][row] = when_and_where()
        self.metadata["stages"] |= self.stages.used
        save_run(self.results, self.cells, **self.metadata)

    def path(self, name: str) -> str:
        """Return the path of a file or folder of this run, as commands spell it."""
        return from_root(self.out / name)

    def train(self, stage: str, script: str, flags: str) -> None:
        """Run a training script with the flags that all stages share, and some of its own."""
        common = f"--data_path {self.ready} --ckpt_dir {self.path('')} --seed {self.seed} --preset small --overwrite"
        self.stages.run(stage, f"{script}.py {common} {flags}".rstrip())

    def preprocess(self) -> None:
        """Preprocess and split the cells, and check that earlier rows have the same test cells."""
        self.stages.run(
            "preprocess",
            f"preprocess.py --data_path {self.data} --out_path {self.ready} --split_by batch "
            f"--test_groups {FOLDS[self.fold]} --target_sum 1000 --seed {self.seed}",
        )
        cells = read_cells(self.out / "ready.h5mu", ("rna",))
        self.labels = cells.labels().iloc[cells.rows("test")].dropna()
        for group, known in self.cells.items():
            if known["label"].tolist() != self.labels.tolist():
                raise UserError(f"{self.results}: {group}: is about other test cells; choose another --results_path")
            known.index = self.labels.index

    def ours(self) -> None:
        """Run all stages, with the student and without it, and the baselines."""
        self.pretrain()
        self.student("student", "multimodal")
        self.cell_types("scMomer", "student", "--train_student")
        self.cell_types("scMomer without the student", "multimodal", "--other_modality zeros")
        for n in FEW_LABELS:
            self.few_labels("scMomer", "student", "--train_student", n)
            self.few_labels("scMomer without the student", "multimodal", "--other_modality zeros", n)
        self.translation("student")

    def pretrain(self) -> None:
        """Run stages I and II, and save the teacher's latents."""
        self.stage_one("")
        self.join("multimodal", "")

    def stage_one(self, suffix: str, flags: str = "") -> None:
        self.train(f"stage I, RNA{suffix}", "pretrain_rna", f"--model_name rna{suffix} {flags}")
        self.train(f"stage I, ATAC{suffix}", "pretrain_atac", f"--model_name atac{suffix} {flags}")

    def join(self, name: str, suffix: str, flags: str = "") -> None:
        parents = f"--rna_model_path {self.path('rna' + suffix)} --atac_model_path {self.path('atac' + suffix)}"
        self.train(
            f"stage II, {name}",
            "pretrain_multimodal",
            f"--model_name {name} {parents} {flags}",
        )
        self.stages.run(
            f"latents, {name}",
            f"get_latent_emb.py --data_path {self.ready} --model_path {self.path(name)} "
            f"--ckpt_dir {self.path(f'latents_{name}')}",
        )

    def student(self, name: str, teacher: str, flags: str = "") -> None:
        latents = self.path(f"latents_{teacher}")
        self.train(
            f"stage III, {name}",
            "pretrain_missing_mod",
            f"--model_name {name} --model_path {self.path(teacher)} --dir_train {latents} --dir_val {latents} {flags}",
        )

    def cell_types(self, method: str, parent: str, flags: str, group: str = "all labels") -> None:
        """Fine-tune a cell type model, and keep its and the baselines' predictions for the test cells."""
        name = folder_name(method, group)
        self.train(
            f"fine-tune {method}, {group}",
            "train_missing_celltype_func",
            f"--model {name} --pretrained_model_path {self.path(parent)} {flags}",
        )
        # The baselines depend on the group alone, so they are fitted once per group.
        alone = " --model_alone" if "majority class" in self.cells.get(group, ()) else ""
        self.stages.run(
            f"evaluate {method}, {group}",
            f"evaluate.py --data_path {self.ready} --model_path {self.path(name)}{alone}",
        )
        folder = self.out / name / "evaluation"
        cells = pd.read_csv(folder / "predicted_test.csv", index_col="barcode", dtype=str, keep_default_na=False)
        self.keep(group, cells.rename(columns={"scmomer": method}))
        table = json.loads((folder / "evaluation_test.json").read_text())
        self.metadata["settings"][f"{method}, {group}"] = {
            row: scores["setting"] for row, scores in table.items() if isinstance(scores, dict) and "setting" in scores
        }
        self.metadata.setdefault("embeddings", table["embeddings"])

    def keep(self, group: str, cells: pd.DataFrame) -> None:
        """Add the predictions of methods to a group; they replace earlier ones of the same methods."""
        known = self.cells.get(group, self.labels.to_frame("label"))
        known = known.drop(columns=[name for name in known if name in cells and name != "label"])
        self.cells[group] = known.join(cells.drop(columns="label", errors="ignore"), validate="1:1")

    def few_labels(self, method: str, parent: str, flags: str, n: int, pretrained_lr_scale: float = 0.1) -> None:
        """Fine-tune on n labelled training cells per type, then on all training cells with that model's pseudo-labels.

        The fewer cells have labels, the more epochs the first model gets.
        """
        group, epochs = f"{n} labels per type", max(12, 1800 // n)
        few = f"--labels_per_type {n} {flags}"
        alone = f"--epochs {epochs} --cycle_epochs {epochs - 1} --val_every {epochs} "
        alone += f"--pretrained_lr_scale {pretrained_lr_scale}"
        first = f"{method}, labelled cells alone"
        self.cell_types(first, parent, f"{few} {alone}", group)
        teacher = f"--pseudo_labels_from {self.path(folder_name(first, group))}"
        self.cell_types(method, parent, f"{few} {PSEUDO_LABELS} {teacher}", group)

    def translation(self, name: str) -> None:
        self.stages.run(f"evaluate {name}", f"evaluate.py --data_path {self.ready} --model_path {self.path(name)}")
        table = json.loads((self.out / name / "evaluation" / "evaluation_test.json").read_text())
        self.metadata["translation"] |= {row: scores for row, scores in table.items() if isinstance(scores, dict)}

    def ablations(self) -> None:
        """Run the model without some of its parts, and with other modalities, on all labels."""
        self.pretrain()
        tune = "--train_student"
        self.cell_types("scMomer, RNA + measured ATAC", "multimodal", "--other_modality measured", "RNA and ATAC")
        self.stage_one("_untrained", UNTRAINED)
        self.join("multimodal_without_I", "_untrained")
        self.student("student_without_I", "multimodal_without_I")
        self.cell_types("scMomer without stage I", "student_without_I", tune)
        self.join("multimodal_without_II", "", UNTRAINED)
        self.student("student_without_II", "multimodal_without_II")
        self.cell_types("scMomer without stage II", "student_without_II", tune)
        self.train_from_scratch(tune)
        self.student("student_of_rna", "multimodal", "--missing rna")
        self.cell_types("scMomer, ATAC alone", "student_of_rna", tune, "ATAC alone")

    def train_from_scratch(self, tune: str) -> None:
        """Fine-tune the same model from random weights, without any pretraining."""
        self.join("multimodal_untrained", "_untrained", UNTRAINED)
        self.student("student_untrained", "multimodal_untrained", UNTRAINED)
        name, everything = "scMomer without pretraining", "--trainable_blocks -1"
        self.cell_types(name, "student_untrained", f"{tune} {everything}")
        self.few_labels(name, "student_untrained", f"--train_student {everything}", 30, pretrained_lr_scale=1)

    def peer(self, method: str) -> None:
        """Run scANVI or MultiVI in a separate process."""
        folder, few = self.out / method, ",".join(map(str, FEW_LABELS))
        self.stages.run(
            method,
            f"-m benchmarks.peers --method {method} --data_path {self.data} --ready_path {self.ready} "
            f"--out_path {self.path(method)} --seed {self.seed} --labels_per_type {few}",
        )
        for path in sorted(folder.glob("*.csv")):
            self.keep(path.stem, pd.read_csv(path, index_col="barcode", dtype=str, keep_default_na=False))
        details = json.loads((folder / "details.json").read_text())
        self.metadata["translation"] |= details.pop("translation")
        self.metadata.setdefault("peers", {})[method] = details


def folder_name(method: str, group: str) -> str:
    """Return the name of the model folder of a method in a group."""
    return f"{method}, {group}".replace(" ", "_").replace(",", "")


if __name__ == "__main__":
    run_script(main)
