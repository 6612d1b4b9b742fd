"""Published checkpoints as model folders.

What a file is follows from the names and shapes of its tensors (`models.published`). Each tensor gets a place in our
model, is kept beside it for export, or is named in the error: nothing is left out silently.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from models import published
from models.published import RNA, WRAPPER
from models.shapes import ATACEncoderConfig, ClassifierConfig, FusionConfig, StudentConfig
from utils.cells.preprocessed import STAMP_VERSION
from utils.cells.reference import read_order
from utils.errors import UserError, reading
from utils.features.normalise import LOG_BASE
from utils.features.peaks import parse_peaks, place_peaks
from utils.files.checkpoint import Checkpoint, check_numbers_of, read_array, read_checkpoint, read_class_names
from utils.train.model_folder import SavedModel
from utils.train.tasks import TRAINED
from utils.train.weights import check_shapes, shapes_of

TARGET_SUM = 1e4
"""Counts per cell after scaling, in all published models."""
EXTRA_TOKEN = "scBERT_last_token"
"""Stands in the list of genes for the token that scBERT adds after the last gene. No file has it, so its bin is 0, as
in the release."""
KEPT = "published.safetensors"
"""File of a model folder with the tensors of its source that no model of ours reads; the export writes them back."""
UNREAD = ("head.mean", "head.deviation", "towers.atac.encoder.mask_token")
"""Tensors of ours that no published model after stage I has."""
ANOTHER = "give the file as it was published"
OTHER_SHAPES = "has tensors of other shapes than a published model's"
LISTS = {
    "gene_reference": "the genes that the model was trained on, in their order",
    "peak_reference": "the peaks that the model was trained on, in their order",
    "labels": "the names of its cell types, in the order of the classifier's outputs",
}


@dataclass(frozen=True)
class Imported:
    """A published model as a model folder.

    Attributes
    ----------
    saved : the model
    kept : tensors of the file that no model of ours reads, under their published names
    names : how the file named its tensors, for export
    report : what was found, one line each
    """

    saved: SavedModel
    kept: dict[str, Tensor]
    names: dict[str, str]
    report: list[str]

    def write(self, folder: Path) -> None:
        """Write all files into an empty folder (see `utils.train.folders.write_folder`)."""
        self.saved.write(folder)
        save_file({name: tensor.contiguous() for name, tensor in self.kept.items()}, folder / KEPT, self.names)


@dataclass
class Source:
    """A published file that was recognised.

    Attributes
    ----------
    file : its tensors
    layout : one of `models.published.LAYOUTS`
    classifier : names of the classifier's two layers, where it is one of scMomer
    """

    file: Checkpoint
    layout: str
    classifier: tuple[str, str]
    shapes: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self):
        self.shapes = self.file.shapes

    @property
    def table(self) -> published.Table:
        """Published name → place in the model."""
        return published.table_of(self.layout, *published.depths(self.shapes), self.classifier)

    @property
    def has_student(self) -> bool:
        """Whether the file holds a student."""
        return any(name.startswith("encoder.encoder.") for name in self.shapes)

    @property
    def has_classes(self) -> bool:
        """Whether the model predicts cell types."""
        return self.layout in ("scbert", "celltype")

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities whose features the model folder must name."""
        if self.layout in ("rna", "scbert", "atac"):
            return ("atac",) if self.layout == "atac" else ("rna",)
        return ("rna",) if self.layout == "celltype" and self.has_student else ("rna", "atac")

    def size(self, name: str, axis: int = 0) -> int:
        """Length of an axis of a tensor, which must be there."""
        return self.shapes[name][axis]


def read_published(path: str | Path) -> Source:
    """Read a published file and recognise its layout.

    Raises
    ------
    UserError
        If the file cannot be read, no layout has such names, or one of its tensors has no place.
    """
    file = read_checkpoint(path, WRAPPER)
    found = published.recognise(file.shapes)
    if found is None:
        raise UserError(
            f"{path}: is no published model, with tensors like {first_names(file.tensors, 3)}; give one of scBERT or "
            "scMomer"
        )
    source = Source(file, *found)
    if extra := file.tensors.keys() - source.table.keys() - published.without_a_place(source.layout):
        raise UserError(f"{path}: {_words(source)} has no tensor named {first_names(extra)}; {ANOTHER}")
    return source


def import_published(
    source: Source,
    gene_reference: str | None,
    peak_reference: str | None,
    gene2vec: str | None,
    labels: str | None,
    atac_heads: int,
    training: dict,
) -> Imported:
    """Make a model folder of a published file.

    Parameters
    ----------
    source : the file
    gene_reference, peak_reference, labels : files with the genes, peaks and classes, in the order of the weights
    gene2vec : .npy of the gene embedding, for a file that lacks it, or to compare
    atac_heads : attention heads of the ATAC encoder, the one size that weights do not show
    training : the settings of the command line, which the folder records

    Raises
    ------
    UserError
        If a list is missing, superfluous or of another length, or a tensor is missing, of another shape, not float32 or
        not finite; the message names it.
    """
    path, report = source.file.path, []
    lists = {"gene_reference": gene_reference, "peak_reference": peak_reference, "labels": labels}
    _check_flags(source, lists, gene2vec)
    remedy = f"give the complete file of {_words(source)}"
    with reading(path, OTHER_SHAPES, remedy):
        try:
            if gene2vec is not None:
                report.append(_with_gene2vec(source, gene2vec))
            config, options = _shape(source, atac_heads)
            features = {}
            if gene_reference is not None:
                features["rna"] = _genes(source, gene_reference, report)
            if peak_reference is not None:
                features["atac"] = _peaks(source, config.get("atac"), peak_reference)
            classes = _classes(source, labels) if labels is not None else []
        except KeyError as error:
            raise UserError(f"{path}: {error.args[0]} is missing; {remedy}") from None
    words = _words(source)
    if source.layout == "rna":  # the same names: scBERT's has the additional token
        words = "scBERT's masked language model" if EXTRA_TOKEN in features["rna"][-1:] else "an RNA encoder of stage I"
    saved = SavedModel(
        kind="celltype" if source.has_classes else source.layout,
        config=config,
        features=features,
        stamp=_stamp(source, features, peak_reference),
        outputs=classes,
        fitted=_fitted_on_no_cells(classes) if classes else {},
        options=options,
        training=training | {"published": words},
        parents={f"{path.name} ({words})": source.file.sha256},
    )
    with reading(path, OTHER_SHAPES, remedy):
        ours = saved.shapes({name: len(names) for name, names in features.items()})
    places = {name: place for name, place in source.table.items() if place.ours in ours}
    on_meta = {name: torch.empty(shape, device="meta") for name, shape in ours.items()}
    found = {name: shape for name, shape in source.shapes.items() if name in places}
    check_shapes(shapes_of(published.to_theirs(on_meta, places)), found, path, remedy=remedy)
    check_numbers_of(source.file, {name for name in source.shapes if name.endswith("calls_since_last_redraw")})
    saved.state = _neutral(ours) | published.to_ours(source.file.tensors, places)
    kept = {name: tensor for name, tensor in source.file.tensors.items() if name not in places}
    report = [
        f"{path.name}: {words}{_sizes(config)}",
        *report,
        f"  {len(found):,} tensors placed, {len(kept):,} that no model here reads kept for export",
        *([f"  not read: {', '.join(source.file.others[:6])}"] if source.file.others else []),
    ]
    names = {"prefix": source.file.prefix, "classifier": " ".join(source.classifier)}
    return Imported(saved, kept, names, report)


def _check_flags(source: Source, lists: dict[str, str | None], gene2vec: str | None) -> None:
    """Refuse a list that is missing, and one that the file has no use for."""
    path, what = source.file.path, _words(source)
    wanted = {"gene_reference": "rna" in source.modalities, "peak_reference": "atac" in source.modalities}
    for flag, is_wanted in (wanted | {"labels": source.has_classes}).items():
        if is_wanted and lists[flag] is None:
            raise UserError(f"--{flag} is missing: {path} is {what}, and does not name {LISTS[flag]}")
        may_be_given = is_wanted or (flag, source.layout) == ("peak_reference", "celltype")
        if lists[flag] is not None and not may_be_given:
            raise UserError(f"--{flag} {lists[flag]}: {path} is {what}, which has none; leave the flag out")
    if gene2vec is not None and not wanted["gene_reference"]:
        raise UserError(f"--gene2vec {gene2vec}: {path} is {what}, which has no genes; leave the flag out")


def _fitted_on_no_cells(classes: list[str]) -> dict:
    """What a classifier has that was never shown a validation cell: its confidence is called uncalibrated."""
    return TRAINED["celltype"].fit_after_training({}, {"cell_type": np.empty(0, np.int64)}, classes)


def _words(source: Source) -> str:
    return published.LAYOUTS[source.layout]


def _sizes(config: dict) -> str:
    """The sizes of the encoders, in words."""
    out = ""
    if rna := config.get("rna"):
        out += f"; RNA: {rna.depth} blocks of width {rna.dim}, {rna.heads} heads of {rna.dim_head}"
        out += f" with {rna.n_features} features, values {'rounded' if rna.binning == 'round' else 'rounded down'}"
    if atac := config.get("atac"):
        out += f"; ATAC: {atac.depth} layers of width {atac.dim}, {atac.n_patches} patches"
        out += f", {atac.heads} heads (--atac_heads: not seen in weights)"
    return out


def first_names(names, most: int = 6) -> str:
    """The first names of tensors."""
    return ", ".join(sorted(names)[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _shape(source: Source, atac_heads: int) -> tuple[dict, dict]:
    """Part of the model → dataclass with its shape, and the options of a composed model."""
    shapes, layout = source.shapes, source.layout
    config, options = {}, {}
    if layout != "atac":
        config["rna"] = published.rna_config(shapes, layout)
    if "atac" in source.modalities:
        config["atac"] = published.atac_config(shapes, layout, atac_heads)
        if config["atac"].dim_head * atac_heads != config["atac"].dim:
            raise UserError(f"--atac_heads {atac_heads} does not divide the width {config['atac'].dim}; give another")
    size = lambda *places: published.agreed(shapes, *places)
    if layout == "scbert":
        hidden = [
            size((f"to_out.fc{i}.bias", 0), (f"to_out.fc{i}.weight", 0), (f"to_out.fc{i + 1}.weight", 1))
            for i in (1, 2)
        ]
        config["fusion"] = FusionConfig(latent_dim=hidden[0])
        config["head"] = ClassifierConfig(hidden[1], classifier_dropout=0.0)
        options = {"missing": "atac", "other_modality": "none"}
    elif layout not in ("rna", "atac"):
        latents = size(*((name, 0) for name in ("rna_projection.weight", "rna_ln.bias", "atac_ln.bias", "to_out.bias")))
        pair = ("sub_task.linear1.bias", 0), ("sub_task.linear1.weight", 0), ("sub_task.linear2.weight", 1)
        config["fusion"] = FusionConfig(latents, *([size(*pair)] if layout != "celltype" else []))
        if layout == "student" or source.has_student:
            student = [(f"encoder.encoder.{name}", 0) for name in ("0.weight", "0.bias", "1.bias")]
            config["student"] = StudentConfig(size(*student))
            options = {"missing": "atac", "other_modality": "student"}
        if layout == "celltype":
            first, second = source.classifier
            config["head"] = ClassifierConfig(
                size((f"{first}.weight", 0), (f"{first}.bias", 0), (f"{second}.weight", 1))
            )
    return config, options


def _genes(source: Source, path: str, report: list[str]) -> np.ndarray:
    """The names of the RNA tokens."""
    genes = read_order(path, "rna", "--gene_reference")
    n_tokens = source.size(_gene_embedding(source))
    if len(genes) == n_tokens - 1:
        report.append(f"  {len(genes):,} genes and one more token, as scBERT has it after the last gene: its bin is 0")
        if source.file.tensors[_gene_embedding(source)][-1].any():
            report.append(f"  warning: that token's embedding is not zero, as scBERT's is; does {path} lack a gene?")
        return np.append(genes, EXTRA_TOKEN)
    if len(genes) != n_tokens:
        raise UserError(
            f"--gene_reference {path}: names {len(genes):,} genes, but {source.file.path} has {n_tokens:,} tokens; "
            "give the list that it was trained on (scBERT's models have one token more than genes)"
        )
    report.append(f"  {len(genes):,} genes")
    return genes


def _gene_embedding(source: Source) -> str:
    return f"{'' if source.layout in ('rna', 'scbert') else RNA}pos_emb.emb.weight"


def _peaks(source: Source, config: ATACEncoderConfig | None, path: str) -> np.ndarray:
    """The names of the peaks, as many as weights have."""
    peaks = read_order(path, "atac", "--peak_reference")
    most = least = source.shapes.get("ATAC.output_mean.0.bias", (len(peaks),))[0]
    if source.layout == "atac":
        # A stage I encoder does not say how many peaks its last patch has.
        patch_size = source.size("embeddings.patch_embeddings.projection.weight", 1)
        least, most = (patch_size - 1) * config.n_patches + 1, patch_size * config.n_patches
    if not least <= len(peaks) <= most:
        count = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        raise UserError(
            f"--peak_reference {path}: names {len(peaks):,} peaks, but {source.file.path} has {count}; give the list "
            "that it was trained on"
        )
    return peaks


def _classes(source: Source, path: str) -> list[str]:
    """The names of the classes, as many as the classifier has outputs."""
    classes = read_class_names(path)
    last = "to_out.fc3.bias" if source.layout == "scbert" else f"{source.classifier[1]}.bias"
    if len(classes) != source.size(last):
        raise UserError(
            f"--labels {path}: names {len(classes):,} classes, but the classifier of {source.file.path} has "
            f"{source.size(last):,}; give the list that it was trained on"
        )
    return classes


def _with_gene2vec(source: Source, path: str) -> str:
    """Add the gene embedding to a file that lacks it, or compare it; returns a line about it."""
    name, flag = _gene_embedding(source), f"--gene2vec {path}"
    given = np.atleast_2d(read_array(path, "--gene2vec"))
    tokens = {"rna": "", "scbert": "to_out.fc1.weight"}.get(source.layout, "rna_projection.weight")
    n_tokens = source.size(name) if name in source.shapes else source.size(tokens, 1) if tokens else len(given)
    dim = source.size(name.replace("pos_emb.emb", "token_emb"), 1)
    if given.ndim != 2 or given.shape[1] != dim or len(given) not in (n_tokens, n_tokens - 1):
        raise UserError(
            f"{flag}: is {' × '.join(map(str, given.shape))}, but {source.file.path} has {n_tokens:,} tokens × {dim}; "
            "give the embedding that it was trained with"
        )
    vectors = torch.zeros(n_tokens, dim)  # scBERT's additional token has zeros
    vectors[: len(given)] = torch.from_numpy(given.astype(np.float32))
    if name not in source.shapes:
        source.file.tensors[name], source.shapes[name] = vectors, (n_tokens, dim)
        return f"  {name} is taken from {path}, as the file lacks it"
    differ = int((source.file.tensors[name] != vectors).any(1).sum())
    if differ:
        return f"  warning: {name} differs from {path} for {differ:,} of {n_tokens:,} tokens; the file's own is kept"
    return f"  {name} is that of {path}"


def _stamp(source: Source, features: dict[str, np.ndarray], peak_reference: str | None) -> dict:
    """The constants of the published preprocessing, as preprocess.py would record them."""
    file = {"name": source.file.path.name, "sha256": source.file.sha256}
    stamp = {"version": STAMP_VERSION, "log_base": LOG_BASE, "label_column": None, "source": [file], "split": {}}
    stamp["simulated"] = False
    if "rna" in features:
        stamp |= {"target_sum": TARGET_SUM, "species": "human"}
    if "atac" in features:
        genomes = place_peaks(parse_peaks(features["atac"]), None, peak_reference).genomes
        stamp["genome"] = genomes[0] if len(genomes) == 1 else None
    return stamp


def _neutral(ours: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Our tensors that no published file has, with values that change nothing."""
    value = {"head.deviation": 1.0}
    return {name: torch.full(ours[name], value.get(name, 0.0)) for name in UNREAD if name in ours}
