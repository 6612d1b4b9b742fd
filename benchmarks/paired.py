"""Run one fold of the study on paired cells: what is the second modality worth for cells with RNA alone?

    python -m benchmarks.paired --fold 0
    python -m benchmarks.paired --fold 0 --parts types --seeds 0,1
    python -m benchmarks.paired --data bmmc --fold 1

Test cells come from batches or donors that no stage is trained on, and have RNA alone. --parts chooses what to run:

    embeddings   pretrains every arm, once per fold, and fits the same classifier on each arm's frozen embedding, by 10,
                 30, 100 and all labels per type
    controls     the same for students without a trained teacher; shuffled_denoiser for one of them on shuffled pairs
    types        fine-tunes the model, beside all baselines of evaluate.py
    mixed        mixes three simple classifiers into that model, where validation cells say that it helps
                 (--mix_baselines auto)
    subclasses   fine-tunes the model for finer types with 30 labels of each, alone and mixed, beside all baselines
    shuffled     fine-tunes the same model after pretraining on shuffled pairs
    translation  scores how well the students of embeddings predict ATAC; controls_translation those of controls
    scANVI, MultiVI   other methods (`make study` installs them); scVI is scored with scANVI
    quick        pretrains on real pairs alone, and makes some rows of embeddings and translation

Each part writes one CSV file with a row per seed, number of labels, method and measure; benchmarks/study.py makes
tables of them. What a file has already is not run again, and an interrupted run continues with the stage that
was interrupted. The arms are flags of the ordinary scripts; their commands, seconds and memory are in stages.json of
--out_path.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from benchmarks.lib import fine_tune
from benchmarks.lib.bench import RESULTS
from benchmarks.lib.pairs import DATA, Data
from benchmarks.lib.probe import SUBCLASS_LABELS, probe, thinned
from benchmarks.lib.stages import ROOT, Stages, from_root
from benchmarks.lib.study import MIXED, OURS, SHUFFLED, add_rows, done_in, evaluated, read_rows, run_name, scores_in
from utils.cells.preprocessed import read_cells
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError
from utils.evaluate.metrics import classification_scores

PARTS = (
    "embeddings",
    "controls",
    "shuffled_denoiser",
    "translation",
    "controls_translation",
    "types",
    "mixed",
    "subclasses",
    "shuffled",
)
PROBED = ("embeddings", "controls", "shuffled_denoiser")
FINE_TUNED = ("types", "mixed", "subclasses", "shuffled")
PEERS = ("scANVI", "MultiVI")
QUICK = ("stage II", "student")
"""Arms of the part quick."""
PSEUDO_LABELS = "--epochs 6 --cycle_epochs 5 --val_every 6"
UNTRAINED = "--max_steps 1 --learning_rate 0"  # leaves the weights at their random initial values
EMBEDDINGS = {
    "stage I": ("rna", ""),
    "stage II": ("multimodal", "--without atac"),
    "student": ("student", ""),
    "student, shuffled pairs": ("student_shuffled", ""),
    "measured ATAC": ("multimodal", ""),
}
"""Arm → model folder, and flags of get_latent_emb.py."""
CONTROLS = {
    "student, untrained teacher": ("student_untrained", ""),
    "RNA + ATAC denoiser": ("denoiser_both", ""),
    "RNA denoiser": ("denoiser_rna", ""),
}
SHUFFLED_DENOISER = {"RNA + ATAC denoiser, shuffled pairs": ("denoiser_shuffled", "")}
THINNED = ("stage II", "student", "student, shuffled pairs")
"""Arms whose embeddings of thinned cells are scored."""


@dataclass
class Flags:
    data: Literal["snareseq2", "bmmc"] = flag(
        "mouse cortex (SNARE-seq2), or human bone marrow (500 cells)", "snareseq2"
    )
    data_path: str = flag("folder with the raw files", "../shared/data")
    fold: int = flag("which batches or donors to test on, from 0", 0)
    parts: str = flag(f"what to run, a comma-separated list of {', '.join((*PARTS, *PEERS, 'quick'))}", ",".join(PARTS))
    seeds: str = flag(
        "of the draws of labels and of fine-tuning in types, mixed, subclasses and shuffled, separated by commas", "0"
    )
    draws: int = flag("draws of labels in embeddings and controls", 5)
    pretraining_seed: int = flag("of the three pretraining stages; each seed has its own files", 0)
    out_path: str | None = flag("folder for the models; by default runs/study/<data>_fold<f>", None)
    results_path: str = flag("folder for the CSV files", f"{RESULTS}/study")

    def __post_init__(self):
        known = (*PARTS, *PEERS, "quick")
        if unknown := [part for part in self.parts.split(",") if part not in known]:
            raise UserError(f"--parts {self.parts}: {unknown[0]!r} is none of {', '.join(known)}")
        if not 0 <= self.fold < len(DATA[self.data].folds):
            raise UserError(f"--fold {self.fold} must be between 0 and {len(DATA[self.data].folds) - 1}")
        if not all(seed.isdigit() for seed in self.seeds.split(",")):
            raise UserError(f"--seeds {self.seeds}: give whole numbers, separated by commas")


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    run = f"{flags.data}_{run_name(flags.fold, flags.pretraining_seed)}"
    out = Path(flags.out_path or f"runs/study/{run}").resolve()
    fold = Fold(DATA[flags.data], Path(flags.data_path).resolve(), out, flags.fold, flags.pretraining_seed)
    for part in flags.parts.split(","):
        path = Path(flags.results_path) / f"{run}_{part}.csv"
        done, seeds = done_in(path), list(map(int, flags.seeds.split(",")))
        if part in FINE_TUNED:
            numbers = (*fold.data.few, 0)
            if part == "subclasses":
                numbers = (SUBCLASS_LABELS,) if fold.data.subclass else ()
            todo = [(seed, n) for seed in seeds for n in numbers if (seed, n) not in done]
        else:
            if part in PROBED:
                seeds = range(flags.draws if fold.data.few else 1)
            elif part in ("translation", "controls_translation", "MultiVI", "quick"):
                seeds = [0]
            todo = [seed for seed in seeds if seed not in {seed for seed, _ in done}]
        if not todo:
            print(f"{path}: has these rows already; to make them again, delete it")
            continue
        fold.preprocess()
        for rows in getattr(fold, part.lower())(todo):
            add_rows(path, rows)
            print(f"wrote {path}: {len(read_rows(path)):,} rows")


class Fold:
    """Runs the scripts for one fold, and turns what they write into rows.

    Parameters
    ----------
    data : the data set
    folder : where its raw files are
    out : folder for models and stages.json
    fold : number of the fold
    seed : of pretraining
    """

    def __init__(self, data: Data, folder: Path, out: Path, fold: int, seed: int = 0):
        out.mkdir(parents=True, exist_ok=True)
        self.data, self.out, self.fold, self.seed = data, out, fold, seed
        self.inputs, self.groups = data.inputs.format(from_root(folder)), data.folds[fold]
        self.stages = Stages(out / "stages.json")
        self.ready, self.control = self.path("ready.h5mu"), self.path("shuffled.h5mu")

    def path(self, name: str) -> str:
        """Return the path of a file or folder of this fold, as commands spell it."""
        return from_root(self.out / name)

    def preprocess(self, title: str = "preprocess", path: str = "", flags: str = "") -> None:
        """Make the model-ready file, or another one with more flags."""
        common = f"{self.inputs} --split_by {self.data.group} --test_groups {self.groups} {self.data.more}"
        self.stages.run(title, f"preprocess.py {common} --out_path {path or self.ready} {flags}".rstrip())

    def shuffle_pairs(self) -> None:
        """Make the same file with ATAC shuffled within batches and deciles of depth."""
        self.preprocess("preprocess, shuffled pairs", self.control, f"--shuffle_pairs {self.data.group}")

    def train(
        self,
        stage: str,
        script: str,
        name: str,
        flags: str,
        seed: int | None = None,
        data: str | None = None,
        folder: str = "",
    ) -> None:
        """Run a training script with --preset small, flags of its own, and a seed: that of pretraining by default."""
        seed = self.seed if seed is None else seed
        common = f"--preset small --data_path {data or self.ready} --ckpt_dir {self.path(folder)} --model_name {name}"
        pace, overwrite = self.data.pace.get(script, ""), "" if "--resume" in flags else "--overwrite"
        self.stages.run(stage, " ".join(f"{script}.py {common} {pace} {flags} --seed {seed} {overwrite}".split()))

    def stage_one(self) -> None:
        """Pretrain both encoders, which know no pairs."""
        self.train("stage I, RNA", "pretrain_rna", "rna", "")
        self.train("stage I, ATAC", "pretrain_atac", "atac", "")

    def pretrain(self) -> None:
        """Pretrain the model."""
        self.stage_one()
        self.join("multimodal", self.ready)
        self.student("student", "multimodal", self.ready)

    def pretrain_on_shuffled(self) -> None:
        """Pretrain it on pairs of cells that have only batch and depth in common."""
        self.pretrain()
        self.shuffle_pairs()
        self.join("multimodal_shuffled", self.control)
        self.student("student_shuffled", "multimodal_shuffled", self.control)

    def pretrain_controls(self) -> None:
        """Pretrain students of a teacher with random weights, and without any teacher."""
        self.stage_one()
        self.join("multimodal_untrained", self.ready, UNTRAINED)
        self.student("student_untrained", "multimodal_untrained", self.ready)
        self.student("denoiser_both", "multimodal_untrained", self.ready, "--teacher_weight 0")
        self.student("denoiser_rna", "multimodal_untrained", self.ready, "--teacher_weight 0 --missing_weight 0")

    def pretrain_shuffled_denoiser(self) -> None:
        """Pretrain the student that reconstructs both modalities without a teacher on shuffled pairs."""
        self.stage_one()
        self.shuffle_pairs()
        self.join("untrained_shuffled", self.control, UNTRAINED)
        self.student("denoiser_shuffled", "untrained_shuffled", self.control, "--teacher_weight 0")

    def join(self, name: str, data: str, flags: str = "") -> None:
        """Run stage II, and write the teacher's latents."""
        parents = f"--rna_model_path {self.path('rna')} --atac_model_path {self.path('atac')}"
        self.train(f"stage II, {name}", "pretrain_multimodal", name, f"{parents} {flags}", data=data)
        latents = f"--model_path {self.path(name)} --ckpt_dir {self.path(f'latents_{name}')}"
        self.stages.run(f"latents, {name}", f"get_latent_emb.py --data_path {data} {latents}")

    def student(self, name: str, teacher: str, data: str, flags: str = "") -> None:
        """Run stage III."""
        latents = self.path(f"latents_{teacher}")
        teacher = f"--model_path {self.path(teacher)} --dir_train {latents} --dir_val {latents}"
        self.train(f"stage III, {name}", "pretrain_missing_mod", name, f"{teacher} {flags}", data=data)

    def embeddings(self, seeds: list[int]):
        """Yield rows of the same classifier on the embedding of each stage, for each draw of labels."""
        self.pretrain_on_shuffled()
        yield from self.probed(EMBEDDINGS, seeds)

    def quick(self, seeds: list[int]):
        """Yield some of the rows of embeddings and translation, without the arm of shuffled pairs."""
        self.pretrain()
        arms = {arm: EMBEDDINGS[arm] for arm in QUICK}
        for rows in self.probed(arms, seeds, thin=False):
            yield rows + self.translated({"student": arms["student"]}, seeds[0])

    def controls(self, seeds: list[int]):
        """Yield such rows of the students without a trained teacher."""
        self.pretrain_controls()
        yield from self.probed(CONTROLS, seeds)

    def shuffled_denoiser(self, seeds: list[int]):
        """Yield such rows of the student without a teacher that was pretrained on shuffled pairs."""
        self.pretrain_shuffled_denoiser()
        yield from self.probed(SHUFFLED_DENOISER, seeds)

    def probed(self, arms: dict[str, tuple[str, str]], seeds: list[int], thin: bool = True):
        """Embed all cells by each arm, and yield the rows of the classifier for each draw of labels."""
        cells, files = read_cells(self.out / "ready.h5mu", ("rna", "atac")), {"": self.ready}
        if (
            self.data.subclass and thin
        ):  # cells deep enough for their types to be saturated are also thinned at test time
            test = cells.obs.index[cells.rows("test")]
            names = thinned(self.out, ROOT / self.inputs.split()[1], test)
            files |= {name: self.path(f"{name}.h5ad") for name in names}
        found = {}
        for arm, (folder, flags) in arms.items():
            for thinning, path in files.items():
                if thinning and arm not in THINNED:
                    continue
                name = f"embedding_{folder}{'_without' if flags else ''}{'_' * bool(thinning)}{thinning}"
                command = f"--data_path {path} --model_path {self.path(folder)} --out_path {self.path(name + '.h5ad')}"
                self.stages.run(name, f"get_latent_emb.py --what cells {command} {flags}".rstrip())
                found[arm, thinning] = self.out / f"{name}.h5ad"
        for seed in seeds:
            yield probe(cells, found, (*self.data.few, 0), seed, self.data.subclass)

    def types(self, todo: list[tuple[int, int]]):
        """Yield rows of the fine-tuned model and of all baselines, for each seed and number of labels."""
        self.pretrain()
        for seed, n in todo:  # with all labels the baselines do not depend on the seed
            model = self.fine_tune(OURS, "student", n, seed)
            yield self.scores(OURS, model, n, seed, with_baselines=bool(n) or seed == 0)

    def mixed(self, todo: list[tuple[int, int]]):
        """Yield rows of the same model after simple classifiers have been mixed in, where validation cells say so."""
        self.pretrain()
        for seed, n in todo:
            yield self.scores(MIXED, self.fine_tune(OURS, "student", n, seed, mix=True), n, seed)

    def subclasses(self, todo: list[tuple[int, int]]):
        """Yield rows of the fine-tuned model, alone and mixed, and of all baselines for finer types."""
        self.pretrain()
        for seed, n in todo:
            alone, mixed = (
                self.fine_tune(OURS, "student", n, seed, mix, column=self.data.subclass) for mix in (False, True)
            )
            yield self.scores(OURS, alone, n, seed, with_baselines=True) + self.scores(MIXED, mixed, n, seed)

    def shuffled(self, todo: list[tuple[int, int]]):
        """Yield rows of the same model, pretrained on shuffled pairs."""
        self.pretrain_on_shuffled()
        for seed, n in todo:
            yield self.scores(SHUFFLED, self.fine_tune(SHUFFLED, "student_shuffled", n, seed), n, seed)

    def scores(self, method: str, model: Path, n: int, seed: int, with_baselines: bool = False) -> list[tuple]:
        """Evaluate a model folder, and return the rows."""
        alone = "" if with_baselines else " --model_alone"
        command = f"evaluate.py --data_path {self.ready} --model_path {from_root(model)}{alone}"
        self.stages.run(f"evaluate {model.relative_to(self.out)}", command)
        return scores_in(model, method, seed, n)

    def fine_tune(
        self, method: str, parent: str, n: int, seed: int, mix: bool = False, column: str | None = None
    ) -> Path:
        """Fine-tune a cell type model on n labels per type (0 for all), and return its folder.

        With few labels it is trained twice: on the labelled cells alone, the longer the fewer they are, and then on all
        training cells, with the first model's predictions as labels. `mix` lets copies of both mix simple classifiers
        in. `column` of obs has the types, if not the usual one.
        """
        start, name = f"--pretrained_model_path {self.path(parent)} --train_student", f"{parent}_{n}_labels_{seed}"
        title = f"{method}, {n or 'all'} labels, seed {seed}"
        if column:
            start, name, title = f"{start} --label_column {column}", f"{name}_{column}", f"{title}, {column}"
        if n:
            own = f"{start} {fine_tune.alone(n)}"
            first = self.tuned(f"{title}, labelled cells alone", f"{name}_alone", own, seed, mix)
            if not (of_mixture := mix and fine_tune.is_mixed(first)):
                first = self.out / f"{name}_alone"  # whose labels are the same, so that its second training serves, too
            start = f"{start} {fine_tune.on_all_cells(n, from_root(first))} {PSEUDO_LABELS}"
            name, title = f"{name}{fine_tune.RELABELLED * of_mixture}", f"{title}{', labels of a mixture' * of_mixture}"
        return self.tuned(title, name, start, seed, mix)

    def tuned(self, title: str, name: str, flags: str, seed: int, mix: bool) -> Path:
        """Run fine-tuning once, the model alone or a copy of it with simple classifiers mixed in; return its folder."""
        script = "train_missing_celltype_func"
        self.train(f"fine-tune {title}", script, name, f"{flags} {fine_tune.ALONE}", seed)
        if not mix:
            return self.out / name
        fine_tune.copy_to_mix(self.stages, f"mix {title}", self.out, name)
        self.train(f"mix {title}", script, name, f"{flags} {fine_tune.MIX}", seed, folder=fine_tune.MIXED)
        return self.out / fine_tune.MIXED / name

    def translation(self, seeds: list[int]):
        """Yield rows of the translation RNA → ATAC by the student, with pairs as they are and shuffled."""
        self.pretrain_on_shuffled()
        yield self.translated(EMBEDDINGS, seeds[0])

    def controls_translation(self, seeds: list[int]):
        """Yield such rows of the students without a trained teacher."""
        self.pretrain_controls()
        yield self.translated(CONTROLS, seeds[0])

    def translated(self, arms: dict[str, tuple[str, str]], seed: int) -> list[tuple]:
        """Score each arm that predicts ATAC from RNA, and the baselines once."""
        rows = []
        for arm, (name, _) in arms.items():
            if not name.startswith(("student", "denoiser_both")):
                continue
            self.stages.run(f"translate {arm}", f"evaluate.py --data_path {self.ready} --model_path {self.path(name)}")
            for row, found in evaluated(self.out / name, "peak_auroc").items():
                if arm == "student" or row.startswith("scmomer"):
                    values = {measure: value for measure, value in found.items() if isinstance(value, float)}
                    method = row.replace("scmomer", arm)
                    rows += [(seed, 0, method, measure, value) for measure, value in values.items()]
        return rows

    def scanvi(self, seeds: list[int]):
        yield from self.peer("scANVI", seeds)

    def multivi(self, seeds: list[int]):
        yield from self.peer("MultiVI", seeds)

    def peer(self, method: str, seeds: list[int]):
        """Yield rows of another method, run in a separate process."""
        truth = read_cells(self.out / "ready.h5mu", ("rna",))
        labels = truth.labels().iloc[truth.rows("test")].dropna()
        for seed in seeds:
            folder = f"{method}_{seed}"
            self.stages.run(
                f"{method}, seed {seed}",
                f"-m benchmarks.peers --method {method} {self.inputs} --ready_path {self.ready} "
                f"--out_path {self.path(folder)} --seed {seed} --labels_per_type {','.join(map(str, self.data.few))}",
            )
            rows = []
            for path in sorted((self.out / folder).glob("*.csv")):
                cells = pd.read_csv(path, index_col="barcode", dtype=str, keep_default_na=False).loc[labels.index]
                n = 0 if path.stem == "all labels" else int(path.stem.split()[0])
                for name in cells:
                    scores = classification_scores(labels.to_numpy(), cells[name].to_numpy())
                    rows += [(seed, n, name, measure, scores[measure]) for measure in ("accuracy", "macro_f1")]
            yield rows


if __name__ == "__main__":
    run_script(main)
