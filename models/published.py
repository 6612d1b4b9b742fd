"""The published checkpoints' parameter names and ours: one table for each layout, read in both directions.

A table gives each published name its place in our model. `to_ours` and `to_theirs` only rename, transpose, reshape, cut
and join, so one after the other returns the very same bits. scBERT's names, of its masked language model and of its
classifier, are the RNA encoder's without a prefix.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.shapes import ATACEncoderConfig, RNAEncoderConfig

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

LAYOUTS = {
    "rna": "an RNA encoder of stage I, or scBERT's masked language model",
    "scbert": "a classifier of scBERT",
    "atac": "an ATAC encoder of stage I",
    "multimodal": "a joined model of stage II",
    "student": "a joined model of stage III, with a student",
    "celltype": "a joined model with a classifier of cell types",
}
"""The layouts of published files, in words; all but scbert have the names of our kinds of model folders."""
RNA, ATAC = "rna_model.model.", "atac_model."
"""Prefixes of the two encoders in a joined model."""
WRAPPER = "module."
"""Prefix that a distributed wrapper puts before all names of a file."""
CLASSIFIER = ("classifier.linear1", "classifier.linear2")
"""Names that the two layers of a classifier are exported with. In a file they are recognised by their shapes."""
OPEN_WEIGHT = 20.0


@dataclass(frozen=True)
class Place:
    """Where a published tensor lies in our model.

    Attributes
    ----------
    ours : name of our tensor
    turned : whether ours is the transpose
    lead : number of leading axes of length 1 that ours does not have
    third : 0, 1 or 2 where ours is the first, second or last third of the rows; None where it is the whole
    """

    ours: str
    turned: bool = False
    lead: int = 0
    third: int | None = None


Table = dict[str, Place]


def to_ours(state: State, table: Table) -> State:
    """Published tensors under our names; queries, keys and values are joined. Names outside the table are left out.

    Raises
    ------
    KeyError
        If one of three tensors that are joined is missing; the name is the exception's.
    """
    out, joined = {}, {}
    for name, place in table.items():
        if place.third is not None:
            joined.setdefault(place.ours, []).append(name)
        elif name in state:
            tensor = state[name].reshape(state[name].shape[place.lead :])
            out[place.ours] = tensor.T if place.turned else tensor
    for ours, names in joined.items():
        if any(name in state for name in names):
            out[ours] = torch.cat([state[name] for name in names])
    return out


def to_theirs(state: State, table: Table) -> State:
    """Our tensors under their published names; the inverse of `to_ours`."""
    out = {}
    for name, place in table.items():
        if place.ours not in state:
            continue
        tensor = state[place.ours]
        if place.third is not None:
            tensor = tensor.chunk(3)[place.third]
        tensor = tensor.T if place.turned else tensor
        out[name] = tensor.reshape((1,) * place.lead + tensor.shape).contiguous()
    return out


def table_of(layout: str, rna_depth: int, atac_depth: int, classifier: tuple[str, str] = CLASSIFIER) -> Table:
    """Published name → place in the model of our kind.

    Parameters
    ----------
    layout : one of LAYOUTS
    rna_depth, atac_depth : blocks of the encoders
    classifier : names of the classifier's two layers, for the layout celltype
    """
    if layout == "rna":
        return _rna_encoder(rna_depth, "", "encoder.") | _linear("to_out", "head")
    if layout == "atac":
        mask = {"embeddings.mask_token": Place("encoder.mask_token", lead=2)}
        return _atac_encoder(atac_depth, "", "encoder.") | mask | _linear("decoder_pred", "head.to_peaks")
    if layout == "scbert":
        return (
            _rna_encoder(rna_depth, "", "towers.rna.encoder.")
            | _gene_scalar("to_out.")
            | _linear("to_out.fc1", "towers.rna.pooling.projection")
            | _linear("to_out.fc2", "head.layers.1")
            | _linear("to_out.fc3", "head.layers.4")
        )
    table = (
        _rna_encoder(rna_depth, RNA, "towers.rna.encoder.")
        | _atac_encoder(atac_depth, ATAC, "towers.atac.encoder.")
        | _gene_scalar(RNA + "to_out.")
        | {"rna_projection.weight": Place("towers.rna.pooling.projection.weight")}
        | {"atac_projection.weight": Place("towers.atac.projection.weight")}
        | _linear("rna_ln", "towers.rna.norm")
        | _linear("atac_ln", "towers.atac.norm")
        | _linear("to_out", "fusion.linear")
        | _linear("RNA.output_mean.0", "decoders.rna")
        | _linear("ATAC.output_mean.0", "decoders.atac")
        | _linear("sub_task.linear1", "pair_head.layers.0")
        | _linear("sub_task.linear2", "pair_head.layers.2")
    )
    if layout == "multimodal":
        return table
    table |= {
        "encoder.encoder.0.weight": Place("student.embed.weight", turned=True),
        "encoder.encoder.0.bias": Place("student.embed.bias"),
        **_linear("encoder.encoder.1", "student.norm"),
        **_linear("encoder.encoder.4", "student.to_latent"),
    }
    if layout == "celltype":
        table |= _linear(classifier[0], "head.layers.1") | _linear(classifier[1], "head.layers.4")
    return table


def _linear(theirs: str, ours: str) -> Table:
    """Weight and bias of a layer, of a linear one or of a norm."""
    return {f"{theirs}.{kind}": Place(f"{ours}.{kind}") for kind in ("weight", "bias")}


def _gene_scalar(prefix: str) -> Table:
    """One number per gene: a convolution over genes as wide as their states."""
    return {
        f"{prefix}conv1.weight": Place("towers.rna.pooling.scalar.weight", lead=2),
        f"{prefix}conv1.bias": Place("towers.rna.pooling.scalar.bias"),
    }


def _rna_encoder(depth: int, prefix: str, into: str) -> Table:
    table = {
        f"{prefix}token_emb.weight": Place(f"{into}token_embedding.weight"),
        f"{prefix}pos_emb.emb.weight": Place(f"{into}gene_embedding.weight"),
    }
    for i in range(depth):
        attention, feed = f"{prefix}performer.net.layers.{i}.0.", f"{prefix}performer.net.layers.{i}.1."
        block = f"{into}blocks.{i}."
        table |= _linear(f"{attention}norm", f"{block}attention_norm")
        table[f"{attention}fn.fast_attention.projection_matrix"] = Place(f"{block}attention.features")
        for name in ("to_q", "to_k", "to_v"):
            table[f"{attention}fn.{name}.weight"] = Place(f"{block}attention.{name}.weight")
        table |= _linear(f"{attention}fn.to_out", f"{block}attention.to_out")
        table |= _linear(f"{feed}norm", f"{block}feed_forward_norm")
        table |= _linear(f"{feed}fn.fn.w1", f"{block}feed_forward.0")
        table |= _linear(f"{feed}fn.fn.w2", f"{block}feed_forward.2")
    return table | _linear(f"{prefix}norm", f"{into}norm")


def _atac_encoder(depth: int, prefix: str, into: str) -> Table:
    embeddings = f"{prefix}embeddings."
    table = {
        f"{embeddings}cls_token": Place(f"{into}cls_token", lead=2),
        f"{embeddings}position_embeddings": Place(f"{into}positions", lead=1),
        f"{embeddings}patch_embeddings.projection.weight": Place(f"{into}peak_rows", turned=True),
        f"{embeddings}patch_embeddings.projection.bias": Place(f"{into}patch_bias"),
    }
    for i in range(depth):
        layer, block = f"{prefix}encoder.layer.{i}.", f"{into}blocks.{i}."
        for third, name in enumerate(("query", "key", "value")):
            for kind in ("weight", "bias"):
                place = Place(f"{block}to_qkv.{kind}", third=third)
                table[f"{layer}attention.attention.{name}.{kind}"] = place
        table |= _linear(f"{layer}attention.output.dense", f"{block}to_out")
        table |= _linear(f"{layer}intermediate.dense", f"{block}feed_forward.0")
        table |= _linear(f"{layer}output.dense", f"{block}feed_forward.2")
        table |= _linear(f"{layer}layernorm_before", f"{block}attention_norm")
        table |= _linear(f"{layer}layernorm_after", f"{block}feed_forward_norm")
    return table | _linear(f"{prefix}layernorm", f"{into}norm") | _linear(f"{prefix}pooler.dense", f"{into}pooler")


def constants(layout: str) -> State:
    """Names that a file has beside its weights, with the values that we export: a counter, and a weight of a loss.

    Our redraws of random features follow from the step, and need no counter.
    """
    out = {}
    if layout != "atac":
        prefix = "" if layout in ("rna", "scbert") else RNA
        out[f"{prefix}performer.calls_since_last_redraw"] = torch.tensor(0)
    if layout not in ("rna", "scbert"):
        out[f"{'' if layout == 'atac' else ATAC}loss_fn.pos_weight"] = torch.tensor([OPEN_WEIGHT])
    return out


def without_a_place(layout: str) -> set[str]:
    """Names that a file may have or lack, and that no model of ours reads: constants, and leftovers of stage I."""
    leftovers = {"decoder_pred.weight", "decoder_pred.bias", "embeddings.mask_token"}
    is_joined = layout not in ("rna", "scbert", "atac")
    return constants(layout).keys() | ({ATAC + name for name in leftovers} if is_joined else set())


def recognise(shapes: Shapes) -> tuple[str, tuple[str, str]] | None:
    """The layout that names and shapes of tensors belong to, and the names of its classifier's two layers.

    Parameters
    ----------
    shapes : name → shape, names without the prefix of a distributed wrapper

    Returns
    -------
    Layout, one of LAYOUTS, and two names, which only the layout celltype uses; None if no layout has such names
    """
    some = lambda *starts: any(name.startswith(starts) for name in shapes)
    if some("rna_model.", "rna_projection."):
        table = table_of("student", *depths(shapes))
        rest = shapes.keys() - table.keys() - without_a_place("student")
        if classifier := _classifier(rest, shapes):
            return "celltype", classifier
        return ("student" if some("encoder.encoder.") else "multimodal"), CLASSIFIER
    if some("performer.", "token_emb."):
        return ("scbert" if some("to_out.conv1.", "to_out.fc") else "rna"), CLASSIFIER
    return ("atac", CLASSIFIER) if some("encoder.layer.", "embeddings.") else None


def _classifier(rest: Iterable[str], shapes: Shapes) -> tuple[str, str] | None:
    """The two linear layers that four names belong to, the one after the other; None if they are anything else."""
    layers = sorted({name.rpartition(".")[0] for name in rest})
    if sorted(rest) != sorted(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")) or len(layers) != 2:
        return None
    weights = {layer: shapes[f"{layer}.weight"] for layer in layers}
    if any(len(shape) != 2 for shape in weights.values()):
        return None
    embedding = {
        shapes[name][0] for name in ("to_out.bias", "to_out.weight", "rna_projection.weight") if name in shapes
    }
    for first, second in (layers, layers[::-1]):
        if weights[second][1] == weights[first][0] and weights[first][1] in embedding:
            return first, second
    return None


def depths(shapes: Iterable[str]) -> tuple[int, int]:
    """Number of blocks of the RNA and of the ATAC encoder: as many as names have numbers."""
    found = []
    for pattern in (r"performer\.net\.layers\.(\d+)\.", r"encoder\.layer\.(\d+)\."):
        found.append(len({match[1] for name in shapes if (match := re.search(pattern, name))}))
    return found[0], found[1]


def agreed(shapes: Shapes, *places: tuple[str, int]) -> int:
    """The size that most tensors show, each at its axis; so a single wrong one is named when shapes are compared.

    Parameters
    ----------
    shapes : name → shape
    places : name of a tensor and its axis; those that are missing do not count

    Raises
    ------
    KeyError
        If all of them are missing; the first name is the exception's.
    """
    sizes = Counter(shapes[name][axis] for name, axis in places if name in shapes)
    if not sizes:
        raise KeyError(places[0][0])
    return sizes.most_common(1)[0][0]


def rna_config(shapes: Shapes, layout: str) -> RNAEncoderConfig:
    """Sizes of the RNA encoder of a file. Stage I of the release and scBERT round values down; later stages round.

    Raises
    ------
    KeyError
        If the tensors that show a size are missing; the name of one is the exception's.
    """
    is_alone = layout in ("rna", "scbert")
    prefix, depth = "" if is_alone else RNA, depths(shapes)[0]
    blocks = [f"{prefix}performer.net.layers.{i}." for i in range(depth)]
    features = [f"{block}0.fn.fast_attention.projection_matrix" for block in blocks]
    widths = ("token_emb.weight", 1), ("pos_emb.emb.weight", 1), ("norm.bias", 0)
    dim = agreed(shapes, *((prefix + name, axis) for name, axis in widths))
    dim_head = agreed(shapes, *((name, 1) for name in features))
    inner = agreed(
        shapes, *((f"{block}0.fn.{name}.weight", 0) for block in blocks for name in ("to_q", "to_k", "to_v"))
    )
    return RNAEncoderConfig(
        dim=dim,
        depth=depth,
        heads=inner // dim_head,
        dim_head=dim_head,
        n_features=agreed(shapes, *((name, 0) for name in features)),
        ff_mult=agreed(shapes, *((f"{block}1.fn.fn.w1.bias", 0) for block in blocks)) // dim,
        tokens="all",
        freeze_gene_embedding=True,
        binning="floor" if is_alone else "round",
    )


def atac_config(shapes: Shapes, layout: str, heads: int) -> ATACEncoderConfig:
    """Sizes of the ATAC encoder of a file; `heads` is the one that weights do not show.

    Raises
    ------
    KeyError
        If the tensors that show a size are missing; the name of one is the exception's.
    """
    prefix, depth = "" if layout == "atac" else ATAC, depths(shapes)[1]
    layers = [f"{prefix}encoder.layer.{i}." for i in range(depth)]
    positions = f"{prefix}embeddings.position_embeddings"
    dim = agreed(shapes, (positions, 2), (f"{prefix}embeddings.cls_token", 2), (f"{prefix}layernorm.bias", 0))
    parts = [f"{layer}attention.attention.{name}.bias" for layer in layers for name in ("query", "key", "value")]
    return ATACEncoderConfig(
        n_patches=agreed(shapes, (positions, 1)) - 1,  # the first position is the CLS token's
        dim=dim,
        depth=depth,
        heads=heads,
        dim_head=agreed(shapes, *((name, 0) for name in parts)) // heads,
        ff_mult=agreed(shapes, *((f"{layer}intermediate.dense.bias", 0) for layer in layers)) // dim,
    )
