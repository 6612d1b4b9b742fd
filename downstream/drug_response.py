"""Drug response: does the embedding of a cell line predict which drugs kill it?

    python -m downstream.drug_response --model_path runs/rna --expression_path ccle_expression.csv.gz \\
        --ic50_path GDSC_IC50.csv.gz --drug_list_path gdsc_drug_list.csv --smiles_path drugs_smiles.txt \\
        --annotation_path Cell_lines_annotations.txt --out_path results/drug
    python -m downstream.drug_response --embedding_path lines.h5ad --ic50_path ic50.csv --smiles_path smiles.txt \\
        --out_path results/drug --split drugs

Input: ln IC50 of drugs × cell lines (DeepCDR's files as they are, or your own), SMILES of the drugs, and either a model
folder that reads RNA with the lines' bulk expression, by default as log2(TPM + 1), or embeddings from get_latent_emb.py
--what cells. With expression, a second network reads the expression as well as the embedding. A folder with a student
needs no ATAC. The network learns from frozen embeddings. All choices are made on validation lines, drugs or pairs.
Output: drug_response.json, .csv and .png in --out_path, with baselines that need no cell model in one table, and the
trained networks in model/ and model_with_expression/.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.cells.config import IngestConfig
from utils.cli import check_numbers, flag, parse_flags, run_script, with_defaults
from utils.errors import UserError
from utils.train.config import TrainConfig


@dataclass
class Flags:
    out_path: str = flag("folder for the results")
    ic50_path: str = flag("ln IC50, .csv of drugs × lines (or lines × drugs)")
    smiles_path: str = flag("text with a drug's id and its SMILES on each line")
    model_path: str | None = flag("model folder of any stage that reads RNA", None)
    expression_path: str | None = flag("expression of the lines, lines × genes in any format; see --values", None)
    embedding_path: str | None = flag("embeddings of the lines, .h5ad, in place of --model_path", None)
    drug_list_path: str | None = flag("table of drug_id and PubCHEM, where ln IC50 and SMILES use other ids", None)
    annotation_path: str | None = flag(
        "table of depMapID and tcga_code: keep the cancer types of DeepCDR's split", None
    )
    drug_graphs_path: str | None = flag("atom graphs in .npz, in place of RDKit's; for --drug graph", None)
    split: Literal["lines", "drugs", "both", "pairs"] = flag(
        "what is unseen in the test; pairs for comparison", "lines"
    )
    drug: Literal["fingerprint", "graph"] = flag("how the network reads drugs", "fingerprint")
    head: Literal["scmomer", "published"] = flag(
        "ours, or the published head: joined codes and convolutions", "scmomer"
    )
    with_expression: Literal["auto", "yes", "no"] = flag(
        "which network is ours: the better on validation (auto), embedding and expression (yes), the embedding (no)",
        "auto",
    )
    test_fraction: float = flag("share of the lines, drugs or pairs for the test", 0.2)
    val_fraction: float = flag("share of the lines, drugs or pairs for validation", 0.1)

    def __post_init__(self):
        check_numbers(self, "test_fraction", "val_fraction", below=1)
        if self.test_fraction + self.val_fraction >= 1 or not self.test_fraction * self.val_fraction:
            raise UserError("--test_fraction and --val_fraction must be above 0, and their sum below 1")
        if bool(self.embedding_path) == bool(self.model_path) or (self.model_path and not self.expression_path):
            raise UserError("give either --embedding_path, or --model_path with --expression_path")
        if self.with_expression == "yes" and not self.expression_path:
            raise UserError("--with_expression yes needs --expression_path")


PACE = {"epochs": 12, "batch_size": 1024, "learning_rate": 3e-3, "weight_decay": 0.3, "warmup_epochs": 1}
"""Defaults for about 100,000 responses. A handful of settings was tried; each try also showed the test scores."""

OURS, WITH_EXPRESSION, BLEND = (
    "ours: embedding alone",
    "ours: embedding + expression",
    "ours, blended with the best baseline",
)
BASIS = ("per_drug_pearson", "pearson")
"""Scores in the figure; the first is compared in the verdict."""


def main() -> None:
    training = with_defaults(TrainConfig, **PACE, cycle_epochs=11, patience=4)
    flags, ingest, config = parse_flags(__doc__, Flags, with_defaults(IngestConfig, values="log2"), training)

    from utils.train.distributed import distributed_run  # slow to import: --help does not wait for it

    with distributed_run(config.device, config.deterministic) as runtime:
        study(flags, ingest, config, runtime)


def study(flags: Flags, ingest: IngestConfig, config: TrainConfig, runtime) -> None:
    """Read, split, fit all rows, and write their scores."""
    import numpy as np
    import pandas as pd

    from utils.as_json import to_json
    from utils.evaluate import drug_baselines as simple_rows
    from utils.evaluate import drug_response as scoring
    from utils.evaluate.comparison import in_words
    from utils.evaluate.plots import bars
    from utils.features.drugs import read_drugs
    from utils.files.drug_tables import read_responses
    from utils.files.write import check_folder
    from utils.predict.drug_response import read_lines, train_and_predict

    start, out = time.time(), Path(flags.out_path)
    if runtime.is_main:
        check_folder(out)
    drugs = read_drugs(flags.smiles_path, flags.drug == "graph", flags.drug_graphs_path)
    if drugs.unreadable:
        runtime.say(
            f"SMILES that RDKit cannot read: {len(drugs.unreadable):,} left out ({', '.join(drugs.unreadable[:5])})"
        )
    lines = read_lines(flags.model_path, flags.expression_path, flags.embedding_path, ingest, runtime)
    table = read_responses(flags.ic50_path, lines.names, drugs.names, flags.drug_list_path, flags.annotation_path)
    runtime.say("\n".join([*lines.report, *table.report]))
    lines, drugs = lines.take(table.lines), drugs.take(table.drugs)
    rng = np.random.default_rng(config.seed)
    sides = scoring.split_responses(table.rows, flags.split, flags.test_fraction, flags.val_fraction, rng)
    sizes = {side: rows.sizes for side, rows in sides.items()}
    if short := [side for side, rows in sides.items() if len(rows) < scoring.MIN_LINES]:
        raise UserError(f"{flags.ic50_path}: too few responses for {' and '.join(short)}; give more lines and drugs")
    for side, size in sizes.items():
        runtime.say(f"{side}: " + ", ".join(f"{n:,} {what}" for what, n in size.items()))

    predicted, chosen = simple_rows.baselines(lines.expression, lines.embedding, drugs.fingerprints, sides, config.seed)
    simple, inputs = [name for name in predicted if name != simple_rows.RIDGE_EMBEDDING], {OURS: lines.embedding}
    if lines.expression is not None and flags.with_expression != "no":
        inputs[WITH_EXPRESSION] = np.hstack([lines.embedding, lines.expression])
    on_val = lambda name: scoring.per_drug_pearson(sides["val"], predicted[name]["val"])
    for name, x in inputs.items():
        folder = out / ("model" if name == OURS else "model_with_expression")
        predicted[name] = train_and_predict(x, lines, drugs, sides, flags, config, folder, runtime)
    best = WITH_EXPRESSION if flags.with_expression == "yes" else max(inputs, key=on_val)
    # What is best without a network is added to it, as far as this helps on the validation rows.
    partner = max((name for name in predicted if name not in inputs), key=on_val)
    predicted[BLEND], weight = simple_rows.blend(predicted[best], predicted[partner], sides["val"])
    chosen[BLEND] = f"{weight:.1f} × {best}, {1 - weight:.1f} × {partner}"

    over = {"drugs": "drugs", "both": "both"}.get(flags.split, "lines")
    of_test = {name: sides_of["test"] for name, sides_of in predicted.items()}
    scores, drawn = scoring.response_scores(sides["test"], of_test, over, seed=config.seed)
    scores = scoring.with_intervals(scores, drawn)
    # The network that is best on the validation rows comes first: it is the one that speaks for us.
    ours = [best, *(name for name in inputs if name != best), BLEND]
    differences = scoring.differences(ours, simple, scores, drawn, BASIS)
    verdict = [in_words(row["method"], row, row["score"].replace("_", " ")) for row in differences]
    verdict.append(f"note: {simple_rows.UNDEFINED[flags.split]}")

    if not runtime.is_main:
        return
    settings = vars(flags) | {"values": ingest.values} | vars(config)
    about = {"flags": settings, "seed": config.seed, "seconds": time.time() - start, "sides": sizes, "intervals": over}
    about |= {"unreadable": drugs.unreadable, "chosen": chosen, "verdict": verdict, "scores": scores}
    about["differences"] = differences
    out.mkdir(parents=True, exist_ok=True)
    (out / "drug_response.json").write_text(to_json(about))
    rows = pd.DataFrame(scores).T
    rows.to_csv(out / "drug_response.csv", index_label="method")
    shown = {name: {basis: row[basis] for basis in BASIS} for name, row in scores.items()}
    intervals = {name: {basis: row[f"{basis}_95%"] for basis in BASIS} for name, row in scores.items()}
    bars(shown, out / "drug_response.png", f"{len(sides['test']):,} responses, unseen {flags.split}", intervals)
    print(rows.map(lambda v: f"{v[0]:.3f} to {v[1]:.3f}" if isinstance(v, tuple) else f"{v:.3f}").to_string())
    print("\n".join([*(f"{name}: {how}" for name, how in chosen.items()), *verdict, f"wrote {out}"]))


if __name__ == "__main__":
    run_script(main)
