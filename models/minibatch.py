"""The input of a model: a minibatch of cells, whose modalities stay sparse from the file to the first layer."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass
class Ragged:
    """The non-zero entries of B cells, row after row (the CSR form).

    Attributes
    ----------
    indices : [nnz] int64, feature (gene or peak) of each entry, increasing within a cell
    values : [nnz] float32, log-normalised expression, or 1.0 for an open peak
    offsets : [B + 1] int64, cell b owns entries offsets[b] … offsets[b + 1] - 1
    width : number of features
    padded_length : length to which `padded` pads each cell; 0 for the length of the longest cell
    presence : [nnz] float32, 1 where an entry is there and 0 where it is as good as absent, or None for all 1. Its
        gradient at 1 is what removing an entry would change, to first order (utils/predict/explain.py)
    """

    indices: Tensor
    values: Tensor
    offsets: Tensor
    width: int
    padded_length: int = 0
    presence: Tensor | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """[B] number of entries of each cell."""
        return self.offsets.diff()

    @property
    def rows(self) -> Tensor:
        """[nnz] the cell each entry belongs to."""
        cells = torch.arange(len(self), device=self.offsets.device)
        return cells.repeat_interleave(self.lengths, output_size=len(self.indices))

    def keep(self, entries: Tensor) -> "Ragged":
        """The same cells with only the entries where `entries` [nnz] bool is true."""
        counts = torch.zeros_like(self.offsets)
        counts[1:].index_add_(0, self.rows, entries.long())
        presence = None if self.presence is None else self.presence[entries]
        kept = {"indices": self.indices[entries], "values": self.values[entries], "presence": presence}
        return replace(self, **kept, offsets=counts.cumsum(0))

    def dense(self) -> Tensor:
        """[B, width] float32 with zeros where a cell has no entry."""
        out = self.values.new_zeros(len(self), self.width)
        out[self.rows, self.indices] = self.values
        return out

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Entries as rectangles: indices [B, L], values [B, L], valid [B, L]; L is at least 1."""
        longest = self.padded_length or max(int(self.lengths.max()) if len(self) else 0, 1)
        valid = torch.arange(longest, device=self.offsets.device) < self.lengths[:, None]
        indices = self.indices.new_zeros(valid.shape)
        values = self.values.new_zeros(valid.shape)
        indices[valid], values[valid] = self.indices, self.values
        return indices, values, valid


@dataclass
class Minibatch:
    """B cells. Only row, key, weight and step_cells are always present; the stage decides about the rest.

    Attributes
    ----------
    row : [B] int64, position of the cell in its file
    key : [B] int64, seeds everything random about the cell in this epoch (see `models.masking`)
    weight : [B] float32, 1 for a cell, 0 for a repeat that fills up a step or a minibatch
    step_cells : number of cells in the whole optimiser step, over micro-batches and processes
    rna, atac : the measured values
    condition : name → [B, …], what a head is given besides the cell, such as the drug it meets
    target : name → [B, …], what a head learns to predict
    true_pair : [B] bool, false where `atac` was taken from another cell
    latent : modality → [B, latent_dim] float32, the teacher's latents; "cell" → embeddings that were computed before
    """

    row: Tensor
    key: Tensor
    weight: Tensor
    step_cells: int
    rna: Ragged | None = None
    atac: Ragged | None = None
    condition: dict[str, Tensor] | None = None
    target: dict[str, Tensor] | None = None
    true_pair: Tensor | None = None
    latent: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, modality: str) -> Ragged:
        return getattr(self, modality)

    def to(self, device: torch.device | str) -> "Minibatch":
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Minibatch":
        return _map_tensors(self, Tensor.pin_memory)


def _map_tensors(value, function):
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: function(tensor) for name, tensor in value.items()}
    if isinstance(value, Ragged | Minibatch):
        return replace(value, **{f.name: _map_tensors(getattr(value, f.name), function) for f in fields(value)})
    return value
