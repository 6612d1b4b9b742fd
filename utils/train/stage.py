"""A training run: what every training script needs besides its data, model and objective."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn

from models.objectives import Objective
from utils.cells.minibatches import CellDataset
from utils.cells.preprocessed import Cells, read_cells
from utils.train.config import InferConfig, TrainConfig
from utils.train.continue_from import EarlierEncoder
from utils.train.distributed import Runtime, distributed_run
from utils.train.loop import fit, starts_anew
from utils.train.model_folder import SavedModel, check_fits, check_normalisation, load_model, split_note


@dataclass
class Stage:
    """One training run, with its flags and the folder it writes.

    Attributes
    ----------
    kind : kind of the model folder to write
    flags : the script's own flags
    config : how to train
    runtime : this process
    folder : the model folder to write
    parents : role → hash of a model folder that the run starts from
    """

    kind: str
    flags: object
    config: TrainConfig
    runtime: Runtime
    folder: Path
    parents: dict[str, str] = field(default_factory=dict)

    @property
    def starts_anew(self) -> bool:
        """Whether training starts at the first step, and does not resume an earlier run."""
        return starts_anew(self.folder, self.config, self.runtime)

    @property
    def infer_config(self) -> InferConfig:
        """Settings for running a trained model during this stage."""
        return InferConfig(self.config.batch_size or InferConfig.batch_size, self.config.device, self.config.precision)

    def read(self, *modalities: str) -> Cells:
        """The preprocessed cells of --data_path, in these modalities."""
        return read_cells(self.flags.data_path, modalities, say=self.runtime.say)

    def start_from(self, role: str, path: str, *kinds: str) -> SavedModel:
        """Load a model folder of one of these kinds, and record its hash as the run's parent."""
        model = load_model(path, *kinds)
        self.parents[role] = model.hash
        return model

    def continue_from(self, kind: str, path: str, cells: Cells, given: dict) -> EarlierEncoder:
        """The encoder of an earlier run or an imported folder, for these cells; says how many features are shared.

        Parameters
        ----------
        kind : rna or atac
        path : value of --continue_from
        cells : what to train on
        given : flags of the encoder's shape that stand on the command line, name → value
        """
        parent = self.start_from("continue_from", path, kind)
        check_normalisation(parent, cells.stamp, self.flags.data_path)
        encoder = EarlierEncoder.of(parent, cells.features[kind], self.flags.data_path, given)
        self.runtime.say(encoder.report)
        return encoder

    def check_fits(self, parent: SavedModel, cells: Cells) -> None:
        """Refuse cells whose features or normalisation are not the parent's, and note where their split is another."""
        check_fits(parent, cells.features, cells.stamp, self.flags.data_path)
        if note := split_note(parent, cells.stamp, self.flags.data_path):
            self.runtime.say(note)

    def fit(
        self,
        objective: Objective,
        train: CellDataset,
        val: CellDataset,
        parts: dict,
        like: Cells | SavedModel,
        *,
        saves: nn.Module | None = None,
        options: dict | None = None,
        outputs: list[str] | None = None,
    ) -> dict[str, float]:
        """Train the objective and write the model folder.

        Parameters
        ----------
        objective, train, val : the loss, and the cells
        parts : part of the model → dataclass with its shape
        like : cells or model whose features and preprocessing constants the folder records
        saves : the module whose weights are saved; the objective by default
        options : settings of the composed model (missing, other_modality), or the width of the embeddings that a head
            alone reads (latent_dim)
        outputs : names of the head's outputs

        Returns
        -------
        The metrics of the saved epoch
        """
        saved = SavedModel(
            kind=self.kind,
            config=parts,
            options=options or {},
            features=like.features,
            stamp=like.stamp,
            outputs=outputs or [],
            training=asdict(self.flags) | asdict(self.config),
            parents=self.parents,
        )
        write = saved.writer(objective if saves is None else saves)
        return fit(objective, train, val, self.config, self.runtime, self.folder, write, saved.identity)


@contextmanager
def training_stage(kind: str, flags: object, config: TrainConfig, folder: Path | None = None) -> Iterator[Stage]:
    """Within the block, this process takes part in the training of a model of this kind.

    Parameters
    ----------
    kind, flags, config : see `Stage`
    folder : the model folder to write; by default the one that the flags ckpt_dir and model_name (or model) name
    """
    if folder is None:
        folder = Path(flags.ckpt_dir) / getattr(flags, "model_name", getattr(flags, "model", None))
    with distributed_run(config.device, config.deterministic) as runtime:
        yield Stage(kind, flags, config, runtime, folder)
