"""Train the bundled model, reference/pbmc, and measure it on cells that it has not seen.

    python -m benchmarks.pbmc_box --data_path ../shared/data
    python -m benchmarks.pbmc_box --card_only        # writes the card again, from pbmc_box.json

Cells: three 10x chemistries of human blood (scrna/pbmc_3tech.h5ad, with types), and human immune cells of tumours
(immune_rna.h5ad) as more cells without labels for stages I and II. RNA alone, the genes of pbmc_3tech.

Fine-tuning starts from stage I or stage II of RNA alone, and sees each labelled training cell twice, once with a random
panel of the genes, since files often lack many. Simple classifiers are mixed in (--mix_baselines yes).

1. Each chemistry is left out once, from all training, and labelled afterwards. The settings are chosen on validation
   cells of the other two chemistries. The baselines have the same training and validation cells.
2. The box is trained on all three chemistries, with the settings of the best mean validation score, and labels scanpy's
   pbmc68k_reduced: another study, log values of 765 genes.

Writes the folder --box, and the scores with 95% bootstrap intervals over cells to <results>/pbmc_box.json.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.box import (
    TARGETS,
    TYPES_68K,
    add_panels,
    card,
    chosen,
    model_rows,
    scored,
    simple_rows,
    split_of,
    write_cells,
)
from benchmarks.rna_only import pbmc68k
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError

CHEMISTRIES = ("3pv1", "3pv2", "5p")
STAGE_ONE = "--preset tiny --epochs 4 --cycle_epochs 3"
STAGE_TWO = "--preset tiny --epochs 40 --cycle_epochs 39"
_FROZEN, _WHOLE = "--epochs 15 --cycle_epochs 14", "--epochs 12 --cycle_epochs 11 --trainable_blocks -1"
_MORE = "--preset tiny --mix_baselines yes"
SETTINGS = {
    "stage I, frozen encoder": ("rna", f"{_MORE} {_FROZEN}"),
    "stage I, whole encoder": ("rna", f"{_MORE} {_WHOLE}"),
    "stage II, frozen encoder": ("denoiser", f"{_MORE} {_FROZEN}"),
    "stage II, whole encoder": ("denoiser", f"{_MORE} {_WHOLE}"),
}
"""Settings to choose from: the stage that fine-tuning starts from, and its flags."""
HIERARCHY = {
    "T_CD4": "T cell",
    "T_CD8": "T cell",
    "T cell": "lymphocyte",
    "NK": "lymphocyte",
    "B": "lymphocyte",
    "Mono_CD14": "monocyte",
    "Mono_CD16": "monocyte",
    "monocyte": "myeloid leukocyte",
    "DC": "myeloid leukocyte",
    "lymphocyte": "leukocyte",
    "myeloid leukocyte": "leukocyte",
    "leukocyte": "blood cell",
    "MK": "blood cell",
    "HSC": "blood cell",
}
"""Type of the bundled model → what it is a kind of, up to blood cell."""
LEAST_COVERAGE = 0.1
"""The box reads files with this share of its genes: pbmc68k_reduced, on which it is measured, has 11%."""
MOST_BYTES = 4_000_000


@dataclass
class Flags:
    data_path: str = flag("folder with scrna/pbmc_3tech.h5ad and immune_rna.h5ad", "../shared/data")
    out_path: str = flag("folder for the models on the way", "runs/pbmc_box")
    box: str = flag("model folder to write", "reference/pbmc")
    results: str = flag("folder for pbmc_box.json", "benchmarks/results")
    seed: int = flag("random seed of the split and of all training", 0)
    card_only: bool = flag("write the card of an existing folder again, from the scores in pbmc_box.json", False)


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    if flags.card_only:
        write_card(Path(flags.box), Path(flags.results) / "pbmc_box.json")
        return
    data = Path(flags.data_path)
    files = [data / "scrna" / "pbmc_3tech.h5ad", data / "immune_rna.h5ad"]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"--data_path {flags.data_path}: has no {file.relative_to(data)}; give the folder with both"
            )

    from benchmarks.lib.bench import when_and_where
    from benchmarks.lib.stages import Stages, from_root
    from utils.as_json import to_json
    from utils.train.folders import write_folder
    from utils.train.model_folder import load_model

    out = Path(flags.out_path).resolve()
    out.mkdir(parents=True, exist_ok=True)
    stages, path = Stages(out / "stages.json"), lambda name: from_root(out / name)
    write_cells(*files, out / "raw.h5ad")

    def prepared(name: str, split: str) -> Callable[[str], str]:
        """Preprocess with a split and run stages I and II; return setting → flags of fine-tuning."""
        stages.run(
            f"{name}: preprocess",
            f"preprocess.py --data_path {path('raw.h5ad')} --out_path {path(name + '.h5ad')} --val_fraction 0.2 "
            f"--target_sum median --seed {flags.seed} {split}",
        )
        common = f"--ckpt_dir {path('')} --seed {flags.seed} --overwrite"
        ready = f"--data_path {path(name + '.h5ad')} {common} --model_name {name}"
        stages.run(f"{name}: stage I", f"pretrain_rna.py {ready}_rna {STAGE_ONE}")
        parent = f"--rna_model_path {path(name + '_rna')}"
        stages.run(f"{name}: stage II", f"pretrain_multimodal.py {ready}_denoiser {parent} {STAGE_TWO}")
        add_panels(out / f"{name}.h5ad", out / f"{name}_panels.h5ad", flags.seed)
        both = f"--data_path {path(name + '_panels.h5ad')} {common} --other_modality zeros"

        def fine_tuning(setting: str) -> str:
            stage, words = SETTINGS[setting]
            return f"{both} --pretrained_model_path {path(f'{name}_{stage}')} {words}"

        return fine_tuning

    # 1. Leave out one chemistry at a time.
    unseen, validation = {}, {}
    for name in CHEMISTRIES:
        fine_tuning = prepared(name, f"--split_by batch --test_groups {name}")
        cells, fitted = split_of(out / f"{name}.h5ad"), {}
        for number, setting in enumerate(SETTINGS):
            model = f"{name}_{number}"
            stages.run(f"{name}: {setting}", f"train_missing_celltype_func.py {fine_tuning(setting)} --model {model}")
            fitted[setting] = model_rows(out / model, cells)
        validation[name] = {setting: rows["val"] for setting, rows in fitted.items()}
        best = chosen(validation[name])
        rows = {"scMomer": fitted[best]["test"]} | simple_rows(cells, flags.seed)
        unseen[name] = {"setting": best, "scores": rows, "targets": TARGETS[name], "n_cells": len(cells["test"][1])}
        print(to_json({name: unseen[name]}), flush=True)

    # 2. Train it on all, and label another study.
    mean = {
        setting: {score: sum(v[setting][score] for v in validation.values()) / 3 for score in ("accuracy", "macro_f1")}
        for setting in SETTINGS
    }
    best = chosen(mean)
    words = prepared("box", "")(best)
    (out / "hierarchy.csv").write_text("".join(f"{child},{parent}\n" for child, parent in HIERARCHY.items()))
    words += f" --label_hierarchy {path('hierarchy.csv')}"
    stages.run("box: fine-tune", f"train_missing_celltype_func.py {words} --model box")
    saved = load_model(out / "box", "celltype")
    saved.stamp["min_gene_coverage"] = LEAST_COVERAGE
    here = {
        "data_path": "box_panels.h5ad",
        "pretrained_model_path": f"box_{SETTINGS[best][0]}",
        "label_hierarchy": "hierarchy.csv",
    }
    saved.training |= here | {"ckpt_dir": ""}
    other = scored(saved, pbmc68k(), split_of(out / "box.h5ad"), LEAST_COVERAGE, flags.seed)
    box = Path(flags.box)

    def write(folder: Path) -> None:
        saved.write(folder)
        (folder / "README.md").write_text(card(saved, best, commands(best), unseen, other))

    box.parent.mkdir(parents=True, exist_ok=True)
    digest = write_folder(box, write)
    size = sum(file.stat().st_size for file in box.iterdir())
    if size > MOST_BYTES:
        raise UserError(f"--box {flags.box}: has {size:,} bytes, more than {MOST_BYTES:,}; choose a smaller --preset")
    seconds = {
        name: sum(u["seconds"] for key, u in stages.used.items() if key.startswith(f"{name}:")) for name in unseen
    }
    results = when_and_where() | {
        "command": "python -m benchmarks.pbmc_box",
        "seed": flags.seed,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "seconds_per_chemistry": seconds,
        "box": {"bytes": size, "hash": digest, "setting": best, "mixture": saved.fitted["mixture"]},
        "validation": validation,
        "unseen_chemistry": unseen,
        "missed": missed(unseen),
        "pbmc68k_reduced": other | {"types": TYPES_68K},
        "stages": stages.used,
    }
    Path(flags.results).mkdir(parents=True, exist_ok=True)
    (Path(flags.results) / "pbmc_box.json").write_text(to_json(results))
    print(json.dumps(results["missed"], indent=1))
    print(f"wrote {flags.box} ({size:,} bytes) and {flags.results}/pbmc_box.json")


def write_card(box: Path, results: Path) -> None:
    """Write the model's card again, from the scores of the run that made it; the new hash goes into the results."""
    from utils.as_json import to_json
    from utils.train.folders import copy_folder
    from utils.train.model_folder import load_model

    saved, found = load_model(box, "celltype"), json.loads(results.read_text())
    best = found["box"]["setting"]
    text = card(saved, best, commands(best), found["unseen_chemistry"], found["pbmc68k_reduced"])
    found["box"]["hash"] = copy_folder(box, box, {"README.md": text})
    found["box"]["bytes"] = sum(file.stat().st_size for file in box.iterdir())
    results.write_text(to_json(found))


def commands(setting: str) -> str:
    """Return the commands that train it with a setting, a line each."""
    stage, words = SETTINGS[setting]
    joined = [f"python pretrain_multimodal.py {STAGE_TWO}"] if stage == "denoiser" else []
    fit = f"python train_missing_celltype_func.py {words} --other_modality zeros"
    return "\n".join([f"python pretrain_rna.py {STAGE_ONE}", *joined, fit])


def missed(unseen: dict) -> list[str]:
    """Name each target that scMomer misses, with both numbers."""
    return [
        f"{name}, {score}: {row['scores']['scMomer'][score]:.3f}, {baseline} {target[score]:.3f}"
        for name, row in unseen.items()
        for baseline, target in row["targets"].items()
        for score in ("accuracy", "macro_f1")
        if round(row["scores"]["scMomer"][score], 3) < target[score]
    ]


if __name__ == "__main__":
    run_script(main)
