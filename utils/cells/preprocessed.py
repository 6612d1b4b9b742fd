"""Reading files: raw ones as a user has them, and stamped ones as `preprocess.py` leaves them."""

import json
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import torch
from anndata.abc import CSRDataset
from anndata.io import read_elem

from utils.cells.labels import clean_labels
from utils.errors import UserError, reading
from utils.files.disk_matrix import Matrix
from utils.files.disk_rows import FileRows, Rows, select
from utils.files.open_any import open_file
from utils.files.source import Source

mudata.set_options(pull_on_update=False)

STAMP = "scmomer"
STAMP_VERSION = 1
STAMPED = "preprocessing"
"""Where the stamp of a preprocessed file stands once predictions have taken its place in uns."""
SIMULATED = "scmomer_simulated"
"""What marks, in uns, cells that `simulate.py` made."""


@dataclass
class RawFile:
    """Cells as a user has them, in one file or, paired, in two.

    Attributes
    ----------
    path : where
    format : of the file, in words
    modalities : modality → source
    obs : annotation of all cells, the file's own and the modalities' columns
    stamp : what preprocessing left in it, or None
    simulated : whether the cells are marked as simulated ones
    notes : what a user should know before all else (how two files came together …), a line each
    handles : open HDF5 files, closed at the end of a `with`
    """

    path: Path
    format: str
    modalities: dict[str, Source]
    obs: pd.DataFrame
    stamp: dict | None = None
    simulated: bool = False
    notes: list[str] = field(default_factory=list)
    handles: list[h5py.File] = field(default_factory=list, repr=False)

    @property
    def paths(self) -> list[Path]:
        """The files that are read; none for a folder."""
        return [path for path in dict.fromkeys(source.path for source in self.modalities.values()) if path.is_file()]

    @property
    def suffix(self) -> str:
        """Of a file that is to hold the same modalities."""
        return ".h5mu" if len(self.modalities) > 1 or self.format == ".h5mu" else ".h5ad"

    def __enter__(self) -> "RawFile":
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.close()

    def content(self) -> ad.AnnData | mudata.MuData:
        """All of it in memory, with everything that the file holds beside counts and annotation."""
        if self.format in (".h5ad", ".h5mu"):
            with reading(self.path, "is damaged", "copy or download it again"):
                return ad.read_h5ad(self.path) if self.format == ".h5ad" else mudata.read_h5mu(self.path)
        parts = {name: source.whole() for name, source in self.modalities.items()}
        if len(parts) == 1:
            return next(iter(parts.values()))
        both = mudata.MuData(parts)
        both.obs = self.obs.loc[both.obs_names]
        return both


def read_raw(path: str | Path) -> RawFile:
    """Open a file or folder of cells, whatever it is; .h5ad and .h5mu stay on disk until their values are asked for.

    Raises
    ------
    UserError
        If it cannot be read, or holds neither RNA nor ATAC.
    """
    path = Path(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of repeated gene names and old formats, which are taken care of
        kind, modalities, obs, hdf5 = open_file(path)
    if obs is None:
        obs = next(iter(modalities.values())).obs
    obs.index = obs.index.astype(str).rename(None)
    for source in modalities.values():
        obs = obs if obs is source.obs else _fill(obs, source.obs)
    if hdf5 is None:
        return RawFile(path, kind, modalities, obs)
    notes = []
    with reading(path, "is damaged", "copy or download it again"):
        stamp, entry = _stamp(hdf5), hdf5.get(f"uns/{STAMP}")
        is_prediction = isinstance(entry, h5py.Group) and "written" in entry
        if stamp is None and entry is not None and not is_prediction:
            notes.append(f"uns['{STAMP}'] is not of preprocess.py: the cells are taken as raw ones")
        groups = ("", *(f"mod/{name}/" for name in hdf5.get("mod", ())))
        simulated = any(f"{group}uns/{SIMULATED}" in hdf5 for group in groups) or bool((stamp or {}).get("simulated"))
    return RawFile(path, kind, modalities, obs, stamp, simulated, notes, [hdf5])


def _stamp(hdf5: h5py.File) -> dict | None:
    """What preprocessing left in a file, also below later predictions; anything else under its name is no stamp."""
    entry = hdf5.get(f"uns/{STAMP}")
    if isinstance(entry, h5py.Group):
        entry = entry.get(STAMPED)
    with suppress(Exception):  # whatever another program wrote there
        stamp = json.loads(read_elem(entry))
        if isinstance(stamp, dict) and "version" in stamp:
            return stamp
    return None


def open_cells(data_path: str | None, rna_path: str | None, atac_path: str | None) -> RawFile:
    """Open what the flags --data_path, or --rna_path and --atac_path, name.

    Raises
    ------
    UserError
        If neither or both are given, or a file cannot be read.
    """
    if bool(data_path) == bool(rna_path or atac_path) or bool(rna_path) != bool(atac_path):
        raise UserError("give --data_path, or --rna_path and --atac_path together")
    return read_raw(data_path) if data_path else read_pair(rna_path, atac_path)


def read_pair(rna_path: str | Path, atac_path: str | Path) -> RawFile:
    """Open RNA and ATAC of the same cells from two files; cells are joined by barcode, the others are left out.

    Where barcodes of the two agree but for a suffix such as 10x's `-1`, the suffix is overlooked.

    Raises
    ------
    UserError
        If a file lacks its modality, or no barcode is in both.
    """
    files = {"rna": read_raw(rna_path), "atac": read_raw(atac_path)}
    for name, file in files.items():
        if name not in file.modalities:
            raise UserError(f"--{name}_path {file.path}: holds {' and '.join(file.modalities)}, but no {name}")
        if file.stamp is not None:
            raise UserError(f"--{name}_path {file.path}: is preprocessed already; give the raw file")
    sources = {name: file.modalities[name] for name, file in files.items()}
    ours, theirs = (source.obs.index for source in sources.values())
    suffix = ""
    if len(ours.intersection(theirs)) < min(len(ours), len(theirs)):
        bare = pd.Index(_stripped(ours)), pd.Index(_stripped(theirs))
        more = len(bare[0].intersection(bare[1])) > len(ours.intersection(theirs))
        if more and bare[0].is_unique and bare[1].is_unique:
            (ours, theirs), suffix = bare, ", suffixes such as -1 overlooked"
    position = theirs.get_indexer(ours)
    rows = {"rna": np.flatnonzero(position >= 0), "atac": position[position >= 0]}
    if not len(rows["rna"]):
        raise UserError(
            f"{rna_path} and {atac_path}: share no barcode (like {ours[0]} and {theirs[0]}); "
            "give files of the same cells"
        )
    barcodes = sources["rna"].obs.index[rows["rna"]]
    joined = {name: source.take(rows[name], barcodes) for name, source in sources.items()}
    obs = _fill(joined["rna"].obs, joined["atac"].obs)
    n = len(barcodes)
    note = (
        f"{n:,} cells joined by barcode{suffix}; left out: {len(ours) - n:,} of RNA alone, {len(theirs) - n:,} of ATAC"
    )
    handles = [handle for file in files.values() for handle in file.handles]
    simulated = any(file.simulated for file in files.values())
    notes = [note, *(f"{file.path}: {line}" for file in files.values() for line in file.notes)]
    return RawFile(Path(rna_path), "two files", joined, obs, None, simulated, notes, handles)


def _stripped(barcodes: pd.Index) -> list[str]:
    """Barcodes without the -1 that Cell Ranger appends."""
    return [re.sub(r"-\d+$", "", barcode) for barcode in barcodes]


def _fill(obs: pd.DataFrame, more: pd.DataFrame) -> pd.DataFrame:
    """Add columns, and values where there were none, from the annotation of some of the cells; nothing changes type.

    Where cells have no value, whole numbers and truth values become pandas' nullable ones. A column that holds numbers
    here and text there becomes text.
    """
    obs = obs.copy()
    for column in more:
        new = more[column]
        if not obs.index.isin(new.index).all() and new.dtype.kind in "biu":
            new = new.convert_dtypes()
        new = new.reindex(obs.index)
        old = obs.get(column)
        if old is None:
            obs[column] = new
        elif old.isna().any() and new[old.isna()].notna().any():
            both = old.astype(object).where(old.notna(), new.astype(object))
            is_number = pd.api.types.is_numeric_dtype(old) and pd.api.types.is_numeric_dtype(new)
            both = both.infer_objects().convert_dtypes() if is_number else both.where(both.isna(), both.astype(str))
            obs[column] = both if is_number else _category(both, old, new)
    return obs


def _category(values: pd.Series, *sources: pd.Series) -> pd.Series:
    """Text as a category, classes in the order of the categories it comes from."""
    known = [str(name) for s in sources if isinstance(s.dtype, pd.CategoricalDtype) for name in s.cat.categories]
    names = list(dict.fromkeys([*known, *sorted(set(values.dropna()))]))
    return values.astype(pd.CategoricalDtype([name for name in names if name in set(values.dropna())]))


@dataclass
class Cells:
    """Model-ready cells, all measured in every modality that is there.

    Attributes
    ----------
    path : the file they come from
    obs : [cells] annotation, barcodes as index; `split` says train, val or test
    values : modality → [cells, features]; log-normalised RNA, open peaks. They stay in the file if they lie there as
        preprocess.py leaves them; `values[name][rows]` is float32 CSR in either case
    features : modality → names of genes or peaks
    stamp : constants of the preprocessing
    notes : what was left out, a line each
    """

    path: Path
    obs: pd.DataFrame
    values: dict[str, Rows]
    features: dict[str, np.ndarray]
    stamp: dict
    notes: list[str] = field(default_factory=list)

    def rows(self, split: str) -> np.ndarray:
        """Positions of the cells of a split."""
        return np.flatnonzero(self.obs["split"].to_numpy() == split)

    def need_training(self) -> None:
        """Stop where there is nothing to train on.

        Raises
        ------
        UserError
            If none of the cells is a training cell.
        """
        if not len(self.rows("train")):
            raise UserError(
                f"{self.path}: none of its {len(self.obs):,} cells measured in {' and '.join(self.values)} is a "
                "training cell; run preprocess.py on the raw file with other --test_groups, or on more such cells"
            )

    def labels(self, column: str | None = None) -> pd.Series | None:
        """The label column (default: the one the file was stamped with) as strings, missing ones as NaN, or None."""
        column = column or self.stamp.get("label_column")
        if column not in self.obs:
            return None
        return clean_labels(self.obs[column])

    def train_mean(self, modality: str) -> torch.Tensor:
        """[features] float32 mean of a modality's values over the training cells, of which there must be some."""
        self.need_training()
        rows = self.rows("train")
        blocks = (self.values[modality][rows[start : start + 2**12]] for start in range(0, len(rows), 2**12))
        total = sum(np.asarray(block.sum(0, dtype=np.float64)).ravel() for block in blocks)
        return torch.from_numpy((total / len(rows)).astype(np.float32))

    def codes(self, column: str, flag: str) -> np.ndarray:
        """[cells] int64 number of each cell's class in a column of obs, -1 where it is missing.

        Parameters
        ----------
        column : of obs
        flag : that named it, for the message

        Raises
        ------
        UserError
            If there is no such column.
        """
        labels = self.labels(column)
        if labels is None:
            known = ", ".join(map(str, self.obs.columns))
            raise UserError(f"{flag} {column}: {self.path} has no such column in obs, only {known}")
        return pd.factorize(labels)[0].astype(np.int64)


def read_cells(path: str | Path, modalities: tuple[str, ...], say: Callable[[str], None] | None = None) -> Cells:
    """Read a stamped file, keeping the cells measured in all of `modalities`.

    Parameters
    ----------
    path : the file
    modalities : rna, atac or both
    say : prints what was left out, if anything was

    Raises
    ------
    UserError
        If the file is missing, not stamped, or lacks a modality; the message holds the command to run.
    """
    with read_raw(path) as file:
        path, raw = file.path, file.modalities
        if file.stamp is None:
            ready = path.with_name(f"{path.stem}.ready{file.suffix}")
            how = "preprocessed by this project, although it has uns['scmomer']" if file.notes else "preprocessed"
            raise UserError(
                f"{path}: has not been {how}; run python preprocess.py --data_path {path} --out_path {ready}"
            )
        if file.stamp["version"] != STAMP_VERSION:
            raise UserError(f"{path}: was preprocessed by another version; run preprocess.py on the raw file again")
        absent = [name for name in modalities if name not in raw]
        if absent:
            raise UserError(f"{path}: holds {' and '.join(raw)} only, but this stage needs {' and '.join(modalities)}")
        barcodes = common_barcodes(raw, modalities)
        measured, lost = f"measured in {'both ' * (len(modalities) > 1)}{' and '.join(modalities)}", []
        if not len(barcodes):
            raise UserError(f"{path}: no cell was {measured}")
        if len(barcodes) < len(file.obs):
            count = f"{len(barcodes):,} of {len(file.obs):,} cells were {measured}"
            lost.append(f"{path.name}: {count}; the other {len(file.obs) - len(barcodes):,} are left out")
        for note in lost if say else ():
            say(note)
        values, features = {}, {}
        for name in modalities:
            matrix, var = raw[name].matrices["X"]
            rows = raw[name].obs.index.get_indexer(barcodes)
            whole = rows_of(matrix)
            values[name] = whole if len(rows) == whole.shape[0] and (np.diff(rows) == 1).all() else select(whole, rows)
            features[name] = var.index.to_numpy().astype(str)
        return Cells(path, file.obs.loc[barcodes], values, features, file.stamp, lost)


def common_barcodes(sources: dict[str, Source], modalities: tuple[str, ...]) -> pd.Index:
    """Cells measured in all of the modalities, in the order of the first."""
    barcodes = sources[modalities[0]].obs.index
    for name in modalities[1:]:
        barcodes = barcodes[barcodes.isin(sources[name].obs.index)]
    return barcodes


def rows_of(matrix: Matrix) -> Rows:
    """A matrix whose rows are read when they are wanted; in memory if it is compressed, or not CSR."""
    if matrix.order is None and isinstance(matrix.content, CSRDataset):
        with suppress(ValueError):
            return FileRows(matrix.content.group, matrix.path)
    csr = matrix.rows(0, matrix.shape[0]).astype(np.float32)
    csr.sort_indices()
    return csr
