"""Gene pairs: does an embedding of genes predict which genes, or proteins, interact?

    python -m downstream.gene_pairs --embedding_path genes.h5ad --cells_path cells.h5ad --out_path results/ggi \
        --train_path train_text.txt.gz --valid_path valid_text.txt --test_path test_text.txt
    python -m downstream.gene_pairs --embedding_path genes.h5ad --pairs_path HuRI.tsv.gz --out_path results/ppi

Input: pairs of symbols or Ensembl ids, two per line, with labels 0 and 1 as a third column or in a second file
(`_label` for `_text`), either in three files of a published split or in one; without labels, all pairs are positive and
negative ones are drawn. One file is split by genes: no gene is on two sides. Each embedding gets a linear and a small
non-linear head; both, and their settings, are chosen on the validation genes. All methods are scored on the same pairs.
The baselines are the log-odds of single genes, random vectors and, with --cells_path, what these cells say about genes.
Output: gene_pairs.json, .csv and .png in --out_path.
"""

from dataclasses import dataclass
from typing import Literal

from utils.cli import check_numbers, flag, parse_flags, run_script
from utils.errors import UserError

LOG_ODDS = "log-odds of single genes"


@dataclass
class Flags:
    out_path: str = flag("folder for the results")
    embedding_path: str | None = flag("embeddings to test, .h5ad or word2vec text, separated by commas", None)
    pairs_path: str | None = flag("one file of pairs, which is split here", None)
    train_path: str | None = flag("training pairs of a published split", None)
    valid_path: str | None = flag("validation pairs of a published split", None)
    test_path: str | None = flag("test pairs of a published split", None)
    cells_path: str | None = flag("cells with RNA for the baselines of expression", None)
    split: Literal["genes", "pairs"] = flag("how --pairs_path is split; pairs is for comparison with others", "genes")
    negatives: Literal["degree_matched", "random"] = flag("how negative pairs are drawn", "degree_matched")
    ordered: bool = flag("treat A B and B A as different pairs", False)
    test_fraction: float = flag("share of the genes (or pairs) for the test", 1 / 3)
    val_fraction: float = flag("share of the genes (or pairs) for validation", 1 / 6)
    max_pairs: int = flag("most training pairs for the heads; a random sample of more", 30_000)
    seed: int = flag("random seed of split, negatives, heads and intervals", 0)

    def __post_init__(self):
        check_numbers(self, "test_fraction", "val_fraction", below=1)
        check_numbers(self, "max_pairs", least=10)
        check_numbers(self, "seed", below=2**32)
        published = [self.train_path, self.valid_path, self.test_path]
        if bool(self.pairs_path) == any(published) or (any(published) and not all(published)):
            raise UserError("give either --pairs_path, or all of --train_path, --valid_path and --test_path")
        if self.test_fraction + self.val_fraction >= 1:
            raise UserError("--test_fraction and --val_fraction leave nothing for training; their sum must be below 1")
        if not (self.embedding_path or self.cells_path):
            raise UserError("there is nothing to test; give --embedding_path, --cells_path or both")


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)

    # Slow to import: --help and mistaken flags do not wait for them.
    import numpy as np
    import pandas as pd

    from utils.as_json import to_json
    from utils.cells.gene_values import read_gene_values
    from utils.evaluate import gene_pairs as heads
    from utils.evaluate.comparison import in_words, percentiles
    from utils.evaluate.gene_features import N_COMPONENTS, RANDOM, gene_baselines, random_vectors
    from utils.evaluate.plots import bars
    from utils.features.gene_vectors import GeneVectors, read_gene_vectors
    from utils.features.pairs import number_genes
    from utils.files.write import check_folder

    out = check_folder(flags.out_path)
    rng = np.random.default_rng(flags.seed)
    files, labelled = read_sides(flags)
    sources = {}
    for path in flags.embedding_path.split(",") if flags.embedding_path else ():
        sources[path] = read_gene_vectors(path)
        if sources[path].static is not None:
            sources[f"{path}, static"] = GeneVectors(sources[path].genes, sources[path].static, sources[path].n_cells)
    ours = list(sources)
    if flags.cells_path:
        expression, measured = read_gene_values(flags.cells_path)
        described = gene_baselines(expression, flags.seed)
        sources |= {name: GeneVectors(measured, values) for name, values in described.items() if name != RANDOM}
    numbered, vectors, dropped = number_genes(files, sources, flags.ordered, say=print)
    vectors[RANDOM] = random_vectors(len(next(iter(vectors.values()))), N_COMPONENTS, flags.seed)
    sides = make_sides(numbered, labelled, flags, rng)
    sizes = {side: {"pairs": len(pairs), "positive": int(pairs.y.sum())} for side, pairs in sides.items()}
    for side, pairs in sides.items():
        print(f"{side}: {len(pairs):,} pairs of {len(pairs.genes):,} genes, {pairs.y.mean():.0%} positive")

    scores, chosen, both = fit_all(sides, vectors, flags, rng)
    test = sides["test"]
    drawn = heads.resampled_scores(test, scores, seed=flags.seed)
    table = {}
    for name, (head, val_auroc) in chosen.items():
        auroc, ap = heads.pair_scores(test.y, scores[name])
        (auroc_95, ap_95), values = map(percentiles, drawn[name].T), {"auroc": auroc, "ap": ap}
        table[name] = {"head": head, "val_auroc": val_auroc} | values | {"auroc_95%": auroc_95, "ap_95%": ap_95}
    baselines = {name: row["auroc"] for name, row in table.items() if name not in ours}
    best = max(baselines, key=baselines.get)
    differences = []
    verdict = [] if ours else [f"of the baselines, {best} is best: AUROC {baselines[best]:.3f}"]
    # The embedding that is best on the validation pairs comes first: it is the one that speaks for us.
    for name in sorted(ours, key=lambda name: -table[name]["val_auroc"]):
        low, high = percentiles(drawn[name][:, 0] - drawn[best][:, 0])
        difference = table[name]["auroc"] - baselines[best]
        table[name] |= (found := {"difference": difference, "difference_95%": (low, high)})
        named = {"score": "auroc", "method": name, "baseline": best}
        differences.append(named | {"ours": table[name]["auroc"], "theirs": baselines[best]} | found)
        verdict.append(in_words(name, differences[-1], "AUROC"))
    if flags.pairs_path and flags.split == "pairs":
        verdict.append(
            f"warning: --split pairs has the same genes on all sides, and knowing each gene alone ({LOG_ODDS}) reaches "
            f"AUROC {table[LOG_ODDS]['auroc']:.3f}; only --split genes shows what an embedding knows"
        )

    about = {"flags": vars(flags), "labelled": labelled, "sides": sizes, "dropped": dropped, "verdict": verdict}
    about["differences"] = differences
    out.mkdir(parents=True, exist_ok=True)
    (out / "gene_pairs.json").write_text(to_json(about | {"scores": table, "heads": both}))
    rows = pd.DataFrame(table).T
    rows.to_csv(out / "gene_pairs.csv", index_label="method")
    shown = {name: {"auroc": row["auroc"], "ap": row["ap"]} for name, row in table.items()}
    intervals = {name: {"auroc": row["auroc_95%"], "ap": row["ap_95%"]} for name, row in table.items()}
    bars(shown, out / "gene_pairs.png", f"{len(test):,} test pairs of {len(test.genes):,} genes", intervals)
    print(rows.map(_cell).to_string())
    print("\n".join(verdict))
    print(f"wrote {out}")


def fit_all(sides: dict, vectors: dict, flags: Flags, rng) -> tuple[dict, dict, dict]:
    """Fit all methods on the training pairs, and choose each one's head on the validation pairs.

    Returns
    -------
    scores : method → [n_test]
    chosen : method → its head, and the AUROC of this head on the validation pairs
    both : embedding → head → AUROC on validation and test pairs
    """
    from utils.evaluate.gene_pairs import fit_heads, gene_log_odds, pair_features, pair_scores

    train, val, test = sides["train"], sides["val"], sides["test"]
    n_genes = len(next(iter(vectors.values())))
    val_odds, test_odds = (gene_log_odds(train, pairs, n_genes, flags.ordered) for pairs in (val, test))
    scores, chosen, both = {LOG_ODDS: test_odds}, {LOG_ODDS: ("none", pair_scores(val.y, val_odds)[0])}, {}
    sample = train[rng.permutation(len(train))[: flags.max_pairs]]
    for name, of in vectors.items():
        x = {
            side: pair_features(of[pairs.a], of[pairs.b], flags.ordered)
            for side, pairs in (("train", sample), ("val", val), ("test", test))
        }
        fitted = fit_heads(x, {"train": sample.y, "val": val.y}, flags.seed)
        best = max(fitted, key=lambda head: fitted[head][0])
        scores[name], chosen[name] = fitted[best][1], (best, fitted[best][0])
        both[name] = {head: {"val": auroc, "test": pair_scores(test.y, p)[0]} for head, (auroc, p) in fitted.items()}
    return scores, chosen, both


def read_sides(flags: Flags) -> tuple[dict, bool]:
    """Read the files of pairs: side → pairs ("all" for --pairs_path), and whether they have labels.

    Raises
    ------
    UserError
        If only some files have labels, or a gene is on two sides of a published split.
    """
    import numpy as np

    from utils.features.pairs import read_pairs

    paths = {"train": flags.train_path, "val": flags.valid_path, "test": flags.test_path}
    paths = {"all": flags.pairs_path} if flags.pairs_path else paths
    read = {side: read_pairs(path) for side, path in paths.items()}
    sides, labelled = {side: pairs for side, (pairs, _) in read.items()}, {labels for _, labels in read.values()}
    if len(labelled) > 1:
        raise UserError(f"only some of {', '.join(paths.values())} have labels; give labels with all of them or none")
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")) if len(sides) > 1 else ():
        shared = np.intersect1d(sides[one].genes, sides[other].genes)
        if len(shared):
            raise UserError(
                f"{paths[one]} and {paths[other]} share {len(shared):,} genes ({', '.join(shared[:3])}); give files "
                "that share no gene, or all pairs as --pairs_path"
            )
    return sides, labelled.pop()


def make_sides(numbered: dict, labelled: bool, flags: Flags, rng) -> dict:
    """Split one file, and draw negative pairs where there are no labels: train, val and test → pairs.

    Raises
    ------
    UserError
        If a side has no positive or no negative pairs.
    """
    from utils.features.pairs import add_negatives, split_at_random, split_genes

    negatives = None if labelled else flags.negatives
    shares = flags.test_fraction, flags.val_fraction, rng
    if "all" in numbered and flags.split == "genes":
        # Negative pairs are drawn within each side, from the degrees that genes have there.
        numbered = split_genes(numbered["all"], *shares)
    sides = add_negatives(numbered, negatives, rng, flags.ordered)
    if "all" in sides:
        sides = split_at_random(sides["all"], *shares)
    for side, pairs in sides.items():
        n_positive = int(pairs.y.sum())
        if not 0 < n_positive < len(pairs):
            path = flags.pairs_path or {"train": flags.train_path, "val": flags.valid_path}.get(side, flags.test_path)
            raise UserError(
                f"{path}: of the {side} pairs whose genes have vectors, {n_positive} are positive and "
                f"{len(pairs) - n_positive} negative; give more pairs, or an embedding of more genes"
            )
    return sides


def _cell(value) -> str:
    """A value for the printed table."""
    if isinstance(value, tuple):
        return f"{value[0]:.3f} to {value[1]:.3f}"
    return value if isinstance(value, str) else "" if value != value else f"{value:.3f}"


if __name__ == "__main__":
    run_script(main)
