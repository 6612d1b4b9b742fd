"""The steps with which preprocess.py makes a model-ready file from an opened raw file."""

import json
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from utils.cells.ingest import Ingested
from utils.cells.labels import check_labels, without_no_types
from utils.cells.preprocessed import KNOWN, STAMP, STAMP_VERSION, RawFile, barcodes_hash
from utils.cells.split import types_that_lack_cells
from utils.errors import UserError
from utils.features.normalise import LOG_BASE, choose_target_sum, model_values
from utils.files.cell_hashes import cell_hashes
from utils.files.file_hash import file_hash
from utils.files.write import write_in_blocks

Split = Callable[[pd.DataFrame], np.ndarray]
"""Assigns cells to train, val or test, given their annotation; raises UserError if the flags do not fit it."""


def check_before_reading(file: RawFile, label_column: str, any_labels: bool, target_sum: str, split: Split) -> None:
    """Raise an error for mistaken flags before the counts are read, which takes minutes for a large file.

    Parameters
    ----------
    file : the opened file
    label_column, any_labels, target_sum : the flags of preprocess.py
    split : assigns each cell to train, val or test

    Raises
    ------
    UserError
        If the file is preprocessed already, or a flag does not fit it.
    """
    if file.stamp is not None:
        raise UserError(f"{file.path}: is preprocessed already; give it to the training scripts as it is")
    check_labels(file.obs, label_column, file.path, any_labels)
    split(file.obs)
    choose_target_sum(target_sum, np.ones(1))  # the totals do not matter here, only whether the flag is valid


def measured_cells(obs: pd.DataFrame, by_modality: dict[str, list[Ingested]]) -> pd.DataFrame:
    """Return a copy of `obs` that holds only cells with a count in at least one modality."""
    barcodes = [_measured_barcodes(parts) for parts in by_modality.values()]
    return obs.loc[obs.index.isin(np.concatenate(barcodes))].copy()


def _measured_barcodes(parts: list[Ingested]) -> np.ndarray:
    """Barcodes of the cells with counts in a modality, file by file."""
    return np.concatenate([part.barcodes[part.measured] for part in parts])


def assign_cells(obs: pd.DataFrame, split: Split, label_column: str) -> list[str]:
    """Write the split into obs["split"], and set labels that name no cell type (such as `unassigned`) to missing.

    Parameters
    ----------
    obs : [cells] annotation, changed in place
    split : assigns each cell to train, val or test
    label_column : column of `obs` with cell types, if it exists

    Returns
    -------
    Notices for the user, a line each
    """
    notices = []
    if "split" in obs:
        notices.append("obs['split'] was there already: it is kept as obs['split_before']")
        obs["split_before"] = obs["split"]
    obs["split"] = split(obs)
    if label_column in obs:
        obs[label_column] = without_no_types(obs[label_column])
        notices += types_that_lack_cells(obs[label_column], obs["split"].to_numpy())
    return notices


def make_stamp(
    file: RawFile,
    by_modality: dict[str, list[Ingested]],
    obs: pd.DataFrame,
    label_column: str,
    target_sum: str,
    split_flags: dict,
) -> dict:
    """Record how the cells were preprocessed, so that later stages and predictions use the same constants.

    Parameters
    ----------
    file : the raw cells
    by_modality : modality → what was ingested of each file
    obs : [cells] annotation of the cells that are written, with their split
    label_column, target_sum : the flags of preprocess.py
    split_flags : name → value of the flags that determine the split

    Returns
    -------
    The stamp, which can be written as JSON
    """
    stamp = {
        "version": STAMP_VERSION,
        "log_base": LOG_BASE,
        "label_column": label_column if label_column in obs else None,
        "source": [{"name": path.name, "sha256": file_hash(path)} for path in file.paths],
        "split": split_flags,
        "simulated": file.simulated,
    }
    if "rna" in by_modality:
        rna = by_modality["rna"]
        is_train = (obs.loc[_measured_barcodes(rna), "split"] == "train").to_numpy()
        totals = np.concatenate([part.totals[part.measured] for part in rna])
        stamp["target_sum"] = choose_target_sum(target_sum, totals[is_train])
        species = [part.alignment.genes.species for part in rna]
        stamp["species"] = next((name for name in species if name in ("human", "mouse")), species[0])
    if "atac" in by_modality:
        stamp["genome"] = by_modality["atac"][0].genome
    return stamp


def write_ready(path: str | Path, by_modality: dict[str, list[Ingested]], obs: pd.DataFrame, stamp: dict) -> None:
    """Write the model-ready file, a block of cells at a time: model values in X, counts in layers["counts"].

    A hash of each cell's values, and the sums of the training cells, are written to uns, so that a run which starts or
    resumes need not read all values for them.

    Parameters
    ----------
    path : .h5ad for one modality, .h5mu for two
    by_modality : modality → what was ingested of each file, with the same features; the files are written in order
    obs : [cells] annotation of the cells to write
    stamp : as `make_stamp` returns it

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    frames = {
        modality: ad.AnnData(
            obs=obs.loc[_measured_barcodes(parts)],
            var=pd.DataFrame(index=parts[0].alignment.features),
        )
        for modality, parts in by_modality.items()
    }
    joint = obs.index
    for parts in by_modality.values():
        joint = joint.intersection(_measured_barcodes(parts), sort=False)
    train = joint[(obs.loc[joint, "split"] == "train").to_numpy()]
    known: dict = {"train_cells": barcodes_hash(train)}
    with write_in_blocks(path, frames, obs, {STAMP: json.dumps(stamp)}) as out:
        for modality, parts in by_modality.items():
            hashes, total, start = [], np.zeros(len(parts[0].alignment.features)), 0
            is_train = frames[modality].obs_names.isin(train)
            # Only whole counts are written to layers["counts"], not estimated counts or proportions of a total.
            exact = all(part.values.exact for part in parts)
            # Integers compress better than floats; 32 bits unless a cell has more counts than fit.
            largest = max(part.totals.max(initial=0) for part in parts)
            whole = np.int32 if largest < 2**31 else np.int64
            for part in parts:
                for counts in part.blocks(keep=part.measured, progress=True):
                    layers = {"counts": counts.astype(whole)} if exact else {}
                    values = model_values(modality, counts, stamp.get("target_sum"))
                    out.append(modality, X=values, **layers)
                    hashes.append(cell_hashes(values))
                    rows = is_train[start : start + values.shape[0]]
                    total += np.asarray(values[rows].sum(0, dtype=np.float64)).ravel()
                    start += values.shape[0]
            known[modality] = {"hashes": np.concatenate(hashes), "train_sum": total}
        out.add_uns(KNOWN, known)
