"""Stage I from the encoder of a model folder, whose genes or peaks may differ from those of the data."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from models.shapes import FEATURES, ATACEncoderConfig, RNAEncoderConfig
from utils.errors import UserError
from utils.train.model_folder import SavedModel
from utils.train.weights import load_strictly

SETTINGS = ("tokens", "binning", "freeze_gene_embedding")
"""Fields of an encoder's shape that change no weight, so that a run may set them anew."""


@dataclass
class EarlierEncoder:
    """The encoder that a run of stage I starts from.

    Attributes
    ----------
    parent : its folder
    modality : rna or atac
    earlier : [n] for each gene or peak of the data, its number among the folder's, -1 for a new one
    shape : shape of the encoder to build; new genes unfreeze the gene embedding, unless the user froze it
    """

    parent: SavedModel
    modality: str
    earlier: np.ndarray
    shape: RNAEncoderConfig | ATACEncoderConfig

    @classmethod
    def of(cls, parent: SavedModel, features: np.ndarray, data_path: str, given: dict) -> "EarlierEncoder":
        """The encoder of a folder, for data with these genes or peaks.

        Parameters
        ----------
        parent : a folder of stage I
        features : [n] genes or peaks of the data
        data_path : its file, for messages
        given : flags of the encoder's shape that stand on the command line, name → value

        Raises
        ------
        UserError
            If a size is given, which the folder has already, or no gene or peak is shared.
        """
        if sizes := [name for name in given if name not in SETTINGS]:
            raise UserError(f"--{sizes[0]}: an encoder of --continue_from has its own sizes; leave the flag out")
        modality = parent.kind
        earlier = pd.Index(parent.features[modality]).get_indexer(pd.Index(features))
        if (earlier < 0).all():
            raise UserError(
                f"{data_path}: shares none of its {len(features):,} {FEATURES[modality]} with {parent.path}, which "
                "--continue_from names; give data with the same names"
            )
        shape = replace(parent.config[modality], **given)
        if (earlier < 0).any() and modality == "rna" and not given.get("freeze_gene_embedding"):
            shape = replace(shape, freeze_gene_embedding=False)  # the new genes must learn
        return cls(parent, modality, earlier, shape)

    @property
    def report(self) -> str:
        """A line on what is shared."""
        what, n, new = FEATURES[self.modality], len(self.earlier), int((self.earlier < 0).sum())
        line = (
            f"{self.parent.path}: {n - new:,} of {n:,} {what} keep their embedding, {new:,} new ones begin at the mean"
        )
        if self.modality == "atac" and not self.is_same and self.shape.patch_maps == "shared":
            return f"{line}; all patches share one map, so each position in it begins at the mean of its peaks"
        was_frozen = getattr(self.parent.config[self.modality], "freeze_gene_embedding", False)
        unfrozen = was_frozen and not self.shape.freeze_gene_embedding
        return line + ("; the gene embedding, frozen before, is trained with them" if unfrozen else "")

    @property
    def is_same(self) -> bool:
        """Whether the data has exactly the folder's genes or peaks, in their order."""
        n = len(self.parent.features[self.modality])
        return len(self.earlier) == n and bool((self.earlier == np.arange(n)).all())

    def load_into(self, objective: nn.Module) -> None:
        """Load the folder's weights into an objective of stage I with this shape and the data's genes or peaks."""
        state = dict(self.parent.state)
        n_old, n_new = len(self.parent.features[self.modality]), len(self.earlier)
        for name, n_rows in self._row_counts(objective).items():
            # The row that a gene or a peak belongs to: its own, or that of its position in a patch.
            old, new = np.arange(n_old) % len(state[name]), np.arange(n_new) % n_rows
            shared = self.earlier >= 0
            state[name] = carry(state[name], old[self.earlier[shared]], new[shared], n_rows)
        load_strictly(objective, state, self.parent.path)

    def _row_counts(self, objective: nn.Module) -> dict[str, int]:
        """Tensors with rows for genes or peaks → their number of rows in the new model."""
        names = ["encoder.gene_embedding.weight"]
        if self.modality == "atac":
            names = ["encoder.peak_rows", "head.to_peaks.weight", "head.to_peaks.bias"]
        fresh = objective.state_dict()
        return {name: len(fresh[name]) for name in names}


def carry(rows: Tensor, old: np.ndarray, new: np.ndarray, n_rows: int) -> Tensor:
    """Carry rows over to a model with other genes or peaks.

    Parameters
    ----------
    rows : [R, …] of the earlier model
    old, new : [shared] the row of each shared gene or peak in the earlier and in the new model
    n_rows : rows of the new model

    Returns
    -------
    [n_rows, …] each the mean of its shared genes' or peaks' earlier rows, or the mean of all rows if it has none
    """
    target = torch.from_numpy(new)
    # In float64, so that the mean of equal rows is that row to the bit.
    sums = torch.zeros(n_rows, *rows.shape[1:], dtype=torch.float64)
    sums.index_add_(0, target, rows[torch.from_numpy(old)].double())
    counts = torch.bincount(target, minlength=n_rows).view(-1, *[1] * (rows.ndim - 1))
    means = torch.where(counts > 0, sums / counts.clamp(min=1), rows.double().mean(0))
    return means.to(rows.dtype)
