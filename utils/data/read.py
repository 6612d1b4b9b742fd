"""Reading files: raw ones as a user has them, and stamped ones as `preprocess.py` leaves them."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix, issparse

from models.minibatch import MODALITIES
from utils.data.peaks import looks_like_peaks
from utils.errors import UserError

mudata.set_options(pull_on_update=False)

STAMP = "scmomer"
STAMP_VERSION = 1


@dataclass
class RawFile:
    """A file as it lies on disk.

    Attributes
    ----------
    path : where
    modalities : modality → AnnData
    obs : annotation of all cells, the file's own and the modalities' columns
    stamp : what preprocessing left in it, or None
    content : the file itself
    """

    path: Path
    modalities: dict[str, ad.AnnData]
    obs: pd.DataFrame
    stamp: dict | None
    content: ad.AnnData | mudata.MuData


def read_raw(path: str | Path) -> RawFile:
    """Read an .h5ad (one modality, told by its feature names) or an .h5mu (modalities `rna` and `atac`).

    Raises
    ------
    UserError
        If the file cannot be read, or holds neither modality.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix not in (".h5ad", ".h5mu"):
        raise UserError(f"{path}: only .h5ad and .h5mu files are read; convert it with scanpy or muon first")
    try:
        file = ad.read_h5ad(path) if path.suffix == ".h5ad" else mudata.read_h5mu(path)
    except Exception as error:  # whatever a reader trips over, the file is what is wrong
        raise UserError(f"{path}: not a readable {path.suffix} file ({_first_line(error)}); write it anew") from error
    if isinstance(file, ad.AnnData):
        modalities = {"atac" if looks_like_peaks(file.var_names) else "rna": file}
    else:
        modalities = {name: file.mod[name] for name in MODALITIES if name in file.mod}
        if not modalities:
            raise UserError(f"{path}: has no modality named rna or atac, only {', '.join(file.mod)}; rename them")
    obs = file.obs
    for name, adata in modalities.items():
        if not adata.obs_names.is_unique:
            raise UserError(f"{path}: barcodes of {name} are not unique; run obs_names_make_unique() first")
        obs = _fill(obs, adata.obs)
    return RawFile(path, modalities, obs, json.loads(file.uns[STAMP]) if STAMP in file.uns else None, file)


def _fill(obs: pd.DataFrame, more: pd.DataFrame) -> pd.DataFrame:
    """Add columns, and values where there were none, from the annotation of some of the cells."""
    obs = obs.copy()
    for column in more:
        values = more[column].astype(object).reindex(obs.index)
        obs[column] = obs[column].astype(object).where(obs[column].notna(), values) if column in obs else values
        obs[column] = obs[column].infer_objects()
        if isinstance(more[column].dtype, pd.CategoricalDtype):
            obs[column] = obs[column].astype("category")
    return obs


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


@dataclass
class Cells:
    """Model-ready cells, all measured in every modality that is there.

    Attributes
    ----------
    path : the file they come from
    obs : [cells] annotation, barcodes as index; `split` says train, val or test
    values : modality → [cells, features] float32 CSR; log-normalised RNA, open peaks
    features : modality → names of genes or peaks
    stamp : constants of the preprocessing
    """

    path: Path
    obs: pd.DataFrame
    values: dict[str, csr_matrix]
    features: dict[str, np.ndarray]
    stamp: dict

    def rows(self, split: str) -> np.ndarray:
        """Positions of the cells of a split."""
        return np.flatnonzero(self.obs["split"].to_numpy() == split)

    def labels(self, column: str | None = None) -> pd.Series | None:
        """The label column (default: the one the file was stamped with) as strings, missing ones as NaN, or None."""
        column = column or self.stamp.get("label_column")
        if column not in self.obs:
            return None
        labels = self.obs[column]
        return labels.astype(str).where(labels.notna() & (labels.astype(str) != ""))

    def train_mean(self, modality: str) -> torch.Tensor:
        """[features] float32 mean of a modality's values over the training cells."""
        total = np.asarray(self.values[modality][self.rows("train")].mean(0), dtype=np.float32).ravel()
        return torch.from_numpy(total)

    def label_codes(self) -> np.ndarray | None:
        """[cells] int64 number of each cell's type, -1 where unknown; None when the file has no labels."""
        labels = self.labels()
        return None if labels is None else pd.factorize(labels)[0].astype(np.int64)


def to_csr(matrix) -> csr_matrix:
    """Any matrix as float32 CSR with sorted indices."""
    csr = csr_matrix(matrix, dtype=np.float32) if not issparse(matrix) else matrix.tocsr().astype(np.float32)
    csr.sort_indices()
    return csr


def read_cells(path: str | Path, modalities: tuple[str, ...]) -> Cells:
    """Read a stamped file, keeping the cells measured in all of `modalities`.

    Raises
    ------
    UserError
        If the file is missing, not stamped, or lacks a modality; the message holds the command to run.
    """
    file = read_raw(path)
    path, raw = file.path, file.modalities
    if file.stamp is None:
        ready = path.with_name(f"{path.stem}.ready{path.suffix}")
        raise UserError(
            f"{path}: has not been preprocessed; run python preprocess.py --data_path {path} --out_path {ready}"
        )
    if file.stamp["version"] != STAMP_VERSION:
        raise UserError(f"{path}: was preprocessed by another version; run preprocess.py on the raw file again")
    absent = [name for name in modalities if name not in raw]
    if absent:
        raise UserError(f"{path}: holds {' and '.join(raw)} only, but this stage needs {' and '.join(modalities)}")
    barcodes = raw[modalities[0]].obs_names
    for name in modalities[1:]:
        barcodes = barcodes[barcodes.isin(raw[name].obs_names)]
    if not len(barcodes):
        raise UserError(f"{path}: no cell was measured in both {' and '.join(modalities)}")
    chosen = {name: raw[name][barcodes] for name in modalities}
    return Cells(
        path=path,
        obs=file.obs.loc[barcodes],
        values={name: to_csr(adata.X) for name, adata in chosen.items()},
        features={name: adata.var_names.to_numpy().astype(str) for name, adata in chosen.items()},
        stamp=file.stamp,
    )


def write_whole(file: ad.AnnData | mudata.MuData, path: str | Path) -> None:
    """Write beside the target and rename, so that a file is there whole or not at all.

    Raises
    ------
    UserError
        If the folder cannot be written to.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file.write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({_first_line(error)}); choose another --out_path") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
