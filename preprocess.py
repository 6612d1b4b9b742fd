"""Raw cells → one model-ready file: genes named, counts normalised, peaks in genome order, cells split, stamped.

    python preprocess.py --data_path cells.h5ad --check
    python preprocess.py --data_path cells.h5mu --out_path cells.ready.h5mu \\
        --split_by donor --test_groups D5 --target_sum 1e4
    python preprocess.py --rna_path rna.h5ad --atac_path atac.h5ad --out_path cells.ready.h5mu
    python preprocess.py --data_path a.h5ad,b.h5ad --out_path both.ready.h5ad --split_by batch --test_groups b

Reads .h5ad, .h5mu, 10x .h5 and matrix folders, .loom and delimited text: RNA, ATAC or both. Finds the counts, updates
gene symbols, and reports what was found, changed and left out; with --check it only reports. Writes .h5ad (one
modality) or .h5mu (two): log2-normalised RNA and open peaks in X, counts in layers["counts"], train, val or test in
obs["split"], and the constants of the preprocessing in uns["scmomer"], so that no later stage normalises or splits
again. .h5ad and .h5mu files are read in blocks of cells, so they may be larger than memory; 10x, .loom and text files
are read whole. Several files with RNA are joined: all their cells,
the union of their genes (0 where a file lacks a gene), and the name of each cell's file in obs["batch"].
"""

import sys
from dataclasses import dataclass
from functools import partial

from utils.cells.config import IngestConfig
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError


@dataclass
class Flags:
    data_path: str | None = flag(
        "raw cells: .h5ad, .h5mu, 10x .h5 or folder, .loom, .csv or .tsv; several RNA files, separated by commas", None
    )
    rna_path: str | None = flag("RNA of paired cells in a file of its own; give --atac_path too", None)
    atac_path: str | None = flag("ATAC of these cells; the two files are joined by barcode", None)
    out_path: str | None = flag("model-ready file to write: .h5ad for one modality, .h5mu for two", None)
    check: bool = flag("only report what the cells are and what would be done; write nothing", False)
    json: bool = flag("like --check, but print JSON", False)
    gene_reference: str | None = flag(
        "genes to align to: a model folder, a text file or an .h5ad; by default all genes", None
    )
    batch_column: str = flag("column of obs that gets the name of each cell's file, if several are joined", "batch")
    label_column: str = flag("column of obs with cell types, if the file has them", "cell_type")
    split_by: str | None = flag(
        "column of obs (donor, batch …) that --test_groups refers to; its groups stay whole", None
    )
    test_groups: str | None = flag("values of --split_by, separated by commas, whose cells are test cells", None)
    val_fraction: float = flag("share of each cell type's remaining cells that is kept for validation", 0.1)
    target_sum: str = flag("counts per cell after scaling: a number, or median (of the training cells)", "1e4")
    shuffle_pairs: str | None = flag(
        "a control: exchange the ATAC of training and validation cells within this column of obs (batch, donor), among "
        "cells of similar depth; what a model loses by it is what real pairs are worth",
        None,
    )
    any_labels: bool = flag("accept --label_column even if it holds numbers or mostly unique names", False)
    seed: int = flag("random seed for choosing validation cells", 0)


def main() -> None:
    flags, config = parse_flags(__doc__, Flags, IngestConfig)

    # These are slow to import: --help and mistaken flags do not wait for them.
    from utils.cells.ingest import ingest, not_copied
    from utils.cells.inspect import coarse_bins, examine
    from utils.cells.join import join_genes, open_files
    from utils.cells.labels import check_labels
    from utils.cells.model_ready import assign_cells, check_before_reading, make_stamp, measured_cells, write_ready
    from utils.cells.reference import read_reference
    from utils.cells.shuffled import shuffle_pairs
    from utils.cells.split import SPLITS, assign_split
    from utils.files.write import check_target

    inputs = (flags.data_path, flags.rna_path, flags.atac_path)
    reference = read_reference(flags.gene_reference) if flags.gene_reference else {}
    labels = {"label_column": flags.label_column, "any_labels": flags.any_labels}
    split_flags = {name: getattr(flags, name) for name in ("split_by", "test_groups", "val_fraction", "seed")}
    split = partial(assign_split, label_column=flags.label_column, **split_flags)

    if flags.check or flags.json:
        more = {"target_sum": flags.target_sum, "batch_column": flags.batch_column, **labels}
        found = examine(inputs, config, reference, split=split, **more)
        print(found.text(as_json=flags.json))
        sys.exit(2 if found.problems else 0)

    with open_files(*inputs, flags.batch_column) as file:
        check_target(flags.out_path, file.suffix, file.inputs)
        print_lines(file.notes)
        check_before_reading(file, split=split, target_sum=flags.target_sum, **labels)
        if flags.shuffle_pairs and len(file.sources) < 2:
            raise UserError(f"--shuffle_pairs {flags.shuffle_pairs}: {file.path} has no paired ATAC; leave it out")

        # Find the counts, and match the file's genes and peaks to those that are written.
        by_modality = {}
        for modality, sources in file.sources.items():
            parts = []
            for source in sources:
                parts.append(ingest(source, config, reference.get(modality), progress=True))
                print_lines([f"{source.path}:"] if len(sources) > 1 else [])
                print_lines(parts[-1].report() + not_copied(source))
            by_modality[modality], lines = join_genes(parts)
            print_lines(lines)

        # Keep the cells that have counts. Each is train, val or test from now on.
        obs = measured_cells(file.obs, by_modality)
        found_labels = check_labels(obs, flags.label_column, file.path, flags.any_labels)
        print_lines(assign_cells(obs, split, flags.label_column))
        if flags.shuffle_pairs:
            by_modality["atac"] = [shuffle_pairs(by_modality["atac"][0], obs, flags.shuffle_pairs, flags.seed)]
            print(f"control: ATAC exchanged among training and among validation cells within {flags.shuffle_pairs}")

        # Normalise with constants that are recorded in the stamp.
        stamp = make_stamp(file, by_modality, obs, flags.label_column, flags.target_sum, split_flags)
        stamp |= {"shuffled_pairs": flags.shuffle_pairs} if flags.shuffle_pairs else {}
        if "rna" in by_modality:
            print_lines(f"note: {advice}" for advice in coarse_bins(by_modality["rna"], stamp["target_sum"]))
        write_ready(flags.out_path, by_modality, obs, stamp)

    sizes = ", ".join(f"{(obs['split'] == part).sum():,} {part}" for part in SPLITS)
    print(f"wrote {flags.out_path}: {len(obs):,} cells ({sizes}), {found_labels}")


def print_lines(lines) -> None:
    """Print each line, if there are any."""
    for line in lines:
        print(line)


if __name__ == "__main__":
    run_script(main)
