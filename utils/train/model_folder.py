"""Saved models: a folder that is enough by itself, written whole, loaded strictly, without pickle."""

import json
import math
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.atac_encoder import ATACEncoder
from models.objectives import MaskedATAC, MaskedRNA
from models.rna_encoder import RNAEncoder
from models.scmomer import ScMomer
from models.shapes import (
    FEATURES,
    ATACEncoderConfig,
    ClassifierConfig,
    FusionConfig,
    RNAEncoderConfig,
    ScMomerConfig,
    StudentConfig,
)
from utils import __version__
from utils.errors import UserError, reading
from utils.evaluate.calibration import Calibration
from utils.train.folders import read_folder
from utils.train.weights import check_declared, check_finite, check_shapes, load_strictly, shapes_of, stored_shapes

KINDS = {
    "rna": "an RNA encoder (pretrain_rna.py)",
    "atac": "an ATAC encoder (pretrain_atac.py)",
    "multimodal": "a multimodal model (pretrain_multimodal.py)",
    "student": "a model with a student (pretrain_missing_mod.py)",
    "celltype": "a cell type model (train_missing_celltype_func.py)",
}
CONFIGS = {
    "rna": RNAEncoderConfig,
    "atac": ATACEncoderConfig,
    "fusion": FusionConfig,
    "student": StudentConfig,
    "classifier": ClassifierConfig,
}


@dataclass
class SavedModel:
    """A model as it lies in its folder.

    Attributes
    ----------
    kind : one of KINDS
    config : the model's shape, part → dataclass
    state : weights by name
    features : modality → vocabulary, in the model's order
    stamp : constants of the preprocessing
    labels : cell types in the order of the logits
    temperature : divisor of the logits that calibrates probabilities
    calibration : the validation cells that it was fitted on, or None before it was
    options : settings of the composed model (missing, other_modality)
    training : the command line's settings
    parents : script's flag → hash of the folder given there
    path, hash : where it was loaded from, and the SHA-256 of its manifest
    """

    kind: str
    config: dict
    features: dict[str, np.ndarray]
    stamp: dict
    state: dict[str, Tensor] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    temperature: float = 1.0
    calibration: Calibration | None = None
    options: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    hash: str = ""

    def writer(self, module: nn.Module) -> Callable[[Path], None]:
        """A function that writes this folder with the module's weights as they are when it is called."""
        return lambda folder: replace(self, state=module.state_dict()).write(folder)

    @property
    def identity(self) -> dict:
        """What makes this training run another than others: its settings and the models it starts from."""
        return self.training | {"parents": self.parents}

    def write(self, folder: Path) -> None:
        """Write all files into an empty folder (see `utils.train.folders.write_folder`)."""
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.state.items()}, folder / WEIGHTS)
        for name, features in self.features.items():
            (folder / f"{FEATURES[name]}.txt").write_text("".join(f"{feature}\n" for feature in features))
        (folder / "config.json").write_text(
            json.dumps(
                {
                    "kind": self.kind,
                    "model": {name: asdict(config) for name, config in self.config.items()},
                    "options": self.options,
                    "labels": self.labels,
                    "temperature": self.temperature,
                    "calibration": None if self.calibration is None else asdict(self.calibration),
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

    def card(self) -> str:
        """The model card: what it is, made from what, for what."""
        sizes = ", ".join(f"{len(names):,} {FEATURES[name]}" for name, names in self.features.items())
        shape = "\n".join(f"- {name}: {asdict(config)}" for name, config in self.config.items())
        labels = f"\nCell types: {', '.join(self.labels)}\n" if self.labels else ""
        if self.calibration is not None:
            labels += f"\nTemperature {self.temperature:.3f}; {self.calibration}.\n"
        parents = "".join(f"- {flag}: {digest}\n" for flag, digest in self.parents.items()) or "- none\n"
        return (
            f"# scMomer: {KINDS[self.kind]}\n\n{sizes}; {sum(t.numel() for t in self.state.values()):,} numbers "
            "(trained and frozen weights, constants).\n\n"
            f"Made by `python {Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}`\n{labels}\n"
            f"## Shape\n{shape}\n\n## Preprocessing\n{json.dumps(self.stamp)}\n\n## Made from\n{parents}\n"
            "## Use\nResearch. The model knows the genes, peaks and cell types in this folder, of the cells it "
            "was trained on, and no others.\n"
        )

    @property
    def is_simulated(self) -> bool:
        """Whether the model was trained on simulated cells, so that its labels say nothing about real ones."""
        return bool(self.stamp.get("simulated"))

    @property
    def model_config(self) -> ScMomerConfig:
        """Shape of the composed model of stages II and later."""
        with reading(self.path, *NO_MODEL):
            return ScMomerConfig(**self.config, **self.options)

    def build(self) -> ScMomer:
        """The composed model of stages II and later, with its weights."""
        with reading(self.path, *NO_MODEL):
            model = self._fresh({name: len(features) for name, features in self.features.items()})
        older = {name: x for name, x in model.state_dict().items() if name in NEUTRAL and name not in self.state}
        load_strictly(model, older | self.state, self.path)
        return model.eval()

    def _fresh(self, n_features: dict[str, int]) -> nn.Module:
        """The module whose weights are saved, without them."""
        if self.kind == "rna":
            return MaskedRNA(RNAEncoder(self.config["rna"], n_features["rna"]), seed=0)
        if self.kind == "atac":
            return MaskedATAC(ATACEncoder(self.config["atac"], n_features["atac"]))
        return ScMomer(self.model_config, n_features.get("rna", 0), n_features.get("atac", 0), len(self.labels))

    def check(self, n_features: dict[str, int], stored: dict[str, tuple[int, ...]]) -> None:
        """Compare the model that is declared with the weights' shapes; nothing of its size is built.

        Raises
        ------
        UserError
            If they do not fit, or a constant makes no sense.
        """
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on parts without a single feature
            expected = shapes_of(self._fresh(n_features).state_dict())
        check_shapes(expected, stored, self.path, NEUTRAL)
        constants = {"temperature": self.temperature}
        if "rna" in n_features:
            constants["target_sum"] = self.stamp.get("target_sum")
        for name, value in constants.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and math.isfinite(value) and value > 0):
                raise UserError(f"{self.path / 'config.json'}: {name} is {value}, not a positive number; {NO_MODEL[1]}")


WEIGHTS = "model.safetensors"
NEUTRAL = ("classifier.mean", "classifier.deviation")  # not in older folders; fresh ones change nothing
NO_MODEL = ("is not a valid model folder", "restore the folder, or train the model again")


def load_model(path: str | Path, *kinds: str) -> SavedModel:
    """Load a model folder, checking every file's hash.

    Parameters
    ----------
    path : the folder
    kinds : which of KINDS are accepted

    Raises
    ------
    UserError
        If the folder is damaged or of another kind, its weights are not those of the model it declares, or one of
        its numbers is not finite.
    """

    def load(place: Path, digest: str) -> SavedModel:
        with reading(path, *NO_MODEL):
            return _load(place, Path(path), digest, kinds)

    return read_folder(path, load, WEIGHTS, "config.json")


def _load(place: Path, folder: Path, digest: str, kinds: tuple[str, ...]) -> SavedModel:
    """Read what lies at `place`; messages name `folder`."""
    saved = json.loads((place / "config.json").read_text())
    if saved["kind"] not in kinds:
        wanted = " or ".join(KINDS[kind] for kind in kinds)
        raise UserError(f"{folder}: holds {KINDS.get(saved['kind'], saved['kind'])}; expected {wanted}")
    stored = stored_shapes(place / WEIGHTS)
    check_declared(saved["model"], saved["kind"], stored, folder / "config.json")
    model = SavedModel(
        kind=saved["kind"],
        config={name: CONFIGS[name](**shape) for name, shape in saved["model"].items()},
        features={},
        stamp=saved["preprocessing"],
        labels=saved["labels"],
        temperature=saved["temperature"],
        calibration=_calibration(saved.get("calibration")),
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
            raise ValueError(f"{path.name} names one of them twice")
    model.state = load_file(place / WEIGHTS)
    check_finite(model.state, folder / WEIGHTS)
    return model


def _count_lines(path: Path) -> int:
    """Lines of a text file, which may be far too long to be kept."""
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def _calibration(kept: dict | None) -> Calibration | None:
    """As `SavedModel.write` kept it; folders of earlier versions have none."""
    return None if kept is None else Calibration(kept["n_cells"], kept["n_types"], tuple(kept["few"]))


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights below `prefix`, under their names there."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def load_parts(module: nn.Module, state: dict[str, Tensor], new: str | tuple, path: str | Path | None) -> None:
    """Load a parent's weights into a model that has some parts more, and perhaps others less.

    Parameters
    ----------
    module : the model
    state : the parent's weights
    new : prefix or prefixes of what the parent may not have (it keeps its fresh weights)
    path : the parent's folder, for messages
    """
    names = module.state_dict()
    fresh = {name: tensor for name, tensor in names.items() if name.startswith(new)}
    load_strictly(module, fresh | {name: state[name] for name in names if name in state}, path)


def check_fits(model: SavedModel, features: dict[str, np.ndarray], stamp: dict, data_path: str | Path) -> None:
    """Refuse data whose genes or peaks are not the model's, or that was normalised with other constants.

    Parameters
    ----------
    model : the model that is to see the data
    features, stamp : vocabularies and preprocessing constants of the data
    data_path : for the message

    Raises
    ------
    UserError
        If they differ; the message says in what, and what to do.
    """
    for name in model.features.keys() & features.keys():
        if not np.array_equal(model.features[name], features[name]):
            raise UserError(
                f"{data_path}: its {len(features[name])} {FEATURES[name]} are not the {len(model.features[name])} "
                f"of {model.path}, in their order; give the preprocessed file that the model was made from"
            )
    both_have_rna = "rna" in model.features and "rna" in features  # ATAC is not normalised
    for name in ("target_sum", "log_base") if both_have_rna else ():
        if model.stamp.get(name) != stamp.get(name):
            raise UserError(
                f"{data_path}: was normalised with {name} {stamp.get(name)}, but {model.path} with "
                f"{model.stamp.get(name)}; preprocess the raw file with --target_sum {model.stamp.get('target_sum')}"
            )
