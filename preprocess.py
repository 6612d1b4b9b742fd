"""Raw cells → one model-ready file: genes named, normalised, peaks in genome order, split, stamped.

    python preprocess.py --data_path cells.h5ad --check
    python preprocess.py --data_path cells.h5mu --out_path cells.ready.h5mu \\
        --split_by donor --test_groups D5 --target_sum 1e4
    python preprocess.py --rna_path rna.h5ad --atac_path atac.h5ad --out_path cells.ready.h5mu

Reads .h5ad, .h5mu, 10x .h5 and matrix folders, .loom and delimited text: RNA, ATAC or both. Finds the counts, names the
genes by current symbols, and reports what was found, done and lost; with --check it reports, and writes nothing. Writes
.h5ad (one modality) or .h5mu (two): log2-normalised RNA and open peaks in X, the counts in layers["counts"],
train/val/test in obs["split"], and the constants that were used in uns["scmomer"], so that no later stage normalises or
splits again. Files of any size are read and written in blocks.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.cells.config import IngestConfig
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from utils.cells.preprocessed import RawFile


@dataclass
class Flags:
    data_path: str | None = flag("raw cells: .h5ad, .h5mu, 10x .h5 or folder, .loom, .csv or .tsv", None)
    rna_path: str | None = flag("instead of --data_path, RNA of paired cells in a file of its own", None)
    atac_path: str | None = flag("and their ATAC; the two are joined by barcode", None)
    out_path: str | None = flag("model-ready file to write: .h5ad for one modality, .h5mu for two", None)
    check: bool = flag("only examine the cells: print what is in them and what would be done, write nothing", False)
    json: bool = flag("like --check, but print JSON", False)
    gene_reference: str | None = flag("genes to align to: a model folder, a text file or an .h5ad; else all", None)
    label_column: str = flag("column of obs with cell types, if the file has them", "cell_type")
    split_by: str | None = flag("column of obs (donor, batch …) whose groups are split", None)
    test_groups: str | None = flag("values of --split_by, joined by commas, whose cells are test cells", None)
    val_fraction: float = flag("share of each cell type's other cells that is kept for validation", 0.1)
    target_sum: str = flag("counts per cell after scaling: a number, or median (of the training cells)", "1e4")
    any_labels: bool = flag("take --label_column as cell types even if they are numbers or mostly single cells", False)
    seed: int = flag("random seed for choosing validation cells", 0)


def main() -> None:
    flags, config = parse_flags(__doc__, Flags, IngestConfig)

    # Slow to import: --help and mistaken flags do not wait for them.
    from utils.cells.inspect import examine
    from utils.cells.preprocessed import open_cells
    from utils.cells.reference import read_reference
    from utils.files.write import check_target

    reference = read_reference(flags.gene_reference) if flags.gene_reference else {}
    inputs = (flags.data_path, flags.rna_path, flags.atac_path)
    if flags.check or flags.json:
        labels = {"label_column": flags.label_column, "any_labels": flags.any_labels}
        split = lambda obs: split_cells(obs, flags)
        found = examine(inputs, config, reference, split=split, target_sum=flags.target_sum, **labels)
        print(found.text(as_json=flags.json))
        sys.exit(2 if found.problems else 0)

    with open_cells(*inputs) as file:
        check_target(flags.out_path, file.suffix, inputs)
        preprocess(file, flags, config, reference)


def split_cells(obs: pd.DataFrame, flags: Flags) -> np.ndarray:
    """[cells] train, val or test."""
    from utils.cells.split import assign_split

    groups = [group.strip() for group in flags.test_groups.split(",")] if flags.test_groups else None
    return assign_split(obs, flags.val_fraction, flags.seed, flags.split_by, groups, flags.label_column)


def preprocess(file: RawFile, flags: Flags, config: IngestConfig, reference: dict[str, np.ndarray]) -> None:
    """Read `file`, write `flags.out_path`, and report what is done."""
    import anndata as ad
    import numpy as np
    import pandas as pd

    from utils.cells.ingest import ingest, not_carried
    from utils.cells.inspect import coarse_bins
    from utils.cells.labels import check_labels, without_no_types
    from utils.cells.preprocessed import STAMP, STAMP_VERSION
    from utils.cells.split import SPLITS, types_that_lack_cells
    from utils.features import normalise as prepare
    from utils.files.write import write_in_blocks
    from utils.train.folders import file_hash

    # What is there: modalities, counts, genes, peaks, labels.
    if file.stamp is not None:
        raise UserError(f"{file.path}: is preprocessed already; give it to the training scripts as it is")
    for note in file.notes:
        print(note)
    # Mistaken flags stop the run before the file is passed over.
    check_labels(file.obs, flags.label_column, file.path, flags.any_labels)
    split_cells(file.obs, flags)
    prepare.choose_target_sum(flags.target_sum, np.ones(1))
    ingested = {}
    for name, source in file.modalities.items():
        ingested[name] = ingest(source, config, reference.get(name), progress=True)
        print("\n".join(ingested[name].report() + not_carried(source)))

    # Which cells: those with counts, each in one part of the split, which no later stage changes.
    barcodes = {name: intake.barcodes[intake.measured] for name, intake in ingested.items()}
    obs = file.obs.loc[file.obs.index.isin(np.concatenate(list(barcodes.values())))].copy()
    labels = check_labels(obs, flags.label_column, file.path, flags.any_labels)
    if "split" in obs:
        print("obs['split'] was there already: it is kept as obs['split_before']")
        obs["split_before"] = obs["split"]
    obs["split"] = split_cells(obs, flags)
    if flags.label_column in obs:
        obs[flags.label_column] = without_no_types(obs[flags.label_column])
        for line in types_that_lack_cells(obs[flags.label_column], obs["split"].to_numpy()):
            print(line)
    stamp = {
        "version": STAMP_VERSION,
        "log_base": prepare.LOG_BASE,
        "label_column": flags.label_column if flags.label_column in obs else None,
        "source": [{"name": path.name, "sha256": file_hash(path)} for path in file.paths],
        "split": {name: getattr(flags, name) for name in ("split_by", "test_groups", "val_fraction", "seed")},
        "simulated": file.simulated,
    }
    if "rna" in ingested:
        totals = ingested["rna"].totals[ingested["rna"].measured][
            (obs.loc[barcodes["rna"], "split"] == "train").to_numpy()
        ]
        stamp["target_sum"] = prepare.choose_target_sum(flags.target_sum, totals)
        for line in coarse_bins(ingested["rna"], stamp["target_sum"]):
            print(f"note: {line}")
        stamp["species"] = ingested["rna"].alignment.genes.species
    if "atac" in ingested:
        stamp["genome"] = ingested["atac"].genome

    # What the models read, a block of cells at a time.
    parts = {
        name: ad.AnnData(obs=obs.loc[barcodes[name]], var=pd.DataFrame(index=intake.alignment.features))
        for name, intake in ingested.items()
    }
    with write_in_blocks(flags.out_path, parts, obs, {STAMP: json.dumps(stamp)}) as out:
        for name, intake in ingested.items():
            for counts in intake.blocks(keep=intake.measured, progress=True):
                is_rna = name == "rna"
                values = prepare.log_normalise(counts, stamp["target_sum"]) if is_rna else prepare.binarise(counts)
                out.append(name, X=values, **({"counts": counts} if intake.values.exact else {}))
    sizes = ", ".join(f"{(obs['split'] == split).sum():,} {split}" for split in SPLITS)
    print(f"wrote {flags.out_path}: {len(obs):,} cells ({sizes}), {labels}")


if __name__ == "__main__":
    run_script(main)
