"""Raw cells → one model-ready file: symbols updated, normalised, peaks in genome order, split, stamped.

    python preprocess.py --data_path cells.h5mu --out_path cells.ready.h5mu \\
        --split_by donor --test_groups D5 --target_sum 1e4

Reads an .h5ad (RNA or ATAC) or an .h5mu (modalities `rna` and `atac`) with raw counts. Writes the same kind of file:
log2-normalised RNA and open peaks in X, the counts in layers["counts"], train/val/test in obs["split"], and the
constants that were used in uns["scmomer"], so that no later stage normalises or splits again.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd

from utils.cli import flag, parse_flags, run_script
from utils.data import prepare
from utils.data.read import STAMP, STAMP_VERSION, read_raw, write_whole
from utils.data.split import SPLITS, assign_split
from utils.errors import UserError
from utils.train.folders import file_hash


@dataclass
class Flags:
    data_path: str = flag("raw counts, .h5ad or .h5mu")
    out_path: str = flag("model-ready file to write, of the same kind")
    label_column: str = flag("column of obs with cell types, if the file has them", "cell_type")
    split_by: str | None = flag("column of obs (donor, batch …) whose groups are split", None)
    test_groups: str | None = flag("values of --split_by, joined by commas, whose cells are test cells", None)
    val_fraction: float = flag("share of each cell type's other cells that is kept for validation", 0.1)
    target_sum: str = flag("counts per cell after scaling: a number, or median (of the training cells)", "1e4")
    species: str = flag("human (symbols are updated), mouse, or auto", "auto")
    seed: int = flag("of the validation cells' draw", 0)


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    file = read_raw(flags.data_path)
    if file.stamp is not None:
        raise UserError(f"{file.path}: is preprocessed already; give it to the training scripts as it is")
    if Path(flags.out_path).suffix != file.path.suffix:
        raise UserError(f"--out_path {flags.out_path}: must end in {file.path.suffix}, like the file that is read")
    if Path(flags.out_path).resolve() == file.path.resolve():
        raise UserError(f"--out_path {flags.out_path}: is the input; name another file")

    counts, names, obs = {}, {}, file.obs.copy()
    for modality, adata in file.modalities.items():
        matrix, features, place = prepare.find_counts(adata, file.path)
        print(f"{modality}: {matrix.shape[0]:,} cells × {matrix.shape[1]:,} features, counts in {place}")
        if modality == "rna":
            matrix, features, report = prepare.harmonise_genes(matrix, features, flags.species)
            species = report["species"]
            print("  " + ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in report.items()))
        else:
            matrix, features = prepare.sort_peaks(matrix, features, adata.var if place != "raw" else None)
            print(f"  peaks in genome order: {features[0]} … {features[-1]}")
        measured = np.asarray(matrix.sum(1)).ravel() > 0
        if not measured.all():
            print(f"  {(~measured).sum():,} cells without a single count are left out")
        counts[modality] = pd.Series(np.arange(len(adata)), adata.obs_names)[measured], matrix
        names[modality] = features

    obs = obs.loc[obs.index.isin(np.concatenate([rows.index for rows, _ in counts.values()]))]
    if flags.label_column not in obs and flags.label_column != "cell_type":
        raise UserError(
            f"--label_column {flags.label_column}: no such column; obs has {', '.join(map(str, obs.columns))}"
        )
    groups = [group.strip() for group in flags.test_groups.split(",")] if flags.test_groups else None
    obs["split"] = assign_split(obs, flags.val_fraction, flags.seed, flags.split_by, groups, flags.label_column)
    stamp = {
        "version": STAMP_VERSION,
        "log_base": prepare.LOG_BASE,
        "label_column": flags.label_column if flags.label_column in obs else None,
        "source": {"name": file.path.name, "sha256": file_hash(file.path)},
        "split": {name: getattr(flags, name) for name in ("split_by", "test_groups", "val_fraction", "seed")},
    }
    modalities = {}
    for modality, (rows, matrix) in counts.items():
        matrix = matrix[rows.to_numpy()]
        if modality == "rna":
            training = (obs["split"].loc[rows.index] != "test").to_numpy()
            totals = np.asarray(matrix.sum(1)).ravel()[training]
            stamp |= {"target_sum": prepare.choose_target_sum(flags.target_sum, totals), "species": species}
            values = prepare.log_normalise(matrix, stamp["target_sum"])
        else:
            values = prepare.binarise(matrix)
        modalities[modality] = ad.AnnData(
            values, obs.loc[rows.index], pd.DataFrame(index=names[modality]), layers={"counts": matrix}
        )
    if file.path.suffix == ".h5ad":
        (out,) = modalities.values()
    else:
        out = mudata.MuData(modalities)
        out.obs = obs.loc[out.obs_names]
    out.uns[STAMP] = json.dumps(stamp)
    write_whole(out, flags.out_path)
    sizes = ", ".join(f"{(obs['split'] == split).sum():,} {split}" for split in SPLITS)
    print(f"wrote {flags.out_path}: {len(obs):,} cells ({sizes})" + _labels(obs, stamp["label_column"]))


def _short(value) -> str:
    """A list by its length and first members, a number with separators."""
    if isinstance(value, list):
        return f"{len(value)}" + (f" ({', '.join(value[:5])}{', …' if len(value) > 5 else ''})" if value else "")
    return f"{value:,}" if isinstance(value, int) else str(value)


def _labels(obs: pd.DataFrame, column: str | None) -> str:
    return f", {obs[column].nunique()} cell types in {column}" if column else ", no cell types"


if __name__ == "__main__":
    run_script(main)
