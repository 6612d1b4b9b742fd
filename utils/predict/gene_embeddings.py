"""Embeddings of genes: the mean of a gene's contextual state over the cells that express it."""

import numpy as np
import torch

from models.minibatch import Minibatch
from models.rna_encoder import RNAEncoder
from utils.cells.minibatches import CellDataset
from utils.errors import UserError
from utils.features.gene_vectors import GeneVectors
from utils.predict.infer import stream
from utils.train.config import InferConfig
from utils.train.distributed import Runtime
from utils.train.model_folder import SavedModel


def rna_encoder(saved: SavedModel) -> RNAEncoder:
    """Return the RNA encoder of a model folder of any stage, with its weights.

    Raises
    ------
    UserError
        If the model has none.
    """
    model = saved.build()
    if saved.kind == "rna":
        return model.encoder
    if "rna" not in getattr(model, "towers", {}):
        raise UserError(f"{saved.path}: has no RNA encoder; give the folder of a model that reads RNA")
    return model.towers["rna"].encoder


def gene_embeddings(saved: SavedModel, dataset: CellDataset, config: InferConfig, runtime: Runtime) -> GeneVectors:
    """Average each gene's contextual state over the cells that express it, one minibatch at a time.

    A cell expresses a gene if the gene's bin is above 0, which is the same for both kinds of tokens (`--tokens`). The
    state is that after the encoder's final norm.

    Parameters
    ----------
    saved : model folder of any stage that has an RNA encoder
    dataset : cells with RNA in the model's genes
    config, runtime : how to run the model

    Returns
    -------
    GeneVectors of all the model's genes, on every process: mean states, numbers of cells, and the static embedding.
    Genes that no cell expresses get zeros and 0 cells.

    Raises
    ------
    UserError
        If the model has no RNA encoder, or its states are not finite.
    """
    encoder = rna_encoder(saved)
    place = "cpu" if runtime.device.type == "mps" else runtime.device  # Apple's GPUs have no float64
    sums = torch.zeros(encoder.n_genes, encoder.config.dim, dtype=torch.float64, device=place)
    n_cells = torch.zeros(encoder.n_genes, dtype=torch.float64, device=place)

    def states_of_expressed(batch: Minibatch):
        tokens = encoder.tokenize(batch.rna)
        expressed = (tokens.bins > 0) & (batch.weight > 0)[:, None]  # [B, L]
        if tokens.valid is not None:
            expressed &= tokens.valid
        states = encoder(tokens)  # [B, L, dim]
        genes = tokens.genes.expand(tokens.bins.shape)
        return states[expressed].to(place), genes[expressed].to(place)

    for _, (states, genes) in stream(states_of_expressed, encoder, dataset, config, runtime, "gene embeddings"):
        sums.index_add_(0, genes, states.double())
        n_cells += torch.bincount(genes, minlength=len(n_cells))
    sums, n_cells = runtime.sum_tensor(sums).numpy(), runtime.sum_tensor(n_cells).numpy()
    if not np.isfinite(sums).all():
        raise UserError(
            f"{saved.path}: the states of some genes are not finite; use --precision fp32, or train the model again"
        )
    means = (sums / np.maximum(n_cells, 1)[:, None]).astype(np.float32)
    static = encoder.gene_embedding.weight.detach().float().cpu().numpy()
    return GeneVectors(saved.features["rna"].astype(str), means, n_cells.astype(np.int64), static)
