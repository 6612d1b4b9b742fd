"""Saved models: a self-contained folder, written as a whole, loaded strictly and without pickle."""

import json
import platform
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import numpy as numpy_file
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import utils.train.cell_types  # noqa: F401  # registers the task, so that its folders are known
from models.atac_encoder import ATACEncoder
from models.objectives import MaskedATAC, MaskedRNA
from models.rna_encoder import RNAEncoder
from models.scmomer import ScMomer
from models.shapes import (
    FEATURES,
    ATACEncoderConfig,
    FusionConfig,
    RNAEncoderConfig,
    ScMomerConfig,
    StudentConfig,
)
from utils import __version__
from utils.errors import UserError, reading
from utils.train.folders import read_folder
from utils.train.hub import HUB, address_of, front_matter, local_folder
from utils.train.tasks import TRAINED, Trained, check_positive
from utils.train.weights import (
    Shapes,
    check_declared,
    check_finite,
    check_shapes,
    load_strictly,
    shapes_of,
    stored_shapes,
)

PRETRAINED = {
    "rna": "an RNA encoder (pretrain_rna.py)",
    "atac": "an ATAC encoder (pretrain_atac.py)",
    "multimodal": "a multimodal model (pretrain_multimodal.py)",
    "student": "a model with a student (pretrain_missing_mod.py)",
}
"""The kinds of folders without a head, in words; those with one are the tasks'."""
CONFIGS = {
    "rna": RNAEncoderConfig,
    "atac": ATACEncoderConfig,
    "fusion": FusionConfig,
    "student": StudentConfig,
}
"""Part of a model → dataclass with its shape; the head's is its task's."""
ASSAYS = {"rna": "scRNA-seq", "atac": "scATAC-seq"}


def in_words(kind: str) -> str:
    """A kind of model folder, with the script that makes it."""
    return TRAINED[kind].title if kind in TRAINED else PRETRAINED.get(kind, kind)


@dataclass
class SavedModel:
    """A model and everything else in its folder.

    Attributes
    ----------
    kind : one of PRETRAINED, or the name of a task
    config : the shape of each part, name → dataclass
    state : weights by name
    features : modality → vocabulary, in the model's order
    stamp : constants of the preprocessing
    outputs : names of the head's outputs, in their order (for cell types, the types)
    fitted : what the task fitted on validation cells after training (for cell types, the temperature)
    arrays : the larger part of what the task fitted (for cell types, the boxed baselines), name → array
    options : settings of the composed model (missing, other_modality); latent_dim where the folder holds a head alone
    training : the settings of the command line
    parents : role → hash of a model folder that training started from
    path, hash : the folder it was loaded from, and the SHA-256 of its manifest
    address : where it was downloaded from, hf://owner/name; empty for a local folder
    """

    kind: str
    config: dict
    features: dict[str, np.ndarray]
    stamp: dict
    state: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    fitted: dict = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    hash: str = ""
    address: str = ""

    @property
    def name(self) -> str:
        """What outputs call the model: the folder's name, or owner/name on the hub."""
        return self.address.removeprefix(HUB) if self.address else self.path.resolve().name

    def writer(self, module: nn.Module) -> Callable[[Path], None]:
        """A function that writes this folder with the weights that the module has when it is called."""
        return lambda folder: replace(self, state=module.state_dict()).write(folder)

    @property
    def identity(self) -> dict:
        """What identifies this training run: its settings, the shapes of its parts and the models it starts from."""
        shapes = {name: value for part in self.config.values() for name, value in asdict(part).items()}
        return self.training | shapes | {"parents": self.parents}

    def write(self, folder: Path) -> None:
        """Write all files into an empty folder (see `utils.train.folders.write_folder`)."""
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.state.items()}, folder / WEIGHTS)
        if self.arrays:
            numpy_file.save_file({name: np.ascontiguousarray(x) for name, x in self.arrays.items()}, folder / ARRAYS)
        for name, features in self.features.items():
            (folder / f"{FEATURES[name]}.txt").write_text("".join(f"{feature}\n" for feature in features))
        (folder / "config.json").write_text(
            json.dumps(
                {
                    "kind": self.kind,
                    "model": {name: asdict(config) for name, config in self.config.items()},
                    "options": self.options,
                    "outputs": self.outputs,
                    "fitted": self.fitted,
                    "preprocessing": self.stamp,
                    "training": self.training,
                    "parents": self.parents,
                    "versions": {
                        "scmomer": __version__,
                        "python": platform.python_version(),
                        "torch": torch.__version__,
                    },
                },
                indent=1,
            )
        )
        (folder / "README.md").write_text(self.card())

    def front_matter(self, license: str = "unknown", **more: str) -> str:
        """The lines of the card that the Hugging Face hub reads (see `utils.train.hub.front_matter`).

        The licence of the weights follows from the data and the user's choice, which this program does not know.
        """
        pipeline = self.task.pipeline if self.task else "feature-extraction"
        tags = ["biology", "single-cell", *(ASSAYS[name] for name in self.features), f"scmomer-{self.kind}"]
        return front_matter(pipeline, tags + ["simulated"] * self.is_simulated, license, **more)

    def card(self) -> str:
        """The model card, in Markdown."""
        sizes = ", ".join(f"{len(names):,} {FEATURES[name]}" for name, names in self.features.items())
        shape = "\n".join(f"- {name}: {asdict(config)}" for name, config in self.config.items())
        head = f"\nPredicts: {', '.join(self.outputs)}\n" if self.outputs else ""
        if self.task is not None and (fitted := self.task.describe(self.fitted)):
            head += f"\nFitted on validation cells: {fitted}.\n{self.task.card(self.fitted)}"
        parents = "".join(f"- {flag}: {digest}\n" for flag, digest in self.parents.items()) or "- none\n"
        return self.front_matter() + (
            f"# scMomer: {in_words(self.kind)}\n\n{sizes}; {sum(t.numel() for t in self.state.values()):,} numbers "
            "(trained and frozen weights, constants).\n\n"
            f"Made by `python {Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}`\n{head}\n"
            f"## Shape\n{shape}\n\n## Preprocessing\n{json.dumps(self.stamp)}\n\n## Made from\n{parents}\n"
            "## Use\nResearch. The model knows the genes, peaks and outputs in this folder, from the cells that "
            "it was trained on, and no others.\n"
        )

    @property
    def is_simulated(self) -> bool:
        """Whether the model was trained on simulated cells, so that its predictions mean nothing for real ones."""
        return bool(self.stamp.get("simulated"))

    @property
    def task(self) -> Trained | None:
        """What the model predicts; None without a head."""
        return TRAINED.get(self.kind)

    @property
    def model_config(self) -> ScMomerConfig:
        """The shape of the composed model (stage II and later), without its head."""
        with reading(self.path, *NO_MODEL):
            parts = {name: shape for name, shape in self.config.items() if name != "head"}
            return ScMomerConfig(**parts, **self.options)

    def need_both(self) -> None:
        """Raise a UserError if the folder of stage II has learned from one modality alone."""
        if len(self.features) < 2:
            raise UserError(
                f"{self.path}: has learned from {' '.join(self.features).upper()} alone and cannot be a teacher; run "
                "pretrain_multimodal.py with both encoders"
            )

    def build(self) -> nn.Module:
        """The module with its weights: of stage I its objective, a head that stands alone, or the composed model."""
        with reading(self.path, *NO_MODEL):
            model = self._fresh({name: len(features) for name, features in self.features.items()})
        older = {name: x for name, x in model.state_dict().items() if name in NEUTRAL and name not in self.state}
        load_strictly(model, older | self.state, self.path)
        return model.eval()

    def _fresh(self, n_features: dict[str, int]) -> nn.Module:
        """The module whose weights the folder holds, with fresh weights."""
        if self.kind == "rna":
            return MaskedRNA(RNAEncoder(self.config["rna"], n_features["rna"]), seed=0)
        if self.kind == "atac":
            return MaskedATAC(ATACEncoder(self.config["atac"], n_features["atac"]))
        make_head = self.task and self.task.make_head(self.config["head"], self.outputs)
        if "latent_dim" in self.options:
            return make_head(self.options["latent_dim"])
        return ScMomer(self.model_config, n_features.get("rna", 0), n_features.get("atac", 0), make_head)

    def shapes(self, n_features: dict[str, int]) -> Shapes:
        """Names and shapes of the weights of the declared model, which is not built."""
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of parts without any feature
            return shapes_of(self._fresh(n_features).state_dict())

    def check(self, n_features: dict[str, int], stored: dict[str, tuple[int, ...]]) -> None:
        """Compare the declared model with the shapes of the weights, without building it.

        Raises
        ------
        UserError
            If they differ, or a constant is impossible.
        """
        check_shapes(self.shapes(n_features), stored, self.path, NEUTRAL)
        try:
            if "rna" in n_features:
                check_positive("target_sum", self.stamp.get("target_sum"))
            if self.task:
                self.task.check(self.fitted)
        except ValueError as error:
            raise UserError(f"{self.path / 'config.json'}: {error}; {NO_MODEL[1]}") from error


WEIGHTS, ARRAYS = "model.safetensors", "fitted.safetensors"
NEUTRAL = ("head.mean", "head.deviation")  # absent from folders of version 0.1; fresh values change nothing
NO_MODEL = ("is not a valid model folder", "restore the folder, or train the model again")


def load_model(path: str | Path, *kinds: str) -> SavedModel:
    """Load a model folder, checking every file's hash.

    Parameters
    ----------
    path : the folder, or its address on the Hugging Face hub (see `utils.train.hub.local_folder`)
    kinds : which kinds are accepted

    Raises
    ------
    UserError
        If the folder cannot be downloaded, is damaged or of another kind, its weights do not belong to the declared
        model, or a number is not finite.
    """
    folder, address = local_folder(path), address_of(path)

    def load(place: Path, digest: str) -> SavedModel:
        with reading(folder, *NO_MODEL):
            return _load(place, folder, digest, kinds)

    try:
        saved = read_folder(folder, load, WEIGHTS, "config.json")
    except UserError as error:
        if address:
            raise UserError(f"{error} (downloaded to {folder})".replace(str(folder), address, 1)) from error
        raise
    saved.address = address
    return saved


def _load(place: Path, folder: Path, digest: str, kinds: tuple[str, ...]) -> SavedModel:
    """Read the folder at `place`; messages name `folder`, where it belongs when no writer replaces it."""
    saved = json.loads((place / "config.json").read_text())
    if saved["kind"] not in kinds:
        wanted = " or ".join(map(in_words, kinds))
        raise UserError(f"{folder}: holds {in_words(saved['kind'])}; expected {wanted}")
    current_name = str
    if "outputs" not in saved:
        saved, current_name = _from_version_0_2(saved), lambda name: re.sub("^classifier[.]", "head.", name)
    stored = {current_name(name): shape for name, shape in stored_shapes(place / WEIGHTS).items()}
    check_declared(saved["model"], saved["kind"], stored, folder / "config.json")
    shapes = CONFIGS | ({"head": TRAINED[saved["kind"]].shape} if saved["kind"] in TRAINED else {})
    model = SavedModel(
        kind=saved["kind"],
        config={name: shapes[name](**shape) for name, shape in saved["model"].items()},
        features={},
        stamp=saved["preprocessing"],
        outputs=saved["outputs"],
        fitted=saved["fitted"],
        options=saved["options"],
        training=saved["training"],
        parents=saved["parents"],
        path=folder,
        hash=digest,
    )
    lists = {name: place / f"{file}.txt" for name, file in FEATURES.items() if (place / f"{file}.txt").is_file()}
    n_features = {name: _count_lines(path) for name, path in lists.items()}
    model.check(n_features, stored)
    for name, path in lists.items():
        names = model.features[name] = np.array(path.read_text().splitlines())
        if len(set(names)) != n_features[name]:
            raise ValueError(f"{path.name} has a repeated line")
    model.state = {current_name(name): tensor for name, tensor in load_file(place / WEIGHTS).items()}
    check_finite(model.state, folder / WEIGHTS)
    if model.task:
        model.arrays = numpy_file.load_file(place / ARRAYS) if (place / ARRAYS).is_file() else {}
        width = 0 if "latent_dim" in model.options else sum(n_features[name] for name in model.model_config.inputs)
        model.task.check_arrays(model.arrays, model.fitted, width, len(model.outputs))
    return model


def _count_lines(path: Path) -> int:
    """Number of lines of a text file that may be too large for memory."""
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def _from_version_0_2(saved: dict) -> dict:
    """A configuration of version 0.2, which knew cell types as the only head, in its present form."""
    model = {"head" if name == "classifier" else name: shape for name, shape in saved["model"].items()}
    fitted = {name: saved[name] for name in ("temperature", "calibration") if saved.get(name) is not None}
    return saved | {"model": model, "outputs": saved["labels"], "fitted": fitted}


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def load_parts(module: nn.Module, state: dict[str, Tensor], new: str | tuple, path: str | Path | None) -> None:
    """Load a parent's weights into a model with some new parts, and perhaps without some of the parent's.

    Parameters
    ----------
    module : the model
    state : the parent's weights
    new : prefix or prefixes under which a weight that the parent lacks stays fresh
    path : the parent's folder, for messages
    """
    names = module.state_dict()
    fresh = {name: tensor for name, tensor in names.items() if name.startswith(new)}
    load_strictly(module, fresh | {name: state[name] for name in names if name in state}, path)


def check_fits(model: SavedModel, features: dict[str, np.ndarray], stamp: dict, data_path: str | Path) -> None:
    """Refuse data with other genes or peaks than the model's, or with another normalisation.

    Parameters
    ----------
    model : the model that will read the data
    features, stamp : vocabularies and preprocessing constants of the data
    data_path : the data's file, for the message

    Raises
    ------
    UserError
        If they differ; the message names the difference and the remedy.
    """
    for name in model.features.keys() & features.keys():
        if not np.array_equal(model.features[name], features[name]):
            raise UserError(
                f"{data_path}: its {len(features[name])} {FEATURES[name]} are not the {len(model.features[name])} "
                f"of {model.path}, in their order; give the preprocessed file that the model was made from"
            )
    if "rna" in features:
        check_normalisation(model, stamp, data_path)


def split_note(model: SavedModel, stamp: dict, data_path: str | Path) -> str:
    """Return a note where a model was trained on cells that were split otherwise; empty where not, or if unknown.

    Parameters are those of `check_fits`.
    """
    if not model.stamp.get("split") or model.stamp["split"] == stamp.get("split"):
        return ""
    return (
        f"note: {data_path} has another split than the cells that {model.path} was trained on; if they are the same "
        "cells, some of those set aside here may have been training cells there"
    )


def check_normalisation(model: SavedModel, stamp: dict, data_path: str | Path) -> None:
    """Refuse data whose RNA was normalised in another way than the model's; ATAC is not normalised.

    Parameters are those of `check_fits`.
    """
    for name in ("target_sum", "log_base") if "rna" in model.features else ():
        if model.stamp.get(name) != stamp.get(name):
            raise UserError(
                f"{data_path}: was normalised with {name} {stamp.get(name)}, but {model.path} with "
                f"{model.stamp.get(name)}; preprocess the raw file with --target_sum {model.stamp.get('target_sum')}"
            )
