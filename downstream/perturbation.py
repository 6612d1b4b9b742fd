"""Perturbation: what does a perturbed gene change in a cell, and does a model predict it better than an average?

    python -m downstream.perturbation --data_path perturb.h5ad --model_path runs/rna --embedding_path genes.h5ad \
        --split singles --out_path results/perturbation
    python -m downstream.perturbation --data_path perturb.h5ad --model_path runs/rna --embedding_path genes.h5ad \
        --split doubles --predict KLF1+MAPK1,TP53 --out_path results/doubles

Input: control and perturbed cells with a `condition` (ctrl, A+ctrl, A+B) as GEARS saves them, or a `perturbation` as
scPerturb does; any model folder that reads RNA, which embeds the control cells; an embedding of genes for the vectors
of perturbed genes. The head is trained on the change of each perturbed cell against the controls of its line.
--split singles: genes that no training cell was perturbed in; doubles: unseen pairs of genes; lines: a cell line of
which the controls alone are known. Every condition is tested once, and all choices are made on validation conditions.
Output: perturbation.json, .csv, _conditions.csv and .png in --out_path, the head of all conditions in --out_path/model,
and with --predict predicted.csv, mean expression in log2(1 + counts per 10,000).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.cells.config import IngestConfig
from utils.cli import check_numbers, flag, parse_flags, run_script, with_defaults
from utils.errors import UserError
from utils.train.config import TrainConfig

OURS = "model"
N_HALVES = 10
"""How often the cells of each condition are halved."""
Training = with_defaults(
    TrainConfig, epochs=12, batch_size=64, learning_rate=1e-3, warmup_epochs=1, cycle_epochs=11, patience=3
)


@dataclass
class Flags:
    data_path: str = flag("control and perturbed cells with RNA")
    model_path: str = flag("model folder that reads RNA alone, of any stage")
    out_path: str = flag("folder for the results and the trained head")
    embedding_path: str | None = flag(
        "embedding of genes, .h5ad or word2vec text; without it, genes are ids alone", None
    )
    split: Literal["singles", "doubles", "lines"] = flag("what the test conditions are", "singles")
    folds: int = flag("number of folds of singles and doubles", 6)
    line: str | None = flag("cell line of singles and doubles; by default that with the most conditions", None)
    condition_column: str | None = flag("column of obs with the condition; by default condition or perturbation", None)
    separator: str | None = flag("stands between two genes; by default +, or _ in scPerturb's perturbation", None)
    line_column: str | None = flag("column of obs with the cell line; by default cell_type or cell_line", None)
    min_cells: int = flag("conditions with fewer cells are left out", 20)
    predict: str | None = flag("conditions to predict, such as A+B,C, separated by commas", None)

    def __post_init__(self):
        check_numbers(self, "folds", least=3)
        check_numbers(self, "min_cells", least=2)


def main() -> None:
    flags, ingest, config = parse_flags(__doc__, Flags, IngestConfig, Training)

    # Slow to import: --help and mistaken flags do not wait for them.
    import shutil
    import time

    import numpy as np

    from utils.cells.conditions import parse_condition
    from utils.evaluate import perturbation as scoring
    from utils.evaluate.gene_features import N_COMPONENTS, RANDOM, random_vectors
    from utils.evaluate.perturbation_table import Scores
    from utils.predict.control_cells import predicted_profiles, read_study
    from utils.train.perturbation import PERTURBATION
    from utils.train.stage import training_stage

    began, out, rng = time.monotonic(), Path(flags.out_path), np.random.default_rng(config.seed)
    wanted = [parse_condition(text, flags.separator or "+") for text in (flags.predict or "").split(",") if text]
    with training_stage(PERTURBATION.name, flags, config, out / "model") as stage:
        _ = stage.starts_anew  # refuses a folder that is there before minutes are spent
        study, notes = read_study(stage, flags, ingest, [gene for genes in wanted for gene in genes])
        line = flags.line or study.cells.lines[0]
        folds = scoring.make_folds(flags.split, study.conditions, line, flags.folds, rng)
        if not folds:
            raise UserError(
                f"{flags.data_path}: has too few conditions for --split {flags.split}, which needs 3 parts, to train, "
                f"validate and test; try another --split or --line ({', '.join(study.cells.lines)})"
            )
        vectors = {RANDOM: study.sums(random_vectors(len(study.perturbed), N_COMPONENTS, config.seed))}
        if study.vectors.any():
            vectors = {"gene vectors": study.sums(study.vectors)} | vectors

        predicted, settings = [], []
        for number, fold in enumerate(folds):
            rows = scoring.baselines(flags.split, fold, study.conditions, study.change, vectors, config.seed)
            head, chosen = study.fit(stage, out / "folds" / f"fold{number}", fold)
            rows[OURS] = study.predict(head, [study.conditions[i] for i in fold.test])
            predicted.append(rows)
            settings.append(chosen)
            stage.runtime.say(f"fold {number + 1} of {len(folds)}: {len(fold.train)} training conditions, {chosen}")
        everything = np.unique(np.concatenate([np.concatenate([fold.train, fold.test]) for fold in folds]))
        final = scoring.Fold(everything[:0], everything, [(fold.train, fold.test) for fold in folds])
        head, _ = study.fit(stage, out / "model", final, quiet=False)
        if stage.runtime.is_main:
            shutil.rmtree(out / "folds", ignore_errors=True)
            halves = [study.cells.halves(rng) for _ in range(N_HALVES)]
            scores = Scores.collect(study.conditions, study.change, halves, folds, predicted, flags.split == "doubles")
            verdict, differences = scores.verdict(OURS)
            about = {"flags": vars(flags), "seed": config.seed, "seconds": time.monotonic() - began, "notes": notes}
            about |= {"folds": settings, "verdict": verdict, "differences": differences}
            write(out, scores, about)
            if wanted:
                lines = study.cells.lines if flags.split == "lines" else [line]
                asked = [(name, genes) for name in lines for genes in wanted]
                predicted_profiles(study, head, asked).to_csv(out / "predicted.csv", index=False)
            print(*verdict, f"wrote {out}", sep="\n")


def write(out: Path, scores, about: dict) -> None:
    """Print the table of scores, and write it with a figure and the score of each condition."""
    from utils.as_json import to_json
    from utils.evaluate.perturbation import MEASURES
    from utils.evaluate.plots import bars

    table = scores.table()
    nested = {kind: table.loc[kind].to_dict("index") for kind in dict.fromkeys(table.index.get_level_values(0))}
    (out / "perturbation.json").write_text(to_json(about | {"measures": MEASURES, "scores": nested}))
    table.to_csv(out / "perturbation.csv")
    scores.per_condition().to_csv(out / "perturbation_conditions.csv", index=False)
    shown = {name: {m: row[m] for m in MEASURES if m != "mse_20"} for name, row in nested["all"].items()}
    intervals = {name: {m: row[f"{m}_95%"] for m in MEASURES} for name, row in nested["all"].items()}
    bars(shown, out / "perturbation.png", f"{len(scores.names)} test conditions", intervals)
    print(table[["conditions", *MEASURES]].astype(float).round(3).to_string())


if __name__ == "__main__":
    run_script(main)
