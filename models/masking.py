"""Which genes and patches are hidden, as a pure function of a cell's key.

Every cell carries one 64-bit `key` per epoch, made from (seed, epoch, barcode). All random numbers here are hashes of
that key and of the gene or patch they are for. So a mask depends neither on the minibatch nor on the number of
processes; a resumed run draws the masks of the uninterrupted one; validation cells, whose key never changes, have the
same mask in every epoch.

Polarity, here and everywhere: in a mask, True means hidden from the encoder or to be predicted. (`valid` is no mask: it
marks tokens that are not padding.)

Streams keep the draws of one cell apart: 0 target genes, 1 shown masks, 2 patches, 3 and 4 dropped genes and peaks,
5 the student's dropout, 6 and 7 the head's.
"""

import torch
from torch import Tensor, nn

from models.minibatch import Ragged

# Multipliers and shifts of the SplitMix64 generator (Steele, Lea & Flood 2014), as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; `>>` on signed integers would fill with the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64: a bijection of int64 whose outputs look independent."""
    x = x + _GAMMA
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(key: Tensor, item: Tensor, stream: int = 0) -> Tensor:
    """Uniform random numbers in [0, 1), one for each (cell, item).

    Parameters
    ----------
    key : [B] int64
    item : [N] or [B, N] int64, what the number is for: a gene's or patch's index
    stream : separates independent draws for the same cell and item

    Returns
    -------
    [B, N] float32
    """
    cell = mix(mix(key) + stream)
    bits = mix(cell[:, None] ^ mix(item))
    return _shift_right(bits, 40).float() * 2.0**-24


def hide_lowest(score: Tensor, eligible: Tensor, ratio: float) -> Tensor:
    """Mark in each row the eligible places with the lowest scores: the share `ratio` of them, and at least one.

    Parameters
    ----------
    score : [B, N] float32 in [0, 1)
    eligible : [B, N] bool
    ratio : share of the eligible places, 0 … 1

    Returns
    -------
    [B, N] bool
    """
    n_hidden = count_hidden(eligible.sum(1), ratio)
    rank = score.masked_fill(~eligible, 2.0).argsort(dim=1, stable=True).argsort(dim=1)  # [B, N] 0 = lowest
    return (rank < n_hidden[:, None]) & eligible


def count_hidden(n_eligible: Tensor, ratio: float) -> Tensor:
    """How many of `n_eligible` [...] int64 places are hidden: the share `ratio`, and at least one, if there is one."""
    return (n_eligible * ratio).round().long().clamp(min=1).minimum(n_eligible)


def most_hidden(n: int, ratio: float) -> int:
    """How many of at most `n` eligible places are hidden at most, for shapes that do not depend on values."""
    return int(count_hidden(torch.tensor(n), ratio))


def places(mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The places where a mask is true, in a fixed shape.

    Parameters
    ----------
    mask : [B, N] bool
    n : at least the number of true places in each row

    Returns
    -------
    [B, n] int64, the true places of each row in increasing order, then zeros; [B, n] bool, false for these zeros
    """
    slot = torch.where(mask, mask.cumsum(1) - 1, n)
    items = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    found = items.new_zeros(len(mask), n + 1).scatter(1, slot, items)[:, :n]
    return found, torch.arange(n, device=mask.device) < mask.sum(1, keepdim=True)


def mask_genes(
    key: Tensor, genes: Tensor, expressed: Tensor, ratio: float = 0.15, show_mask: float = 0.9
) -> tuple[Tensor, Tensor]:
    """Choose the genes to predict among the expressed ones (bin > 0).

    Parameters
    ----------
    key : [B] int64
    genes : [L] or [B, L] int64
    expressed : [B, L] bool
    ratio : share of the expressed genes that become targets
    show_mask : share of the targets that show the mask token; the others show their true bin

    Returns
    -------
    target, hidden : [B, L] bool, hidden ⊆ target ⊆ expressed
    """
    target = hide_lowest(uniform(key, genes), expressed, ratio)
    return target, target & (uniform(key, genes, stream=1) < show_mask)


def mask_patches(key: Tensor, n_patches: int, ratio: float = 0.15) -> Tensor:
    """[B, n_patches] bool, true for the patches of peaks to hide and predict."""
    patches = torch.arange(n_patches, device=key.device)
    score = uniform(key, patches, stream=2)
    return hide_lowest(score, torch.ones_like(score, dtype=torch.bool), ratio)


def drop_features(key: Tensor, cells: Ragged, ratio: float, stream: int = 3) -> Ragged:
    """Leave out each non-zero entry with probability `ratio`, as if it had not been measured.

    Parameters
    ----------
    key : [B] int64
    cells : B cells
    ratio : 0 … 1
    stream : a different one for each modality
    """
    score = uniform(key[cells.rows], cells.indices[:, None], stream).squeeze(1)  # [nnz]
    return cells.keep(score >= ratio)


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of the cell's key: the same units drop in any minibatch and on any process.

    Parameters
    ----------
    rate : share of the units that are set to zero while training; the others are scaled by 1 / (1 - rate)
    stream : separates this layer's draws from those of other layers
    """

    def __init__(self, rate: float, stream: int):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"a dropout rate is at least 0 and below 1, not {rate}")
        self.rate, self.stream = rate, stream

    def forward(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        """x [B, D] and the cells' keys [B] → [B, D]; the keys are needed only while training."""
        if not (self.training and self.rate):
            return x
        if key is None:
            raise ValueError("dropout needs the keys of the cells while training")
        kept = uniform(key, torch.arange(x.shape[1], device=x.device), self.stream) >= self.rate  # [B, D]
        return x * kept / (1 - self.rate)
