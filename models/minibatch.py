"""The input of a model: a minibatch of cells, whose modalities stay sparse from the file to the first layer."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from models.device import is_cpu


@dataclass
class Ragged:
    """The non-zero entries of B cells, row after row (the CSR form).

    On a GPU, entries that are left out stay, with the value 0: to count the others, the CPU would have to wait.

    Attributes
    ----------
    indices : [nnz] int64, feature (gene or peak) of each entry, increasing within a cell
    values : [nnz] float32, log-normalised expression, or 1.0 for an open peak
    offsets : [B + 1] int64, cell b owns entries offsets[b] … offsets[b + 1] - 1
    width : number of features
    padded_length : length to which `padded` pads each cell; 0 for the length of the longest cell
    presence : [nnz] float32, 1 where an entry is there and 0 where it is as good as absent, or None for all 1. Its
        gradient at 1 is what removing an entry would change, to first order (utils/predict/explain.py)
    longest : an upper bound for the entries of a cell, known without looking at the device; 0 if it is unknown
    """

    indices: Tensor
    values: Tensor
    offsets: Tensor
    width: int
    padded_length: int = 0
    presence: Tensor | None = None
    longest: int = 0

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
        """The same cells with only the entries where `entries` [nnz] bool is true; on a GPU the others become 0."""
        if not is_cpu(entries):
            return replace(self, values=self.values * entries)
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
        length = self.padded_length or self._length()
        valid = torch.arange(length, device=self.offsets.device) < self.lengths[:, None]
        return self._rectangle(self.indices, length), self._rectangle(self.values, length), valid

    def sums(self, values: Tensor) -> Tensor:
        """Sum numbers of the entries [nnz] over each cell: [B].

        A GPU would add in any order, and wait for its own writes to one address: it sums the rows of a rectangle.
        """
        if is_cpu(values):
            return values.new_zeros(len(self)).index_add(0, self.rows, values)
        return self._rectangle(values, self._length()).sum(1)

    def _length(self) -> int:
        """Entries of the longest cell, at least 1; on a GPU its upper bound, if that is known."""
        if self.longest and not is_cpu(self.offsets):
            return self.longest
        return max(int(self.lengths.max()) if len(self) else 0, 1)

    def _rectangle(self, values: Tensor, length: int) -> Tensor:
        """Numbers of the entries [nnz] as rows [B, length], 0 behind the last entry of a cell."""
        rows = self.rows
        place = torch.arange(len(rows), device=rows.device) - self.offsets[rows]
        return values.new_zeros(len(self), length).index_put((rows, place), values)


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
