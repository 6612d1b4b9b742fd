"""Data of trials: cells together with their nearest neighbours, and LSI in the place of a teacher's ATAC latents."""

from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
from mudata import MuData
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.neighbors import NearestNeighbors

from utils.cells.preprocessed import Cells
from utils.evaluate.principal_components import fit_pca
from utils.predict.latents import write_latents

N_NEIGHBOURS = 10
COMPONENTS = 30
LSI_COMPONENTS = 50
TARGET_SUM = 1000


def nearest(raw: MuData, batch: str, k: int = N_NEIGHBOURS) -> sparse.csr_matrix:
    """Return for each cell the nearest cells of the other batches, by the principal components of RNA.

    Parameters
    ----------
    raw : cells with counts
    batch : what is set aside: none of its cells is a neighbour
    k : number of neighbours, without the cell itself

    Returns
    -------
    [cells, cells] with 1 for neighbours
    """
    rna = raw["rna"].copy()
    sc.pp.normalize_total(rna, target_sum=TARGET_SUM)
    sc.pp.log1p(rna)
    known = np.flatnonzero((rna.obs["batch"] != batch).to_numpy())
    x = sparse.csr_matrix(rna.X)
    z = fit_pca(x[known], COMPONENTS, 0).transform(x)
    found = known[NearestNeighbors(n_neighbors=k + 1).fit(z[known]).kneighbors(z, return_distance=False)]
    others = [[j for j in row if j != i][:k] for i, row in enumerate(found)]
    n = len(z)
    return sparse.csr_matrix((np.ones(n * k, np.float32), np.ravel(others), np.arange(n + 1) * k), shape=(n, n))


def with_pooled_atac(raw: MuData, batch: str) -> MuData:
    """Return the cells with ATAC counts added up over each cell and its neighbours; a batch keeps its own."""
    known = sparse.diags((raw["rna"].obs["batch"] != batch).to_numpy().astype(np.float32))
    x = sparse.csr_matrix(raw["atac"].X, dtype=np.float32)
    pooled = raw.copy()
    pooled["atac"].X = sparse.csr_matrix(x + known @ nearest(raw, batch) @ x)
    return pooled


def with_neighbours(raw: MuData, batch: str) -> MuData:
    """Return the cells with the mean RNA counts of their neighbours added to their own."""
    x = sparse.csr_matrix(raw["rna"].X, dtype=np.float32)
    pooled = raw.copy()
    pooled["rna"].X = sparse.csr_matrix(x + nearest(raw, batch) / N_NEIGHBOURS @ x)
    return pooled


def write_lsi(cells: Cells, source: Path, to: Path) -> None:
    """Write latents as get_latent_emb.py does, with LSI of the cells' peaks in the place of the ATAC latent.

    LSI is the truncated SVD of log TF-IDF values. Its first component, which is mostly depth, is left out; the others
    get the spread of the latents that they replace, and the rest of the width is zero.

    Parameters
    ----------
    cells : paired cells
    source, to : folders with train.h5ad and val.h5ad, to read and to write
    """
    parts = {split: ad.read_h5ad(source / f"{split}.h5ad") for split in ("train", "val")}
    peaks = {
        split: sparse.csr_matrix(cells.values["atac"][cells.obs.index.get_indexer(part.obs_names)], dtype=np.float64)
        for split, part in parts.items()
    }
    rarity = np.log1p(peaks["train"].shape[0] / np.maximum(peaks["train"].getnnz(0), 1))

    def tfidf(x: sparse.csr_matrix) -> sparse.csr_matrix:
        share = sparse.diags(1 / np.maximum(np.asarray(x.sum(1)).ravel(), 1))
        return (1e4 * share @ x @ sparse.diags(rarity)).log1p()

    svd = TruncatedSVD(LSI_COMPONENTS + 1, random_state=0).fit(tfidf(peaks["train"]))
    lsi = {split: svd.transform(tfidf(x))[:, 1:] for split, x in peaks.items()}
    latent = parts["train"].obsm["atac"]
    mean, scale = lsi["train"].mean(0), latent.std(0).mean() / lsi["train"].std(0)
    to.mkdir(parents=True, exist_ok=True)
    for split, part in parts.items():
        atac = np.zeros_like(part.obsm["atac"])
        atac[:, :LSI_COMPONENTS] = (lsi[split] - mean) * scale
        latents = {"rna": part.obsm["rna"], "atac": atac}
        write_latents(to, split, part.obs_names, part.X, latents, part.uns["teacher"])
