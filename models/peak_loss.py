"""The loss of predicted peaks, whose targets and logits may be too large for memory."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.device import sizes_for
from models.minibatch import Ragged


def peak_bce(logits: Tensor, atac: Ragged, open_weight: float) -> Tensor:
    """Binary cross-entropy of peaks, open ones weighted, mean over a cell's peaks, without a dense target.

    With softplus ζ, a closed peak costs ζ(l) and an open one w·ζ(−l): sum ζ(l) over all, correct at the open ones.

    Parameters
    ----------
    logits : [B, n_peaks], or [k, B, n_peaks] for k predictions of the same cells
    atac : the open peaks
    open_weight : weight w of an open peak

    Returns
    -------
    [B] or [k, B] float32
    """
    logits = logits.float()
    at_open = logits[..., atac.rows, atac.indices]
    correction = (open_weight * F.softplus(-at_open) - F.softplus(at_open)) * atac.values
    corrections = atac.sums(correction) if correction.ndim == 1 else torch.stack([atac.sums(one) for one in correction])
    return (F.softplus(logits).sum(-1) + corrections) / logits.shape[-1]


def decoded_peak_bce(decoder: nn.Linear, embedding: Tensor, atac: Ragged, open_weight: float) -> Tensor:
    """`peak_bce` of a decoder's logits, with at most about as many of them in memory as `models.device` says.

    If there are more, they are computed for one stretch of peaks after another, and again for the gradient.

    Parameters
    ----------
    decoder : latent_dim → n_peaks
    embedding : [B, latent_dim], or [k, B, latent_dim] for k embeddings of the same cells
    atac, open_weight : as in `peak_bce`

    Returns
    -------
    [B] or [k, B] float32
    """

    def stretch(embedding: Tensor, weight: Tensor, bias: Tensor, start: int) -> Tensor:
        stop = start + len(weight)
        part = atac.keep((atac.indices >= start) & (atac.indices < stop))
        part = replace(part, indices=(part.indices - start).clamp(0, len(weight) - 1), width=len(weight))
        return peak_bce(F.linear(embedding, weight, bias), part, open_weight) * (len(weight) / atac.width)

    size = max(sizes_for(embedding.device).logits // max(math.prod(embedding.shape[:-1]), 1), 1)
    if size >= atac.width:
        return peak_bce(decoder(embedding), atac, open_weight)
    loss = embedding.new_zeros(embedding.shape[:-1], dtype=torch.float32)
    starts = range(0, atac.width, size)
    for weight, bias, start in zip(decoder.weight.split(size), decoder.bias.split(size), starts, strict=True):
        loss = loss + checkpoint(stretch, embedding, weight, bias, start, use_reentrant=False, preserve_rng_state=False)
    return loss
