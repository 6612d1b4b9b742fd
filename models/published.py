"""The published checkpoints' parameter names, translated into ours.

A published file holds `{"model_state_dict": {...}}`; sometimes its names have the prefix `module.`. Only names and
layouts are translated here. A weight without a place in our model raises a KeyError, and `load_state_dict` is strict
about missing ones.
"""

import torch
from torch import Tensor

State = dict[str, Tensor]


def strip_module(state: State) -> State:
    """Names without the prefix that a distributed wrapper leaves."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def rna_encoder(state: State) -> State:
    """Performer encoder with its embeddings and final norm; the stage-I head `to_out` is ignored."""
    rest = strip_module(state)
    out = _rna_encoder(rest)
    _expect_empty(rest, "to_out.weight", "to_out.bias")
    return out


def atac_encoder(state: State) -> State:
    """Patch transformer with its embeddings, final norm and pooler; the stage-I head `decoder_pred` is ignored."""
    rest = strip_module(state)
    out = _atac_encoder(rest)
    _expect_empty(rest)
    return out


def scmomer(state: State) -> State:
    """The joined model of stages II and III, with its student."""
    rest = strip_module(state)
    out = _rna_encoder(rest, "rna_model.model.", "towers.rna.encoder.")
    out |= _atac_encoder(rest, "atac_model.", "towers.atac.encoder.")
    pooling = "rna_model.model.to_out.conv1."
    out |= {
        "towers.rna.pooling.scalar.weight": rest.pop(pooling + "weight").flatten(1),
        "towers.rna.pooling.scalar.bias": rest.pop(pooling + "bias"),
        "student.embed.weight": rest.pop("encoder.encoder.0.weight").T,
        "student.embed.bias": rest.pop("encoder.encoder.0.bias"),
    }
    table = {
        "rna_projection": "towers.rna.pooling.projection",
        "rna_ln": "towers.rna.norm",
        "atac_projection": "towers.atac.projection",
        "atac_ln": "towers.atac.norm",
        "to_out": "fusion.linear",
        "RNA.output_mean.0": "decoders.rna",
        "ATAC.output_mean.0": "decoders.atac",
        "sub_task.linear1": "pair_head.layers.0",
        "sub_task.linear2": "pair_head.layers.2",
        "encoder.encoder.1": "student.norm",
        "encoder.encoder.4": "student.to_latent",
    }
    out |= _take(rest, "", table)
    _expect_empty(rest)
    return out


def _take(rest: State, prefix: str, table: dict[str, str], into: str = "") -> State:
    """Move `prefix` + key (weight and bias together) out of `rest`, under the table's names."""
    out = {}
    for source, target in table.items():
        for kind in ("", ".weight", ".bias"):
            if prefix + source + kind in rest:
                out[into + target + kind] = rest.pop(prefix + source + kind)
    return out


def _expect_empty(rest: State, *ignored: str) -> None:
    unknown = sorted(rest.keys() - set(ignored))
    if unknown:
        raise KeyError(f"weights without a place in the model: {', '.join(unknown[:5])}")


def _rna_encoder(rest: State, prefix: str = "", into: str = "") -> State:
    table = {"token_emb": "token_embedding", "pos_emb.emb": "gene_embedding", "norm": "norm"}
    depth = sum(name.startswith(prefix) and name.endswith("fast_attention.projection_matrix") for name in rest)
    for i in range(depth):
        attention, feed_forward = f"performer.net.layers.{i}.0.", f"performer.net.layers.{i}.1."
        table |= {
            attention + "norm": f"blocks.{i}.attention_norm",
            attention + "fn.fast_attention.projection_matrix": f"blocks.{i}.attention.features",
            feed_forward + "norm": f"blocks.{i}.feed_forward_norm",
            feed_forward + "fn.fn.w1": f"blocks.{i}.feed_forward.0",
            feed_forward + "fn.fn.w2": f"blocks.{i}.feed_forward.2",
        }
        table |= {
            f"{attention}fn.{name}": f"blocks.{i}.attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out")
        }
    rest.pop(prefix + "performer.calls_since_last_redraw", None)  # a counter; our redraws are a function of the step
    return _take(rest, prefix, table, into)


def _atac_encoder(rest: State, prefix: str = "", into: str = "") -> State:
    projection, dim = prefix + "embeddings.patch_embeddings.projection", rest[prefix + "layernorm.bias"].shape
    out = {
        into + "peak_rows": rest.pop(projection + ".weight").T,
        into + "patch_bias": rest.pop(projection + ".bias"),
        into + "cls_token": rest.pop(prefix + "embeddings.cls_token").reshape(dim),
        # checkpoints of stage II and later have none
        into + "mask_token": rest.pop(prefix + "embeddings.mask_token", torch.zeros(dim)).reshape(dim),
        into + "positions": rest.pop(prefix + "embeddings.position_embeddings")[0],
    }
    table = {"layernorm": "norm", "pooler.dense": "pooler"}
    depth = sum(name.startswith(prefix) and name.endswith("attention.query.weight") for name in rest)
    for i in range(depth):
        layer = f"encoder.layer.{i}."
        table |= {
            layer + "layernorm_before": f"blocks.{i}.attention_norm",
            layer + "attention.output.dense": f"blocks.{i}.to_out",
            layer + "layernorm_after": f"blocks.{i}.feed_forward_norm",
            layer + "intermediate.dense": f"blocks.{i}.feed_forward.0",
            layer + "output.dense": f"blocks.{i}.feed_forward.2",
        }
        for kind in ("weight", "bias"):
            parts = [
                rest.pop(f"{prefix}{layer}attention.attention.{name}.{kind}") for name in ("query", "key", "value")
            ]
            out[f"{into}blocks.{i}.to_qkv.{kind}"] = torch.cat(parts)
    # Of stage I; later checkpoints keep them.
    for name in ("loss_fn.pos_weight", "decoder_pred.weight", "decoder_pred.bias"):
        rest.pop(prefix + name, None)
    return out | _take(rest, prefix, table, into)
