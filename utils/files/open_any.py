"""Opening what labs have: .h5ad, .h5mu, 10x files and folders, loom and text, each recognised by its content.

.h5ad and .h5mu files stay on disk and are read in blocks. The others are read whole, by scanpy, anndata or pandas.
"""

from pathlib import Path

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy.sparse import csr_matrix

from utils.errors import UserError, reading
from utils.files import probe
from utils.files.disk_matrix import Matrix
from utils.files.source import MORE_COUNTS, Source, feature_modalities
from utils.files.text import read_text

KNOWN = ".h5ad, .h5mu, 10x .h5, a 10x matrix folder, .loom, or delimited text (.csv, .tsv, .txt, also .gz)"
MODALITY_NAMES = {
    "rna": ("rna", "gex", "gene expression", "genes"),
    "atac": ("atac", "peaks", "chromatin accessibility"),
}


def open_file(path: Path) -> tuple[str, dict[str, Source], pd.DataFrame | None, h5py.File | None]:
    """Open any file or folder of cells.

    Returns
    -------
    the format in words; modality → source; annotation of all cells, where the file has one beside its modalities';
    and the open HDF5 file, where matrices stay in it

    Raises
    ------
    UserError
        If there is nothing, or nothing that can be read.
    """
    if path.is_dir():
        with reading(path, "is damaged", "copy or download the folder again"):
            return "10x matrix folder", _split(_read_mtx_folder(path), path), None, None
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty; copy or download it again")
    if h5py.is_hdf5(path):
        if problem := probe.problem(path):
            raise UserError(f"{path}: {problem}")
        with reading(path, f"not a readable {path.suffix} file", "copy or download it again"):
            return _open_hdf5(path)
    if path.suffix in (".h5", ".h5ad", ".h5mu", ".loom"):
        raise UserError(f"{path}: not a readable {path.suffix} file (no HDF5 signature); copy or download it again")
    if path.name.endswith((".mtx", ".mtx.gz")):
        raise UserError(f"{path}: is the matrix of a 10x folder; give the folder, which also holds barcodes and genes")
    with reading(path, "cannot be read as a table", f"known formats are {KNOWN}"):
        return "delimited text", _split(read_text(path), path), None, None


def _open_hdf5(path: Path) -> tuple[str, dict[str, Source], pd.DataFrame | None, h5py.File | None]:
    file = h5py.File(path)
    if "mod" in file:
        return ".h5mu", _modalities(file, path), read_elem(file["obs"]), file
    if "obs" in file and "var" in file:
        if "encoding-type" not in file["obs"].attrs:
            return "an .h5ad of anndata before 0.7", _split(ad.read_h5ad(path), path), None, None
        if _is_mixed(file["var"]):
            return ".h5ad of several feature types", _split(ad.read_h5ad(path), path), None, None
        source = _source(file, path, lambda: ad.read_h5ad(path))
        return ".h5ad", {source.modality: source}, None, file
    if "row_attrs" in file:
        return ".loom", _split(_read_loom(path), path), None, None
    if "matrix" in file or any("barcodes" in group for group in file.values() if isinstance(group, h5py.Group)):
        _check_tenx(file)
        import scanpy as sc  # here, because it takes seconds to import

        return "10x .h5", _split(sc.read_10x_h5(path, gex_only=False), path), None, None
    raise UserError(f"{path}: an HDF5 file that holds no cells; known formats are {KNOWN}")


def _check_tenx(file: h5py.File) -> None:
    """Stop at entries that lie outside the matrix: the compiled code of the reader would follow them."""
    for group in file.values():
        if not isinstance(group, h5py.Group) or "indptr" not in group:
            continue
        (n_features, n_cells), indptr, indices = map(int, group["shape"][:]), group["indptr"][:], group["indices"][:]
        in_order = len(indptr) == n_cells + 1 and indptr[0] == 0 and (np.diff(indptr) >= 0).all()
        complete = in_order and indptr[-1] == len(indices) == group["data"].shape[0]
        if not complete or (len(indices) and not 0 <= indices.min() <= indices.max() < n_features):
            raise ValueError("entries lie outside the matrix")


def _is_mixed(var: h5py.Group) -> bool:
    """Whether the feature types say that there is more in the table than genes, or more than peaks."""
    kinds = set(feature_modalities(set(read_elem(var["feature_types"])))) if "feature_types" in var else set()
    return bool(kinds) and None not in kinds and kinds not in ({"rna"}, {"atac"})


def _modalities(file: h5py.File, path: Path) -> dict[str, Source]:
    found = {}
    for modality, aliases in MODALITY_NAMES.items():
        names = [name for name in file["mod"] if name.lower() in aliases]
        if len(names) > 1:
            raise UserError(f"{path}: {' and '.join(names)} are both {modality}; keep one of them")
        if names:
            load = lambda name=names[0]: mudata.read_h5mu(path)[name]
            found[modality] = _source(file["mod"][names[0]], path, load, modality)
    if not found:
        raise UserError(f"{path}: has no modality named rna or atac, only {', '.join(file['mod'])}; rename them")
    return found


def _source(group: h5py.Group, path: Path, load, modality: str | None = None) -> Source:
    """One modality of an .h5ad or .h5mu, its matrices left on disk."""
    var = read_elem(group["var"])
    matrices = {}
    for name, layer in group.get("layers", {}).items():
        if name.lower() in MORE_COUNTS:
            matrices[f"layers['{name}']"] = Matrix(layer, path), var
    if "X" in group:
        matrices["X"] = Matrix(group["X"], path), var
    if "raw" in group and "X" in group["raw"]:
        matrices["raw"] = Matrix(group["raw/X"], path), _with_columns(read_elem(group["raw/var"]), var)
    return Source.of(path, read_elem(group["obs"]), var, matrices, modality, load, _others(group))


def _split(adata: ad.AnnData, path: Path) -> dict[str, Source]:
    """A table in memory as one source, or as RNA and ATAC where its features say which is which (10x multiome)."""
    parts, left = {None: adata}, []
    kinds = adata.var.get("feature_types", pd.Series(dtype=str)).astype(str)
    of = np.array(feature_modalities(kinds), dtype=object)
    if any(of):
        parts = {name: adata[:, of == name].copy() for name in MODALITY_NAMES if (of == name).any()}
        others = kinds[~np.isin(of.astype(str), list(MODALITY_NAMES))].value_counts()
        left = [f"{number:,} features of type {kind}" for kind, number in others.items()]
        if not parts:
            raise UserError(f"{path}: holds {', '.join(kinds.unique())}, but neither genes nor peaks")
    found = {}
    for modality, part in parts.items():
        if len(parts) > 1 or left:
            part.raw = None  # of all features
        layers = {name: part.layers[name] for name in part.layers if name.lower() in MORE_COUNTS}
        matrices = {f"layers['{name}']": (Matrix(layer, path), part.var) for name, layer in layers.items()}
        if part.X is not None:
            matrices["X"] = Matrix(part.X, path), part.var
        if part.raw is not None:
            matrices["raw"] = Matrix(part.raw.X, path), _with_columns(part.raw.var, part.var)
        load = lambda part=part: part
        source = Source.of(path, part.obs.copy(), part.var, matrices, modality, load, _others(part) + left)
        found[source.modality], left = source, []
    return found


def _with_columns(raw_var: pd.DataFrame, var: pd.DataFrame) -> pd.DataFrame:
    """Annotation of raw's features, with columns that only the other table has (CELLxGENE keeps symbols there)."""
    if not var.index.is_unique or not var.index.isin(raw_var.index).all():
        return raw_var
    return raw_var.join(var[[column for column in var if column not in raw_var]])


def _others(content: ad.AnnData | h5py.Group) -> list[str]:
    """Names of other layers and of obsm, varm, obsp and varp entries."""
    found = []
    for kind in ("layers", "obsm", "varm", "obsp", "varp"):
        names = content.get(kind, ()) if isinstance(content, h5py.Group) else getattr(content, kind)
        found += [f"{kind}['{name}']" for name in names if kind != "layers" or name.lower() not in MORE_COUNTS]
    return found


# 10x folders ---------------------------------------------------------------------------------------------------------


def _read_mtx_folder(folder: Path) -> ad.AnnData:
    """matrix.mtx, barcodes.tsv, and features.tsv or (before v3) genes.tsv; gzipped or not, with or without prefix."""

    def find(*ends: str) -> Path:
        found = [p for end in ends for p in sorted(folder.glob(f"*{end}")) + sorted(folder.glob(f"*{end}.gz"))]
        if len(found) != 1:
            what = " or ".join(ends)
            raise UserError(
                f"{folder}: a folder with {len(found) or 'no'} {what} (or .gz); give a file (two by --rna_path and "
                "--atac_path), or the 10x folder of one sample, with matrix.mtx, barcodes.tsv and features.tsv"
            )
        return found[0]

    matrix, barcodes, features = (
        find("matrix.mtx"),
        find("barcodes.tsv"),
        find("features.tsv", "genes.tsv", "peaks.bed"),
    )
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
    if "chrom" in adata.var and (adata.var["feature_types"] != "Peaks").all():
        adata.var = adata.var.drop(columns=["chrom", "start", "end"], errors="ignore")
    return adata


def _read_mtx(path: Path) -> csr_matrix:
    """[cells, features] of a matrix written features × cells; scipy's reader crashes on some damaged ones."""
    table = pd.read_csv(path, sep=" ", comment="%", header=None, names=["feature", "cell", "value"])
    n_features, n_cells, n_entries = table.iloc[0].astype(int)
    feature, cell = (table[name].to_numpy()[1:].astype(np.int64) - 1 for name in ("feature", "cell"))
    if len(feature) != n_entries:
        raise ValueError(f"{path.name} has {len(feature)} of its {n_entries} entries")
    if n_entries and not (0 <= feature.min() <= feature.max() < n_features and 0 <= cell.min() <= cell.max() < n_cells):
        raise ValueError(f"an entry of {path.name} lies outside the matrix")
    values = table["value"].to_numpy()[1:].astype(np.float32)
    return csr_matrix((values, (cell, feature)), shape=(n_cells, n_features))


# Loom ----------------------------------------------------------------------------------------------------------------


def _read_loom(path: Path) -> ad.AnnData:
    """Loom by anndata; cells and genes are named by the attributes that files of this kind use."""
    with h5py.File(path) as file:
        names = [
            next((name for name in options if name in file[axis]), options[0])
            for axis, options in (
                ("col_attrs", ("CellID", "obs_names", "barcode", "cell_names", "Barcode")),
                ("row_attrs", ("Gene", "var_names", "gene_names", "gene", "Accession")),
            )
        ]
    return ad.io.read_loom(path, sparse=True, dtype="float32", X_name="", obs_names=names[0], var_names=names[1])
