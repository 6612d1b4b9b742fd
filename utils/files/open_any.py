"""Open any file of cells: .h5ad, .h5mu, 10x .h5, 10x folders, loom and delimited text, recognised by their content.

.h5ad and .h5mu files stay on disk and are read in blocks. All other formats are read into memory.
"""

import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy.sparse import csr_matrix

from utils.errors import UserError, reading
from utils.files.disk_matrix import Matrix
from utils.files.source import COUNT_LAYERS, Source, feature_modalities
from utils.files.text import read_text

KNOWN_FORMATS = ".h5ad, .h5mu, 10x .h5, a 10x matrix folder, .loom, or delimited text (.csv, .tsv, .txt, also .gz)"
MODALITY_NAMES = {
    "rna": ("rna", "gex", "gene expression", "genes"),
    "atac": ("atac", "peaks", "chromatin accessibility"),
}
"""Names in lower case under which an .h5mu file may hold each modality."""


def open_file(path: Path) -> tuple[str, dict[str, Source], pd.DataFrame | None, h5py.File | None]:
    """Open any file or folder of cells.

    Parameters
    ----------
    path : file, or folder with a 10x matrix

    Returns
    -------
    format : name of the format, for reports
    sources : modality → source
    obs : annotation of all cells, or None where the file only has one per modality
    file : the open HDF5 file that the matrices are read from, or None if they are in memory

    Raises
    ------
    UserError
        If the path does not exist or cannot be read in any known format.
    """
    if path.is_dir():
        with reading(path, "is damaged", "copy or download the folder again"):
            return "10x matrix folder", _by_modality(_read_mtx_folder(path), path), None, None
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty; copy or download it again")
    if h5py.is_hdf5(path):
        if problem := hdf5_problem(path):
            raise UserError(f"{path}: {problem}")
        with reading(path, f"not a readable {path.suffix} file", "copy or download it again"):
            return _open_hdf5(path)
    if path.suffix in (".h5", ".h5ad", ".h5mu", ".loom"):
        raise UserError(f"{path}: not a readable {path.suffix} file (no HDF5 signature); copy or download it again")
    if path.name.endswith((".mtx", ".mtx.gz")):
        raise UserError(f"{path}: is the matrix of a 10x folder; give the folder, which also holds barcodes and genes")
    with reading(path, "cannot be read as a table", f"known formats are {KNOWN_FORMATS}"):
        return "delimited text", _by_modality(read_text(path), path), None, None


# HDF5 ----------------------------------------------------------------------------------------------------------------


def _open_hdf5(path: Path) -> tuple[str, dict[str, Source], pd.DataFrame | None, h5py.File | None]:
    file = h5py.File(path)
    if "mod" in file:
        return ".h5mu", _h5mu_sources(file, path), read_elem(file["obs"]), file
    if "obs" in file and "var" in file:
        if "encoding-type" not in file["obs"].attrs:
            return "an .h5ad of anndata before 0.7", _by_modality(ad.read_h5ad(path), path), None, None
        if _has_several_feature_types(file["var"]):
            return ".h5ad of several feature types", _by_modality(ad.read_h5ad(path), path), None, None
        source = _source_on_disk(file, path, partial(ad.read_h5ad, path))
        return ".h5ad", {source.modality: source}, None, file
    if "row_attrs" in file:
        return ".loom", _by_modality(_read_loom(path), path), None, None
    if "matrix" in file or any("barcodes" in group for group in file.values() if isinstance(group, h5py.Group)):
        _check_10x_entries(file)
        genomes = [name for name, group in file.items() if isinstance(group, h5py.Group) and "barcodes" in group]
        if "matrix" not in file and len(genomes) > 1:
            raise UserError(
                f"{path}: holds the genomes {', '.join(genomes)}; export one of them, "
                f"scanpy.read_10x_h5(path, genome={genomes[0]!r}).write_h5ad(...)"
            )
        import scanpy as sc  # here, because it takes seconds to import

        # muon.read_10x_h5 wraps this reader and splits by Cell Ranger's exact type names. `_by_modality` also knows
        # the names of other tools, reports what it leaves out, and reads Cell Ranger 2 files, which have no types.
        return "10x .h5", _by_modality(sc.read_10x_h5(path, gex_only=False), path), None, None
    raise UserError(f"{path}: an HDF5 file without cells; known formats are {KNOWN_FORMATS}")


def _check_10x_entries(file: h5py.File) -> None:
    """Raise ValueError if entries lie outside the matrix: scipy's compiled code would read outside its memory."""
    for group in file.values():
        if not isinstance(group, h5py.Group) or "indptr" not in group:
            continue
        (n_features, n_cells), indptr, indices = map(int, group["shape"][:]), group["indptr"][:], group["indices"][:]
        in_order = len(indptr) == n_cells + 1 and indptr[0] == 0 and (np.diff(indptr) >= 0).all()
        complete = in_order and indptr[-1] == len(indices) == group["data"].shape[0]
        if not complete or (len(indices) and not 0 <= indices.min() <= indices.max() < n_features):
            raise ValueError("entries lie outside the matrix")


def _has_several_feature_types(var: h5py.Group) -> bool:
    """Return whether the feature types name more than genes alone or peaks alone."""
    kinds = set(feature_modalities(set(read_elem(var["feature_types"])))) if "feature_types" in var else set()
    return bool(kinds) and None not in kinds and kinds not in ({"rna"}, {"atac"})


def _h5mu_sources(file: h5py.File, path: Path) -> dict[str, Source]:
    """Return modality → source for the RNA and ATAC of an open .h5mu file."""
    found = {}
    for modality, name in _modality_names(file["mod"], path).items():
        load = partial(_load_from_h5mu, path, name)
        found[modality] = _source_on_disk(file["mod"][name], path, load, modality)
    return found


def _modality_names(held: Iterable[str], path: Path) -> dict[str, str]:
    """Return modality → the name under which it is held."""
    found = {}
    for modality, aliases in MODALITY_NAMES.items():
        names = [name for name in held if name.lower() in aliases]
        if len(names) > 1:
            raise UserError(f"{path}: {' and '.join(names)} are both {modality}; keep one of them")
        if names:
            found[modality] = names[0]
    if not found:
        raise UserError(f"{path}: has no modality named rna or atac, only {', '.join(held)}; rename them")
    return found


def _load_from_h5mu(path: Path, name: str) -> ad.AnnData:
    return mudata.read_h5mu(path)[name]


def _source_on_disk(
    group: h5py.Group, path: Path, load: Callable[[], ad.AnnData], modality: str | None = None
) -> Source:
    """Return one modality of an .h5ad or .h5mu; its matrices stay on disk."""
    var = read_elem(group["var"])
    matrices = {}
    for name, layer in group.get("layers", {}).items():
        if name.lower() in COUNT_LAYERS:
            matrices[f"layers['{name}']"] = Matrix(layer, path), var
    if "X" in group:
        matrices["X"] = Matrix(group["X"], path), var
    if "raw" in group and "X" in group["raw"]:
        matrices["raw"] = Matrix(group["raw/X"], path), _with_columns(read_elem(group["raw/var"]), var)
    return Source.checked(path, read_elem(group["obs"]), var, matrices, modality, load, _other_entries(group))


# Damaged HDF5 --------------------------------------------------------------------------------------------------------

CHECK_SECONDS = 4.0
BYTES_PER_SECOND = 1e6
"""Computing time that the check may spend on one item of a file: a constant, and more for large text at this rate."""
DAMAGED = "is damaged (the HDF5 library crashes on it); copy or download it again"
SLOW = (
    "takes too long to read (HDF5 needs more computing time for its names and text than their size explains); copy it "
    "to a local disk, download it again, or rewrite it with anndata"
)


def hdf5_problem(path: Path) -> str | None:
    """Check that HDF5 can read the names, attributes and text of a file.

    On some damaged files the HDF5 library crashes or never returns, and Python cannot stop C code: no exception is
    raised, and signal handlers do not run. So a child process reads the file first, under a limit that the operating
    system enforces. The limit counts computing time only; waiting for a slow disk or a busy machine is free.

    Returns
    -------
    What is wrong, or None. Files that merely raise an error also give None: the reader meets the error again and
    reports it. Where the system has no fork, nothing is checked.
    """
    if not hasattr(os, "fork"):
        return None
    child = os.fork()
    if not child:
        for number in (signal.SIGPROF, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # the default action ends the process even inside a loop in C
        with suppress(BaseException):
            # A damaged item may claim any size; compressed text takes up some more bytes in memory than in the file.
            largest = 10 * path.stat().st_size
            _read_names_and_text(path, lambda size: _limit(CHECK_SECONDS + min(size, largest) / BYTES_PER_SECOND))
        os._exit(0)  # skips all cleanup: the parent's buffers and files must not be flushed or closed twice
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        return None
    return SLOW if os.WTERMSIG(status) == signal.SIGPROF else DAMAGED


def _limit(seconds: float) -> None:
    """Let the system end this process after this much more computing time."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _read_names_and_text(path: Path, allow: Callable[[float], None]) -> None:
    """Read everything but the matrices; `allow(bytes)` restarts the time limit before each item."""

    def visit(_, item: h5py.Group | h5py.Dataset) -> None:
        allow(0)
        with suppress(Exception):
            list(item.attrs.items())
        with suppress(Exception):
            if isinstance(item, h5py.Dataset) and h5py.check_vlen_dtype(item.dtype) is not None:
                allow(item.nbytes)
                item[()]

    allow(0)
    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)


# In memory -----------------------------------------------------------------------------------------------------------


def sources_in_memory(cells: ad.AnnData | mudata.MuData, path: Path) -> dict[str, Source]:
    """Return modality → source for the RNA and ATAC of cells in memory.

    Parameters
    ----------
    cells : a table, whose feature types may split it, or a MuData
    path : name for messages

    Raises
    ------
    UserError
        If they hold neither, or a modality twice.
    """
    if isinstance(cells, ad.AnnData):
        return _by_modality(cells, path)
    return {
        modality: _source_in_memory(cells.mod[name], path, modality, [])
        for modality, name in _modality_names(cells.mod, path).items()
    }


def _by_modality(adata: ad.AnnData, path: Path) -> dict[str, Source]:
    """Return modality → source for a table in memory; feature types split it into RNA and ATAC (10x multiome)."""
    parts, left = {None: adata}, []
    kinds = adata.var.get("feature_types", pd.Series(dtype=str)).astype(str)
    modalities = np.array(feature_modalities(kinds), dtype=object)
    if any(modalities):
        parts = {name: adata[:, modalities == name].copy() for name in MODALITY_NAMES if (modalities == name).any()}
        others = kinds[~np.isin(modalities.astype(str), list(MODALITY_NAMES))].value_counts()
        left = [f"{number:,} features of type {kind}" for kind, number in others.items()]
        if not parts:
            raise UserError(f"{path}: holds {', '.join(kinds.unique())}, but neither genes nor peaks")
    found = {}
    for modality, part in parts.items():
        if len(parts) > 1 or left:
            part.raw = None  # raw is not split: it still has the features of all types
        source = _source_in_memory(part, path, modality, left)
        found[source.modality], left = source, []  # what is left out is reported once
    return found


def _source_in_memory(adata: ad.AnnData, path: Path, modality: str | None, left: list[str]) -> Source:
    """Return one modality of a file that was read into memory; `left` names features of other types."""
    var = adata.var.copy()  # a source renames its index, and the table may be the user's own
    layers = {name: adata.layers[name] for name in adata.layers if name.lower() in COUNT_LAYERS}
    matrices = {f"layers['{name}']": (Matrix(layer, path), var) for name, layer in layers.items()}
    if adata.X is not None:
        matrices["X"] = Matrix(adata.X, path), var
    if adata.raw is not None:
        matrices["raw"] = Matrix(adata.raw.X, path), _with_columns(adata.raw.var.copy(), var)
    others = _other_entries(adata) + left
    return Source.checked(path, adata.obs.copy(), var, matrices, modality, lambda: adata, others)


def _with_columns(raw_var: pd.DataFrame, var: pd.DataFrame) -> pd.DataFrame:
    """Return raw's var with the columns that only var has: CELLxGENE files keep gene symbols in var alone."""
    if not var.index.is_unique or not var.index.isin(raw_var.index).all():
        return raw_var
    return raw_var.join(var[[column for column in var if column not in raw_var]])


def _other_entries(content: ad.AnnData | h5py.Group) -> list[str]:
    """Return the names of the entries in obsm, varm, obsp and varp, and of the layers that hold no counts."""
    found = []
    for kind in ("layers", "obsm", "varm", "obsp", "varp"):
        names = content.get(kind, ()) if isinstance(content, h5py.Group) else getattr(content, kind)
        found += [f"{kind}['{name}']" for name in names if kind != "layers" or name.lower() not in COUNT_LAYERS]
    return found


def _read_mtx_folder(folder: Path) -> ad.AnnData:
    """Read a 10x folder: matrix.mtx, barcodes.tsv, and features.tsv, genes.tsv (before version 3) or peaks.bed.

    The files may be gzipped, and their names may have a prefix, as GEO adds one.
    """

    def find(*ends: str) -> Path:
        found = [p for end in ends for p in sorted(folder.glob(f"*{end}")) + sorted(folder.glob(f"*{end}.gz"))]
        if len(found) != 1:
            wanted = " or ".join(ends)
            raise UserError(
                f"{folder}: a folder with {len(found) or 'no'} {wanted} (or .gz); give a file (two with --rna_path and "
                "--atac_path), or the 10x folder of one sample, with matrix.mtx, barcodes.tsv and features.tsv"
            )
        return found[0]

    matrix, barcodes = find("matrix.mtx"), find("barcodes.tsv")
    features = find("features.tsv", "genes.tsv", "peaks.bed")
    table = pd.read_csv(features, sep="\t", header=None, dtype=str, keep_default_na=False)
    names = pd.read_csv(barcodes, sep="\t", header=None, dtype=str, usecols=[0])[0].to_numpy()
    adata = ad.AnnData(_read_mtx(matrix))
    if adata.shape != (len(names), len(table)):
        raise UserError(
            f"{folder}: {matrix.name} holds {adata.n_vars:,} features × {adata.n_obs:,} cells, but {features.name} "
            f"names {len(table):,} and {barcodes.name} {len(names):,}; copy or download the folder again"
        )
    adata.obs_names = names
    if "peaks.bed" in features.name:
        adata.var_names = table[0] + ":" + table[1] + "-" + table[2]
        return adata
    adata.var_names = table[min(1, table.shape[1] - 1)].to_numpy()
    for column, name in enumerate(("gene_ids", None, "feature_types", "chrom", "start", "end")):
        if name and column < table.shape[1]:
            adata.var[name] = table[column].to_numpy()
    # Cell Ranger ARC also gives the positions of genes; without peaks, drop them: they look like those of peaks.
    if "chrom" in adata.var and (adata.var["feature_types"] != "Peaks").all():
        adata.var = adata.var.drop(columns=["chrom", "start", "end"], errors="ignore")
    return adata


def _read_mtx(path: Path) -> csr_matrix:
    """Read [cells, features] from a file written as features × cells.

    pandas reads it, because scipy's reader crashes on some damaged files.
    """
    table = pd.read_csv(path, sep=" ", comment="%", header=None, names=["feature", "cell", "value"])
    n_features, n_cells, n_entries = table.iloc[0].astype(int)
    feature, cell = (table[name].to_numpy()[1:].astype(np.int64) - 1 for name in ("feature", "cell"))  # 1-based on disk
    if len(feature) != n_entries:
        raise ValueError(f"{path.name} has {len(feature)} of its {n_entries} entries")
    if n_entries and not (0 <= feature.min() <= feature.max() < n_features and 0 <= cell.min() <= cell.max() < n_cells):
        raise ValueError(f"an entry of {path.name} lies outside the matrix")
    values = table["value"].to_numpy()[1:].astype(np.float32)
    return csr_matrix((values, (cell, feature)), shape=(n_cells, n_features))


def _read_loom(path: Path) -> ad.AnnData:
    """Read a loom file with anndata, which imports loompy only then; names come from the usual attributes."""
    with h5py.File(path) as file:
        names = [
            next((name for name in options if name in file[axis]), options[0])
            for axis, options in (
                ("col_attrs", ("CellID", "obs_names", "barcode", "cell_names", "Barcode")),
                ("row_attrs", ("Gene", "var_names", "gene_names", "gene", "Accession")),
            )
        ]
    return ad.io.read_loom(path, sparse=True, dtype="float32", X_name="", obs_names=names[0], var_names=names[1])
