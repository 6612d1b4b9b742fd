"""What a frozen embedding holds: the same logistic regression on every arm's embedding, tuned on validation cells."""

from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
from scipy.sparse import csr_matrix
from sklearn.preprocessing import StandardScaler

from utils.cells.labels import label_codes, limit_labels
from utils.cells.preprocessed import Cells, read_raw
from utils.evaluate.metrics import classification_scores
from utils.evaluate.principal_components import fit_pca
from utils.evaluate.type_baselines import logistic_regression

SHARES = {"half": 0.5, "quarter": 0.25}
"""Shares of each test cell's RNA counts that are kept."""
COMPONENTS = 50
SUBCLASS_LABELS = 30
"""Labelled cells of each subclass, at most."""


def thinned(out: Path, data_path: Path, barcodes) -> list[str]:
    """Write <out>/half.h5ad and quarter.h5ad, with so many of each cell's RNA counts, and return their names.

    Parameters
    ----------
    out : folder to write to
    data_path : the raw file
    barcodes : of the cells to write
    """
    for name, share in SHARES.items():
        path = out / f"{name}.h5ad"
        if not path.is_file():
            with read_raw(data_path) as file:
                rna = file.content()["rna"][list(barcodes)].copy()
            rna.X = csr_matrix(rna.X, dtype=np.float32)
            totals = np.asarray(rna.X.sum(1)).ravel()
            sc.pp.downsample_counts(rna, counts_per_cell=np.maximum((share * totals).round(), 1), random_state=0)
            rna.write_h5ad(path)
    return list(SHARES)


def probe(
    cells: Cells, files: dict[tuple[str, str], Path], numbers: tuple[int, ...], seed: int, subclass: str | None
) -> list[tuple]:
    """Fit the classifier on each arm's embedding, and score it on test cells.

    Parameters
    ----------
    cells : paired model-ready cells
    files : (arm, thinning) → .h5ad of get_latent_emb.py; thinning is empty for test cells with all their counts
    numbers : labels per type; 0 for all, which is done for the first seed alone
    seed : of the draw of labels
    subclass : column of obs with finer types, which are learned from `SUBCLASS_LABELS` each; None for none

    Returns
    -------
    rows (seed, labels per type, method, measure, value)
    """
    embeddings = {key: ad.read_h5ad(path).to_df() for key, path in files.items()}
    x = cells.values["rna"][np.arange(len(cells.obs))]
    pca = fit_pca(x[cells.rows("train")], COMPONENTS, 0)
    embeddings["50 principal components", ""] = _frame(pca.transform(x), cells)
    arms = list(dict.fromkeys(arm for arm, _ in embeddings))
    tasks = [(None, n) for n in numbers if n or seed == 0] + ([(subclass, SUBCLASS_LABELS)] if subclass else [])
    rows = []
    for column, n in tasks:
        labels = cells.labels(column)
        codes = label_codes(labels, sorted(set(labels.dropna())))
        known = limit_labels(codes, cells, n, seed)
        train, val, test = (cells.rows(part)[(known >= 0)[cells.rows(part)]] for part in ("train", "val", "test"))
        for arm in arms:
            embedding = embeddings[arm, ""]
            scaler = StandardScaler().fit(embedding.loc[cells.obs.index[train]].to_numpy())
            read = lambda where, rows, scaler=scaler: scaler.transform(where.loc[cells.obs.index[rows]].to_numpy())
            fitted, _ = logistic_regression(
                read(embedding, train), labels.iloc[train], read(embedding, val), labels.iloc[val]
            )
            for (name, thinning), where in embeddings.items():
                if name != arm or (thinning and column):
                    continue
                scores = classification_scores(labels.iloc[test].to_numpy(), fitted.predict(read(where, test)))
                method = arm + (f", {thinning} of the RNA" if thinning else "") + (f", {column}" if column else "")
                rows += [(seed, n, method, measure, scores[measure]) for measure in ("accuracy", "macro_f1")]
    return rows


def _frame(values: np.ndarray, cells: Cells):
    return ad.AnnData(values.astype(np.float32), cells.obs[[]]).to_df()
