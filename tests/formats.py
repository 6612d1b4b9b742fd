"""The same cells in every format that labs have, for tests of reading."""

import gzip
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
from scipy.io import mmwrite
from scipy.sparse import csc_matrix, csr_matrix


def dense(adata: ad.AnnData) -> np.ndarray:
    return adata.X.toarray() if hasattr(adata.X, "toarray") else np.asarray(adata.X)


def h5ad(form: Callable) -> Callable:
    def write(adata: ad.AnnData, folder: Path) -> Path:
        other = adata.copy()
        other.X = form(dense(adata))
        other.write(folder / "cells.h5ad")
        return folder / "cells.h5ad"

    return write


def old_h5ad(adata: ad.AnnData, folder: Path) -> Path:
    """As anndata wrote before version 0.7."""
    path, matrix = folder / "old.h5ad", csr_matrix(dense(adata))
    with h5py.File(path, "w") as file:
        for axis, names in (("obs", adata.obs_names), ("var", adata.var_names)):
            file[axis] = np.array([(name.encode(),) for name in names], dtype=[("index", f"S{names.str.len().max()}")])
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", matrix.shape
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
    return path


def h5mu(adata: ad.AnnData, folder: Path) -> Path:
    mudata.MuData({"rna": adata.copy()}).write(folder / "cells.h5mu")
    return folder / "cells.h5mu"


def tenx_h5(adata: ad.AnnData, folder: Path, peaks: ad.AnnData | None = None) -> Path:
    """Cell Ranger 3 and later; with peaks, as Cell Ranger ARC writes multiome."""
    path = folder / "filtered_feature_bc_matrix.h5"
    parts = [(adata, "Gene Expression")] + ([(peaks, "Peaks")] if peaks is not None else [])
    matrix = csr_matrix(np.concatenate([dense(part) for part, _ in parts], axis=1)).astype(np.int32)
    names = [name for part, _ in parts for name in part.var_names]
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(adata.obs_names, dtype="S")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"] = np.array(matrix.shape[::-1])
        features = group.create_group("features")
        features["id"] = features["name"] = np.array(names, dtype="S")
        features["feature_type"] = np.array([kind for part, kind in parts for _ in range(part.n_vars)], dtype="S")
        features["genome"] = np.array(["GRCh38"] * len(names), dtype="S")
    return path


def tenx_h5_v2(adata: ad.AnnData, folder: Path) -> Path:
    path, matrix = folder / "filtered_gene_bc_matrices.h5", csr_matrix(dense(adata)).astype(np.int32)
    with h5py.File(path, "w") as file:
        group = file.create_group("GRCh38")
        group["barcodes"] = np.array(adata.obs_names, dtype="S")
        group["genes"] = group["gene_names"] = np.array(adata.var_names, dtype="S")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"] = np.array(matrix.shape[::-1])
    return path


def tenx_folder(features: str, zipped: bool, prefix: str = "") -> Callable:
    def write(adata: ad.AnnData, folder: Path) -> Path:
        out = folder / "mtx"
        out.mkdir()
        mmwrite(out / "matrix.mtx", csc_matrix(dense(adata).T.astype(int)))
        kinds = [["Gene Expression"] * adata.n_vars] if features == "features.tsv" else []
        columns = [adata.var_names, adata.var_names, *kinds]
        (out / features).write_text("".join("\t".join(row) + "\n" for row in zip(*columns, strict=True)))
        (out / "barcodes.tsv").write_text("".join(f"{name}\n" for name in adata.obs_names))
        for path in list(out.iterdir()):
            target = path.with_name(prefix + path.name + (".gz" if zipped else ""))
            content = path.read_bytes()
            path.unlink()
            target.write_bytes(gzip.compress(content) if zipped else content)
        return out

    return write


def loom(adata: ad.AnnData, folder: Path) -> Path:
    obs = pd.DataFrame(index=adata.obs_names.rename("CellID"))
    other = ad.AnnData(csr_matrix(dense(adata)), obs, pd.DataFrame(index=adata.var_names.rename("Gene")))
    other.write_loom(folder / "cells.loom")
    return folder / "cells.loom"


def text(name: str, separator: str, turned: bool = False, corner: bool = True, form: str = "%.8g") -> Callable:
    def write(adata: ad.AnnData, folder: Path) -> Path:
        table = pd.DataFrame(dense(adata), adata.obs_names, adata.var_names)
        table = table.T if turned else table
        table.to_csv(folder / name, sep=separator, index_label="" if corner else False, float_format=form)
        return folder / name

    return write


FORMATS = {
    "h5ad csr": h5ad(csr_matrix),
    "h5ad csc": h5ad(csc_matrix),
    "h5ad dense": h5ad(np.asarray),
    "h5ad float64": h5ad(lambda matrix: csr_matrix(matrix.astype(np.float64))),
    "h5ad before 0.7": old_h5ad,
    "h5mu": h5mu,
    "10x h5": tenx_h5,
    "10x h5 v2": tenx_h5_v2,
    "10x folder v2": tenx_folder("genes.tsv", zipped=False),
    "10x folder v2 gz": tenx_folder("genes.tsv", zipped=True),
    "10x folder v3": tenx_folder("features.tsv", zipped=False),
    "10x folder v3 gz": tenx_folder("features.tsv", zipped=True),
    "10x folder of GEO": tenx_folder("features.tsv", zipped=True, prefix="GSM1_sample_"),
    "loom": loom,
    "csv": text("cells.csv", ","),
    "csv genes down": text("cells.csv", ",", turned=True),
    "tsv gz": text("cells.tsv.gz", "\t"),
    "txt of R": text("cells.txt", " ", turned=True, corner=False),
    "semicolons": text("cells.csv", ";"),
}
WHOLE_NUMBERS_ONLY = {name for name in FORMATS if name.startswith("10x")}
