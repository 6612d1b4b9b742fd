"""Train the head for drug responses on the embeddings of cell lines, and predict with it."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import torch

from models.drug_head import DrugHead, DrugHeadConfig
from models.objectives import OnEmbeddings
from utils.cells.config import IngestConfig
from utils.cells.gene_values import read_gene_values
from utils.cells.minibatches import CellDataset
from utils.cells.preprocessed import read_raw
from utils.errors import UserError, reading
from utils.evaluate.drug_baselines import Means
from utils.evaluate.drug_response import Responses
from utils.features.drugs import Drugs
from utils.predict.cell_embeddings import cell_embeddings, inputs_of
from utils.predict.infer import infer
from utils.predict.query import read_query
from utils.train.config import InferConfig, TrainConfig
from utils.train.distributed import Runtime
from utils.train.model_folder import PRETRAINED, load_model
from utils.train.stage import Stage
from utils.train.tasks import TASKS, Trained, register


class DrugResponse(Trained):
    """ln IC50 of cell lines and drugs; the outputs of a folder are the drugs."""

    name = "drug_response"
    title = "a model of drug responses (python -m downstream.drug_response)"
    shape = DrugHeadConfig
    head = DrugHead


DRUG_RESPONSE = register(DrugResponse())


@dataclass
class Lines:
    """Cell lines as the head reads them.

    Attributes
    ----------
    names : [lines]
    embedding : [lines, width] float32
    expression : [lines, genes] float32 log-normalised, or None
    features, stamp, parents : vocabulary, constants and hash of the model that made the embedding
    report : what was read, one line each
    """

    names: list[str]
    embedding: np.ndarray
    expression: np.ndarray | None = None
    features: dict = field(default_factory=dict)
    stamp: dict = field(default_factory=dict)
    parents: dict = field(default_factory=dict)
    report: list[str] = field(default_factory=list)

    def take(self, names: list[str]) -> "Lines":
        """These lines, in this order."""
        at = {name: row for row, name in enumerate(self.names)}
        rows = [at[name] for name in names]
        expression = None if self.expression is None else self.expression[rows]
        return Lines(names, self.embedding[rows], expression, self.features, self.stamp, self.parents)


def read_lines(
    model_path: str | None, expression_path: str | None, embedding_path: str | None, ingest: IngestConfig, runtime
) -> Lines:
    """Embed cell lines by a model that reads RNA, or read their embeddings.

    Raises
    ------
    UserError
        If the model does not read RNA alone, the embeddings are not finite, or no line has both embedding and
        expression.
    """
    lines = _read_embeddings(embedding_path) if embedding_path else _embed(model_path, expression_path, ingest, runtime)
    if expression_path:
        values, _ = read_gene_values(expression_path, ingest)
        with read_raw(expression_path) as file:
            names = file.modalities["rna"].obs.index.astype(str)
        both = [name for name in lines.names if name in set(names)]
        if not both:
            raise UserError(
                f"{expression_path}: has none of the lines of {embedding_path}; give the same names in both"
            )
        lines.report.append(f"{len(lines.names) - len(both):,} lines with an embedding have no expression")
        lines = Lines(**vars(lines.take(both)) | {"report": lines.report})
        lines.expression = values[names.get_indexer(both)].toarray()
    return lines


def _embed(model_path: str, expression_path: str, ingest: IngestConfig, runtime: Runtime) -> Lines:
    saved = load_model(model_path, *PRETRAINED, *TASKS)
    if inputs_of(saved) != ("rna",):
        reads = " and ".join(inputs_of(saved))
        raise UserError(
            f"{saved.path}: reads {reads}, but cell lines have RNA alone; give the folder of pretrain_rna.py or "
            "pretrain_missing_mod.py"
        )
    with read_raw(expression_path) as file:
        query = read_query(file, saved, ingest, runtime.is_main, ("rna",))
        embedded = cell_embeddings(saved, query, InferConfig(), runtime)
    keep = np.flatnonzero(~query.empty)
    names = embedded.obs_names[keep].astype(str).tolist()
    parents = {"pretrained": saved.hash}
    return Lines(
        names, embedded.X[keep], features=saved.features, stamp=saved.stamp, parents=parents, report=query.report
    )


def _read_embeddings(path: str) -> Lines:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    with reading(path, "is not a readable .h5ad file", "write it with get_latent_emb.py --what cells"):
        embedded = ad.read_h5ad(path)
        values = np.asarray(embedded.X.todense() if hasattr(embedded.X, "todense") else embedded.X, dtype=np.float32)
    if not values.size:
        raise UserError(f"{path}: has no embeddings; write it with get_latent_emb.py --what cells")
    if not embedded.obs_names.is_unique:
        repeated = embedded.obs_names[embedded.obs_names.duplicated()].unique()
        raise UserError(
            f"{path}: {len(repeated):,} lines have several embeddings ({', '.join(repeated[:3])}); keep one of each"
        )
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        named = ", ".join(embedded.obs_names[bad][:3])
        raise UserError(
            f"{path}: {bad.sum():,} embeddings have NaN or infinite values ({named}); leave these lines out"
        )
    parents = {"embedding": str(embedded.uns["model_hash"])} if "model_hash" in embedded.uns else {}
    return Lines(embedded.obs_names.astype(str).tolist(), values, parents=parents, report=[f"{path}: {values.shape}"])


def train_and_predict(
    x: np.ndarray,
    lines: Lines,
    drugs: Drugs,
    sides: dict[str, Responses],
    flags,
    config: TrainConfig,
    folder: Path,
    runtime: Runtime,
) -> dict[str, np.ndarray]:
    """Train a head on the training rows and predict the others with the epoch that was kept.

    Parameters
    ----------
    x : [lines, width] what the head reads of each line
    lines, drugs : their names, and the drugs' structures, numbered as in the rows
    sides : train, val and test → rows
    flags : the script's flags, with `split`, `drug` and `head`
    config : how to train
    folder : the model folder to write
    runtime : this process

    Returns
    -------
    val and test → [rows] ln IC50
    """
    train, x, means = sides["train"], np.ascontiguousarray(x, dtype=np.float32), Means.of(sides["train"])
    # A line or a drug gets a code of its own only where the split leaves it in training.
    shape = DrugHeadConfig(
        drug=flags.drug,
        head=flags.head,
        n_lines=train.n_lines if flags.split in ("drugs", "pairs") else 0,
        n_known=train.n_drugs if flags.split in ("lines", "pairs") else 0,
        n_atoms=drugs.atoms.shape[1] if flags.drug == "graph" else 0,
        n_features=drugs.atoms.shape[2] if flags.drug == "graph" else drugs.fingerprints.shape[1],
    )

    def cells(rows: Responses, resample: bool) -> CellDataset:
        names = [f"{lines.names[line]}/{drugs.names[drug]}" for line, drug in zip(rows.line, rows.drug, strict=True)]
        return CellDataset(
            {},
            names,
            config.seed,
            targets={"ln_ic50": rows.y.astype(np.float32)},
            latents={"cell": x[rows.line]},
            resample=resample,
            conditions={"drug": rows.drug, "line": rows.line + 1},  # 0 stands for an unknown line
        )

    stage = Stage(DRUG_RESPONSE.name, flags, config, runtime, folder)
    stage.parents.update(lines.parents)
    torch.manual_seed(config.seed)
    head = DRUG_RESPONSE.make_head(shape, drugs.names)(x.shape[1])
    head.standardise(torch.from_numpy(x[np.unique(train.line)]))
    graphs = flags.drug == "graph"
    head.set_drugs(
        torch.from_numpy(drugs.atoms if graphs else drugs.fingerprints),
        torch.from_numpy(drugs.bonds) if graphs else None,
    )
    head.set_means(*map(torch.from_numpy, (means.overall + means.drug, means.line, means.spread)))
    datasets = {side: cells(rows, side == "train") for side, rows in sides.items()}
    stage.fit(
        OnEmbeddings(head),
        datasets["train"],
        datasets["val"],
        {"head": shape},
        SimpleNamespace(features=lines.features, stamp=lines.stamp),
        saves=head,
        options={"latent_dim": x.shape[1]},
        outputs=drugs.names,
    )
    head, settings = load_model(folder, DRUG_RESPONSE.name).build(), InferConfig(1024, config.device)

    def answer(batch):
        return (head.decode(head(batch.latent["cell"], batch.key, batch.condition))["ln_ic50"],)

    return {
        side: infer(answer, head, datasets[side], settings, stage.runtime, "responses")[0] for side in ("val", "test")
    }
