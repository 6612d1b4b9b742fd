"""Embeddings of cells, by a model folder of any stage."""

from collections.abc import Callable
from dataclasses import replace

import anndata as ad
from torch import Tensor

from models.minibatch import Minibatch
from models.rna_encoder import RNAEncoder
from utils.errors import UserError
from utils.predict.infer import infer
from utils.predict.query import Query
from utils.train.config import InferConfig
from utils.train.distributed import Runtime
from utils.train.model_folder import SavedModel


def inputs_of(saved: SavedModel) -> tuple[str, ...]:
    """Return the modalities that a model folder of any stage reads."""
    return (saved.kind,) if saved.kind in ("rna", "atac") else saved.model_config.inputs


def without(saved: SavedModel, modality: str) -> SavedModel:
    """Return the joint model of stage II as one that reads the other modality alone, with zeros for this one's latent.

    Raises
    ------
    UserError
        If the folder is of another stage.
    """
    if saved.kind != "multimodal":
        raise UserError(f"--without {modality}: {saved.path} is no folder of pretrain_multimodal.py; leave it out")
    return replace(saved, options=saved.options | {"missing": modality, "other_modality": "zeros"})


def mean_state(encoder: RNAEncoder, batch: Minibatch) -> Tensor:
    """Return the mean state [B, dim] over the genes that each cell expresses; zeros for a cell without any."""
    tokens = encoder.tokenize(batch.rna)
    expressed = tokens.bins > 0 if tokens.valid is None else tokens.valid
    states = encoder(tokens).float() * expressed[..., None]  # [B, L, dim]
    return states.sum(1) / expressed.sum(1, keepdim=True).clamp(min=1)


def cell_embeddings(saved: SavedModel, query: Query, config: InferConfig, runtime: Runtime) -> ad.AnnData:
    """Embed the cells of a file.

    Parameters
    ----------
    saved : model folder of any stage: a composed model gives its multi-omics embedding, an encoder of stage I the mean
        state of the expressed genes or of the patches
    query : the cells, prepared for this model
    config, runtime : how to run the model

    Returns
    -------
    AnnData of cells × width, barcodes as obs_names, with the file's annotation in obs and the model's hash in
    uns["model_hash"]

    Raises
    ------
    UserError
        If an embedding is not finite.
    """
    model = saved.build()
    embed: Callable[[Minibatch], Tensor] = {
        "rna": lambda batch: mean_state(model.encoder, batch),
        "atac": lambda batch: model.encoder(batch.atac)[0][:, 1:].mean(1),  # stage I does not train the pooler
    }.get(saved.kind, getattr(model, "embed", None))
    (embedding,) = infer(lambda batch: (embed(batch),), model, query.dataset(), config, runtime, "cell embeddings")
    obs = query.file.obs.loc[query.barcodes]
    obs = obs if "barcode" in obs else obs.rename_axis("barcode")  # anndata cannot write both
    return ad.AnnData(embedding, obs, uns={"model": saved.name, "model_hash": saved.hash})
