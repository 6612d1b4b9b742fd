"""The published checkpoints' parameter names, translated into ours.

A published file holds `{"model_state_dict": {...}}`, its names at times prefixed with `module.`. Only names and layouts
are translated here; `load_state_dict` stays strict, so whatever has no place is an error.
"""

import torch
from torch import Tensor

State = dict[str, Tensor]


def strip_module(state: State) -> State:
    """Names without the prefix that a distributed wrapper leaves."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _renamed(state: State, prefix: str, table: dict[str, str], into: str = "") -> State:
    """Parameters whose name is `prefix` + a key of `table`, under the table's value; weights and biases together."""
    out = {}
    for source, target in table.items():
        for kind in ("", ".weight", ".bias"):
            if prefix + source + kind in state:
                out[into + target + kind] = state[prefix + source + kind]
    return out


def rna_encoder(state: State, prefix: str = "", into: str = "") -> State:
    """Performer encoder with its embeddings and final norm."""
    table = {"token_emb": "token_embedding", "pos_emb.emb": "gene_embedding", "norm": "norm"}
    depth = sum(name.startswith(prefix) and name.endswith("fast_attention.projection_matrix") for name in state)
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
    return _renamed(state, prefix, table, into)


def atac_encoder(state: State, prefix: str = "", into: str = "") -> State:
    """Patch transformer with its embeddings, final norm and pooler."""
    projection = prefix + "embeddings.patch_embeddings.projection"
    dim = state[projection + ".bias"].shape
    out = {
        into + "peak_rows": state[projection + ".weight"].T,
        into + "patch_bias": state[projection + ".bias"],
        into + "cls_token": state[prefix + "embeddings.cls_token"].reshape(dim),
        # checkpoints of stage II and later have dropped it
        into + "mask_token": state.get(prefix + "embeddings.mask_token", torch.zeros(dim)).reshape(dim),
        into + "positions": state[prefix + "embeddings.position_embeddings"][0],
    }
    table = {"layernorm": "norm", "pooler.dense": "pooler"}
    depth = sum(name.startswith(prefix) and name.endswith("attention.query.weight") for name in state)
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
            parts = [state[f"{prefix}{layer}attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            out[f"{into}blocks.{i}.to_qkv.{kind}"] = torch.cat(parts)
    return out | _renamed(state, prefix, table, into)


def scmomer(state: State) -> State:
    """The joined model of stages II and III, with its student."""
    state = strip_module(state)
    pooling = "rna_model.model.to_out.conv1."
    out = rna_encoder(state, "rna_model.model.", "towers.rna.encoder.")
    out |= atac_encoder(state, "atac_model.", "towers.atac.encoder.")
    out |= {
        "towers.rna.pooling.scalar.weight": state[pooling + "weight"].flatten(1),
        "towers.rna.pooling.scalar.bias": state[pooling + "bias"],
        "student.embed.weight": state["encoder.encoder.0.weight"].T,
        "student.embed.bias": state["encoder.encoder.0.bias"],
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
    return out | _renamed(state, "", table)
