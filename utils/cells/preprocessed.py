"""Opens a user's raw files (RawFile), and reads the model-ready cells that preprocess.py writes (Cells)."""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
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

from utils.cells.annotation import annotation_of, fill_in
from utils.cells.barcodes import join_barcodes
from utils.cells.labels import clean_labels
from utils.errors import UserError, reading
from utils.files.disk_matrix import Matrix
from utils.files.disk_rows import FileRows, Rows, select, use_hashes
from utils.files.open_any import open_file
from utils.files.source import Source

mudata.set_options(pull_on_update=False)  # columns of a modality must not be copied to the whole file under new names

STAMP = "scmomer"
"""Key of uns that holds the stamp of a preprocessed file."""
KNOWN = "scmomer_known"
"""Key of uns for what preprocessing has computed of the values it wrote: hashes of cells and sums over them."""
STAMP_VERSION = 1
STAMPED = "preprocessing"
"""Key below uns[STAMP] to which the stamp is moved when predictions are written to the file."""
SIMULATED = "scmomer_simulated"
"""Key of uns that marks cells as simulated."""


@dataclass
class RawFile:
    """An opened file of cells, two files with the RNA and the ATAC of paired cells, or several files that are joined.

    Attributes
    ----------
    path : the file or folder; of two files, the one with RNA; of joined files, the first
    format : the file's format, for messages
    modalities : modality → source; of joined files, that of the first
    obs : annotation of all cells: the file's own columns and those of its modalities
    stamp : constants of the preprocessing, or None for a raw file
    simulated : whether the cells are marked as simulated
    notes : what the user should know first (how two files were joined …), a line each
    handles : open HDF5 files, closed at the end of a `with` block
    root : what holds all of the file: an open .h5ad or .h5mu, or cells in memory; None for other formats
    more : modality → sources of the further files that are joined, whose cells follow
    """

    path: Path
    format: str
    modalities: dict[str, Source]
    obs: pd.DataFrame
    stamp: dict | None = None
    simulated: bool = False
    notes: list[str] = field(default_factory=list)
    handles: list[h5py.File] = field(default_factory=list, repr=False)
    more: dict[str, list[Source]] = field(default_factory=dict)
    root: h5py.File | ad.AnnData | mudata.MuData | None = field(default=None, repr=False)

    @property
    def on_disk(self) -> bool:
        """Whether the file can be copied and changed without being read."""
        return isinstance(self.root, h5py.File)

    def part(self, name: str) -> Mapping:
        """Return obsm or uns of the whole file, of which nothing is read; empty for other formats."""
        if self.on_disk:
            return self.root.get(name, {})
        return {} if self.root is None else getattr(self.root, name)

    @property
    def sources(self) -> dict[str, list[Source]]:
        """Modality → its source in each of the files, in the order of the cells."""
        return {name: [source, *self.more.get(name, ())] for name, source in self.modalities.items()}

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read."""
        return list(dict.fromkeys(source.path for sources in self.sources.values() for source in sources))

    @property
    def paths(self) -> list[Path]:
        """The files that are read; empty for a folder."""
        return [path for path in self.inputs if path.is_file()]

    @property
    def suffix(self) -> str:
        """Suffix of an output file that holds the same modalities: .h5ad or .h5mu."""
        return ".h5mu" if len(self.modalities) > 1 or self.format == ".h5mu" else ".h5ad"

    def __enter__(self) -> "RawFile":
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.close()

    def content(self) -> ad.AnnData | mudata.MuData:
        """Load everything that the file holds into memory, also what is neither counts nor annotation."""
        if self.on_disk:
            with reading(self.path, "is damaged", "copy or download it again"):
                return ad.read_h5ad(self.path) if self.format == ".h5ad" else mudata.read_h5mu(self.path)
        if self.root is not None:
            return self.root.copy()
        parts = {name: source.whole() for name, source in self.modalities.items()}
        if len(parts) == 1:
            return next(iter(parts.values()))
        both = mudata.MuData(parts)
        both.obs = self.obs.loc[both.obs_names]
        return both


def read_raw(path: str | Path) -> RawFile:
    """Open a file or folder of cells in any known format; values in .h5ad and .h5mu files stay on disk.

    Raises
    ------
    UserError
        If it cannot be read, or holds neither RNA nor ATAC.
    """
    path = Path(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about repeated gene names and old formats, which are handled here
        kind, modalities, obs, hdf5 = open_file(path)
    obs = annotation_of(obs, modalities)
    if hdf5 is None:
        return RawFile(path, kind, modalities, obs)
    notes = []
    with reading(path, "is damaged", "copy or download it again"):
        entry = hdf5.get(f"uns/{STAMP}")
        stamp = stamp_in(entry)
        is_prediction = isinstance(entry, h5py.Group) and "written" in entry
        if stamp is None and entry is not None and not is_prediction:
            notes.append(f"uns['{STAMP}'] was not written by preprocess.py, so the cells are read as raw ones")
        groups = ("", *(f"mod/{name}/" for name in hdf5.get("mod", ())))
        simulated = any(f"{group}uns/{SIMULATED}" in hdf5 for group in groups) or bool((stamp or {}).get("simulated"))
    return RawFile(path, kind, modalities, obs, stamp, simulated, notes, [hdf5], root=hdf5)


def stamp_in(entry: object) -> dict | None:
    """Return the stamp of preprocessed cells from uns[STAMP], also from below later predictions; None without one.

    Parameters
    ----------
    entry : in memory or in an HDF5 file, or None
    """
    if isinstance(entry, Mapping):
        entry = entry.get(STAMPED)
    with suppress(Exception):  # another program may have written anything under this key
        stamp = json.loads(read_elem(entry) if isinstance(entry, h5py.Dataset) else entry)
        if isinstance(stamp, dict) and "version" in stamp:
            return stamp
    return None


def open_cells(data_path: str | None, rna_path: str | None, atac_path: str | None) -> RawFile:
    """Open the file named by --data_path, or the two named by --rna_path and --atac_path.

    Raises
    ------
    UserError
        If neither or both ways are used, or a file cannot be read.
    """
    if bool(data_path) == bool(rna_path or atac_path) or bool(rna_path) != bool(atac_path):
        raise UserError("give --data_path, or --rna_path and --atac_path together")
    return read_raw(data_path) if data_path else read_pair(rna_path, atac_path)


def read_pair(rna_path: str | Path, atac_path: str | Path) -> RawFile:
    """Open the RNA and the ATAC of the same cells from two files, and keep the cells that are in both.

    Cells are joined by barcode, if need be without a suffix such as 10x's `-1` (`join_barcodes`).

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
    *found, suffix = join_barcodes(ours, theirs)
    rows = dict(zip(files, found, strict=True))
    if not len(rows["rna"]):
        raise UserError(
            f"{rna_path} and {atac_path}: share no barcode (like {ours[0]} and {theirs[0]}); "
            "give files of the same cells"
        )
    barcodes = sources["rna"].obs.index[rows["rna"]]
    joined = {name: source.take(rows[name], barcodes) for name, source in sources.items()}
    obs = fill_in(joined["rna"].obs, joined["atac"].obs)
    n = len(barcodes)
    left_out = f"left out: {len(ours) - n:,} cells with RNA only and {len(theirs) - n:,} with ATAC only"
    note = f"{n:,} cells joined by barcode{suffix}; {left_out}"
    handles = [handle for file in files.values() for handle in file.handles]
    simulated = any(file.simulated for file in files.values())
    notes = [note, *(f"{file.path}: {line}" for file in files.values() for line in file.notes)]
    return RawFile(Path(rna_path), "two files", joined, obs, None, simulated, notes, handles)


@dataclass
class Cells:
    """Model-ready cells; each is measured in all of the modalities that the reader names.

    Attributes
    ----------
    path : the preprocessed file
    obs : [cells] annotation, barcodes as index; the column `split` holds train, val or test
    values : modality → [cells, features] log-normalised RNA or open peaks. In the layout that preprocess.py writes they
        stay on disk, otherwise they are in memory; `values[modality][rows]` is float32 CSR in both cases
    features : modality → names of genes or peaks
    stamp : constants of the preprocessing
    notes : cells that were left out, a line each
    train_sums : modality → [features] sums over the training cells that preprocessing found measured in all modalities,
        and `train_cells` → the `barcodes_hash` of these; empty if the file does not have them
    """

    path: Path
    obs: pd.DataFrame
    values: dict[str, Rows]
    features: dict[str, np.ndarray]
    stamp: dict
    notes: list[str] = field(default_factory=list)
    train_sums: dict = field(default_factory=dict)

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of the cells of a split: train, val or test."""
        return np.flatnonzero(self.obs["split"].to_numpy() == split)

    def need_training(self) -> None:
        """Raise an error if there is no cell to train on.

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
        """Return a label column (default: the stamp's) as strings, NaN where missing; None if there is no column."""
        column = column or self.stamp.get("label_column")
        if column not in self.obs:
            return None
        return clean_labels(self.obs[column])

    def train_mean(self, modality: str) -> torch.Tensor:
        """Return the mean of a modality's values over the training cells: [features] float32."""
        self.need_training()
        rows = self.rows("train")
        if self.train_sums.get("train_cells") == barcodes_hash(self.obs.index[rows]):
            return torch.from_numpy((self.train_sums[modality] / len(rows)).astype(np.float32))
        blocks = (self.values[modality][rows[start : start + 2**12]] for start in range(0, len(rows), 2**12))
        total = sum(np.asarray(block.sum(0, dtype=np.float64)).ravel() for block in blocks)
        return torch.from_numpy((total / len(rows)).astype(np.float32))

    def codes(self, column: str, flag: str) -> np.ndarray:
        """Return the class number of each cell in a column of obs: [cells] int64, -1 where missing.

        Parameters
        ----------
        column : a column of obs
        flag : the flag that named the column, for the error message

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
    """Read a preprocessed file, and keep the cells measured in all of `modalities`.

    Parameters
    ----------
    path : the file
    modalities : rna, atac or both
    say : called with a line for the user if cells are left out; None for silence

    Raises
    ------
    UserError
        If the file is missing, not preprocessed, or lacks a modality.
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
        measured = f"measured in {'both ' * (len(modalities) > 1)}{' and '.join(modalities)}"
        if not len(barcodes):
            raise UserError(f"{path}: no cell was {measured}; give a file of such cells")
        notes = []
        if len(barcodes) < len(file.obs):
            count = f"{len(barcodes):,} of {len(file.obs):,} cells were {measured}"
            notes.append(f"{path.name}: {count}; the other {len(file.obs) - len(barcodes):,} are left out")
        if say:
            for note in notes:
                say(note)
        values, features, known, sums = {}, {}, _known(file), {}
        for name in modalities:
            matrix, var = raw[name].matrices["X"]
            rows = raw[name].obs.index.get_indexer(barcodes)
            whole, (hashes, sums[name]) = rows_of(matrix), known.get(name, (None, None))
            if isinstance(whole, FileRows):
                use_hashes(whole, hashes)
            if not isinstance(whole, FileRows) or whole.hashes is None:
                known = {}  # the values may have been changed since
            values[name] = whole if len(rows) == whole.shape[0] and (np.diff(rows) == 1).all() else select(whole, rows)
            features[name] = var.index.to_numpy().astype(str)
        sums = sums | {"train_cells": known["train_cells"]} if known else {}
        return Cells(path, file.obs.loc[barcodes], values, features, file.stamp, notes, sums)


def _known(file: RawFile) -> dict:
    """Read what preprocessing has computed of the values: modality → (hashes, sums), and `train_cells`; else empty."""
    with suppress(Exception):  # another program may have written anything under this key
        entry = read_elem(file.handles[0][f"uns/{KNOWN}"])
        parts = {name: (part["hashes"], part["train_sum"]) for name, part in entry.items() if isinstance(part, dict)}
        return parts | {"train_cells": str(entry["train_cells"])}
    return {}


def barcodes_hash(barcodes: pd.Index) -> str:
    """Return a hash of a set of barcodes, whatever their order."""
    numbers = np.sort(pd.util.hash_array(np.asarray(barcodes, dtype=object)))
    return hashlib.sha256(numbers.tobytes()).hexdigest()


def common_barcodes(sources: dict[str, Source], modalities: tuple[str, ...]) -> pd.Index:
    """Return the barcodes of cells measured in all of the modalities, in the first one's order."""
    barcodes = sources[modalities[0]].obs.index
    for name in modalities[1:]:
        barcodes = barcodes[barcodes.isin(sources[name].obs.index)]
    return barcodes


def rows_of(matrix: Matrix) -> Rows:
    """Return a matrix whose rows are read from disk on demand; if it is compressed or not CSR, it is loaded instead."""
    if matrix.order is None and isinstance(matrix.content, CSRDataset):
        with suppress(ValueError):  # FileRows cannot read this layout
            return FileRows(matrix.content.group, matrix.path)
    csr = matrix.rows(0, matrix.shape[0]).astype(np.float32)
    csr.sort_indices()
    return csr
