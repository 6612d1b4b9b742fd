"""FAVOR+ attention written down as it stands in the paper, with all features stored: what the fast form must equal."""

import torch
from torch import Tensor

from models.favor import FEATURE_EPS


def plain_favor(q: Tensor, k: Tensor, v: Tensor, features: Tensor, valid: Tensor | None = None) -> Tensor:
    """[B, H, L, d] each → [B, H, L, d]."""
    phi_q, phi_k = softmax_features(q, features, False, valid), softmax_features(k, features, True, valid)
    values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    if valid is not None:
        values = values * valid[:, None, :, None]
    out = phi_q @ (phi_k.transpose(-1, -2) @ values)  # [B, H, L, m] · [B, H, m, d + 1]
    return out[..., :-1] / out[..., -1:]


def plain_attention(x, to_q, to_k, to_v, to_out, bias, features, valid=None) -> Tensor:
    """The layer around it: [B, L, D] → [B, L, D]."""
    q, k, v = ((x @ to.T).unflatten(-1, (-1, features.shape[1])).transpose(1, 2) for to in (to_q, to_k, to_v))
    return plain_favor(q, k, v, features, valid).transpose(1, 2).flatten(2) @ to_out.T + bias


def softmax_features(x: Tensor, features: Tensor, per_cell: bool, valid: Tensor | None) -> Tensor:
    """φ(x) [B, H, L, m]; the largest projection is that of a cell (keys) or of a token (queries), padding left out."""
    scale = x.shape[-1] ** -0.25
    projected = (x * scale) @ features.T
    half_norm = x.square().sum(-1, keepdim=True) * (scale**2 / 2)
    top = projected.detach().amax(-1, keepdim=True)
    if valid is not None:
        padding = ~valid[:, None, :, None]
        top = top.masked_fill(padding, -torch.inf)
        half_norm = half_norm.masked_fill(padding, torch.inf)
    if per_cell:
        top = top.amax((1, 2), keepdim=True)
    top = top.masked_fill(top.isinf(), 0.0)
    return (torch.exp(projected - (half_norm + top)) + FEATURE_EPS) * features.shape[0] ** -0.5
