"""Gene property: can an embedding of genes tell classes of genes apart, better than features without a model?

    python -m downstream.gene_property --lists dosage_sens_tf_labels.csv --embedding_path genes.h5ad \
        --data_path cells.h5ad --out_path results/dosage

Input: gene lists, either one .csv or .tsv with a class per column, or text files with a class each, separated by commas
(symbols or Ensembl ids; a single list is compared with all other genes); and an embedding from get_latent_emb.py --what
genes, or any word2vec text. With --data_path, simple features of the genes in these cells stand beside it. Logistic
regression and a random forest are scored in repeated, shuffled, stratified folds over genes; all rows have the same
genes and folds. Output: gene_property.json, .csv and .png in --out_path, and predicted.csv with --predict_all.
"""

from dataclasses import dataclass
from pathlib import Path

from utils.cli import check_numbers, flag, parse_flags, run_script
from utils.errors import UserError


@dataclass
class Flags:
    lists: str = flag("gene lists: a .csv or .tsv with a class per column, or a,b,… with a text file per class")
    embedding_path: str = flag("embedding of genes to test, .h5ad or word2vec text")
    out_path: str = flag("folder for the results")
    others: str | None = flag("more embeddings to compare with (gene2vec …), separated by commas", None)
    data_path: str | None = flag("cells with RNA for the baselines; without it, only random vectors are compared", None)
    folds: int = flag("number of folds", 5)
    repeats: int = flag("how often the folds are drawn anew", 10)
    seed: int = flag("random seed of folds, forests and random vectors", 0)
    predict_all: bool = flag("also rank all genes of the embedding that are in no list", False)

    def __post_init__(self):
        check_numbers(self, "folds", "repeats", least=2)
        check_numbers(self, "seed", below=2**20)


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)

    # Slow to import: --help and mistaken flags do not wait for them.
    import numpy as np
    import pandas as pd

    from utils.as_json import to_json
    from utils.cells.gene_values import read_gene_values
    from utils.cells.reference import read_gene_lists
    from utils.evaluate import gene_classes
    from utils.evaluate.gene_classes import CLASSIFIERS, MEASURES
    from utils.evaluate.gene_features import RANDOM, gene_baselines, random_vectors
    from utils.evaluate.plots import bars
    from utils.features.gene_vectors import GeneVectors, read_gene_vectors
    from utils.files.write import check_folder

    out = check_folder(flags.out_path)
    embedding = read_gene_vectors(flags.embedding_path)
    genes, y, names = label_genes(read_gene_lists(flags.lists, "--lists"), embedding, flags)
    ours = Path(flags.embedding_path).name
    sources = {ours: embedding}
    if embedding.static is not None:
        sources[f"{ours}, static"] = GeneVectors(embedding.genes, embedding.static)
    for path in flags.others.split(",") if flags.others else ():
        sources[path] = read_gene_vectors(path)
    if flags.data_path:
        expression, measured = read_gene_values(flags.data_path)
        baselines = gene_baselines(expression, flags.seed)
        sources |= {name: GeneVectors(measured, values) for name, values in baselines.items() if name != RANDOM}

    looked_up = {name: source.of(genes) for name, source in sources.items()}
    in_all = np.logical_and.reduce([found for _, found in looked_up.values()])
    genes, y = genes[in_all], y[in_all]
    sizes = dict(zip(names, np.bincount(y, minlength=len(names)).tolist(), strict=True))
    print(f"{len(genes):,} genes that all embeddings have: " + ", ".join(f"{n:,} {name}" for name, n in sizes.items()))
    small = [f"{name} ({n})" for name, n in sizes.items() if n < flags.folds]
    if small:
        raise UserError(
            f"--lists {flags.lists}: {', '.join(small)} has fewer genes in the embedding than --folds {flags.folds}; "
            "give longer lists, an embedding of more genes, or fewer folds"
        )
    features = {name: vectors[in_all] for name, (vectors, _) in looked_up.items()}
    features[RANDOM] = lambda repeat: random_vectors(len(genes), embedding.width, flags.seed * 1_000 + repeat)

    scores = {
        (name, classifier): gene_classes.repeated_folds(x, y, flags.folds, flags.repeats, flags.seed, classifier)
        for classifier in CLASSIFIERS
        for name, x in features.items()
    }
    table = {f"{name}, {classifier}": gene_classes.summary(values) for (name, classifier), values in scores.items()}
    chance = gene_classes.random_interval(y, embedding.width, flags.folds, flags.seed)
    sentences = [f"random vectors reach an AUROC from {chance[0]:.3f} to {chance[1]:.3f} (95%)"]
    differences = []
    for classifier in CLASSIFIERS:
        aurocs = {name: scores[name, classifier]["auroc"] for name in features if name != f"{ours}, static"}
        differences.append({"score": f"auroc, {classifier}"} | gene_classes.difference(ours, aurocs))
        sentences.append(f"{classifier}: {gene_classes.compare(ours, differences[-1], chance[1])}")
    if chance[1] > gene_classes.WIDE:
        few = f"{len(genes):,} genes are too few for a test"
        sentences.append(f"warning: {few}; an AUROC below {chance[1]:.3f} may be chance")

    out.mkdir(parents=True, exist_ok=True)
    rows = pd.DataFrame(table).T
    rows.to_csv(out / "gene_property.csv", index_label="method")
    about = {"lists": flags.lists, "embedding": flags.embedding_path, "classes": sizes, "seed": flags.seed}
    about |= {
        "folds": flags.folds,
        "repeats": flags.repeats,
        "random_auroc_95%": chance,
        "verdict": sentences,
        "differences": differences,
    }
    (out / "gene_property.json").write_text(to_json(about | {"scores": table}))
    shown = {name: {text: row[measure] for measure, text in MEASURES.items()} for name, row in table.items()}
    intervals = {name: {text: row[f"{m}_95%"] for m, text in MEASURES.items()} for name, row in table.items()}
    bars(shown, out / "gene_property.png", f"{' / '.join(names)}, {len(genes):,} genes", intervals)
    print(rows.map(lambda v: f"{v:.3f}" if isinstance(v, float) else f"{v[0]:.3f} to {v[1]:.3f}").to_string())
    print("\n".join(sentences))
    if flags.predict_all:
        listed = np.isin(embedding.genes, genes)
        known = embedding.n_cells > 0 if embedding.n_cells is not None else np.ones(len(embedding), dtype=bool)
        ranked = gene_classes.rank_genes(features[ours], y, embedding.vectors[~listed & known], names, flags.seed)
        ranked.insert(0, "gene", embedding.genes[~listed & known])
        ranked.sort_values(ranked.columns[-1], ascending=False).to_csv(out / "predicted.csv", index=False)
    print(f"wrote {out}")


def label_genes(classes: dict, embedding, flags: Flags) -> tuple:
    """Find the genes of the lists in the embedding, without those in two lists.

    Returns
    -------
    genes : [genes] names of the embedding
    y : [genes] class numbers
    names : the classes; the second is `all other genes` if there is one list
    """
    import numpy as np

    seen = np.ones(len(embedding), dtype=bool) if embedding.n_cells is None else embedding.n_cells > 0
    found = {name: np.unique(embedding.rows(genes)) for name, genes in classes.items()}
    found = {name: rows[(rows >= 0) & seen[rows]] for name, rows in found.items()}
    for name, rows in found.items():
        print(f"{name}: {len(rows):,} of {len(set(classes[name])):,} genes have a vector")
    if not any(len(rows) for rows in found.values()):
        raise UserError(
            f"{flags.embedding_path}: has none of the genes of --lists {flags.lists}; give lists and an embedding of "
            "the same species, by symbols or Ensembl ids"
        )
    if len(found) == 1:
        (rows,) = found.values()
        found["all other genes"] = np.setdiff1d(np.flatnonzero(seen), rows)
    rows, y = np.concatenate(list(found.values())), np.repeat(np.arange(len(found)), [len(r) for r in found.values()])
    once = np.bincount(rows, minlength=len(embedding))[rows] == 1
    if not once.all():
        print(f"{len(np.unique(rows[~once])):,} genes are in two lists and are left out")
    return embedding.genes[rows[once]], y[once], list(found)


if __name__ == "__main__":
    run_script(main)
