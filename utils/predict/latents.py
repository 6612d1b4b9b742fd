"""The teacher's latents on disk, by barcode and with the teacher's hash."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from models.shapes import MODALITIES
from utils.cells.preprocessed import Cells, read_raw
from utils.errors import UserError
from utils.files.write import write_whole
from utils.train.model_folder import SavedModel


def write_latents(
    folder: str | Path,
    split: str,
    barcodes: pd.Index,
    embedding: np.ndarray,
    latents: dict[str, np.ndarray],
    teacher_hash: str,
) -> Path:
    """Write `<folder>/<split>.h5ad`.

    Parameters
    ----------
    barcodes : [cells]
    embedding : [cells, latent_dim] joint cell embeddings, kept in X
    latents : modality → [cells, latent_dim], kept in obsm
    teacher_hash : hash of the teacher's model folder
    """
    path = Path(folder) / f"{split}.h5ad"
    obs = pd.DataFrame(index=pd.Index(barcodes, name="barcode"))
    write_whole(ad.AnnData(embedding, obs, obsm=latents, uns={"teacher": teacher_hash}), path)
    return path


def read_latents(folders: dict[str, str], cells: Cells, teacher: SavedModel) -> dict[str, np.ndarray]:
    """Latents of the training and validation cells of a file, matched by barcode.

    Parameters
    ----------
    folders : split → folder with `<split>.h5ad`, or that file
    cells : the cells to train on
    teacher : the model that must have made the latents

    Returns
    -------
    modality → [cells, latent_dim] float32, NaN for cells of other splits

    Raises
    ------
    UserError
        If a file is missing, comes from another teacher, or lacks a cell.
    """
    out = {}
    for split, folder in folders.items():
        rows = cells.rows(split)
        if not len(rows):
            continue
        path = Path(folder) / f"{split}.h5ad" if Path(folder).is_dir() else Path(folder)
        if not path.is_file():
            raise UserError(f"{path}: no such file; run get_latent_emb.py --ckpt_dir {folder} first")
        with read_raw(path) as file:
            latents = file.content()
        if latents.uns.get("teacher") != teacher.hash:
            raise UserError(
                f"{path}: comes from teacher {str(latents.uns.get('teacher'))[:12]}, not from {teacher.path} "
                f"({teacher.hash[:12]}); run get_latent_emb.py with --model_path {teacher.path} again"
            )
        position = latents.obs_names.get_indexer(cells.obs.index[rows])
        if (position < 0).any():
            raise UserError(
                f"{path}: lacks {(position < 0).sum():,} of the {len(rows):,} {split} cells of {cells.path}; "
                f"run get_latent_emb.py with --data_path {cells.path} again"
            )
        for name in MODALITIES:
            latent = latents.obsm[name]
            whole = out.setdefault(name, np.full((len(cells.obs), latent.shape[1]), np.nan, np.float32))
            whole[rows] = latent[position]
    return out
