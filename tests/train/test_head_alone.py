"""A head that is trained on embeddings from before, under conditions, in a folder of its own."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from models.heads import Head
from models.objectives import OnEmbeddings
from models.shapes import RNAEncoderConfig
from utils.cells.minibatches import CellDataset
from utils.errors import UserError
from utils.predict.infer import infer
from utils.train.config import InferConfig, TrainConfig
from utils.train.distributed import Runtime
from utils.train.folders import write_folder
from utils.train.model_folder import SavedModel, load_model
from utils.train.stage import training_stage
from utils.train.tasks import TRAINED, Trained, register

WIDTH, N_DRUGS = 4, 3


@dataclass(frozen=True)
class DoseConfig:
    n_drugs: int = N_DRUGS


class DoseHead(Head):
    """A number that depends on the cell and on the drug it meets."""

    def __init__(self, config: DoseConfig, latent_dim: int, n_outputs: int):
        super().__init__(latent_dim, n_outputs, hidden=8, dropout=0.0)
        self.effect = torch.nn.Embedding(config.n_drugs, n_outputs)

    def forward(self, embedding, key=None, condition=None):
        return super().forward(embedding, key) + self.effect(condition["drug"])

    def loss(self, outputs, target):
        error = (outputs[:, 0] - target["dose"]) ** 2
        return error, {"absolute_error": error.sqrt()}

    def decode(self, outputs):
        return {"dose": outputs[:, 0]}


class Dose(Trained):
    name, title, shape, head = "dose", "a model of a dose", DoseConfig, DoseHead


@dataclass
class Flags:
    seed_of_data: int = 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder, the validation cells, and what was kept."""
    register(Dose())
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(400, WIDTH)).astype(np.float32)
    drug = rng.integers(0, N_DRUGS, 400)
    dose = (embedding[:, 0] + np.array([-2, 0, 3])[drug]).astype(np.float32)

    def cells(rows):
        names = [f"line{i}/drug{d}" for i, d in zip(rows, drug[rows], strict=True)]
        return CellDataset(
            {}, names, targets={"dose": dose[rows]}, latents={"cell": embedding[rows]}, conditions={"drug": drug[rows]}
        )

    train, val = cells(np.arange(300)), cells(np.arange(300, 400))
    folder = tmp_path_factory.mktemp("dose") / "model"
    like = SavedModel("rna", {"rna": RNAEncoderConfig()}, {"rna": np.array(["A", "B"])}, {"target_sum": 1e4})
    config = TrainConfig(epochs=40, batch_size=20, learning_rate=3e-2, warmup_epochs=0, cycle_epochs=40, device="cpu")
    with training_stage("dose", Flags(), config, folder) as stage:
        torch.manual_seed(0)
        head = TRAINED["dose"].make_head(DoseConfig(), ["dose"])(WIDTH)
        kept = stage.fit(
            OnEmbeddings(head),
            train,
            val,
            {"head": DoseConfig()},
            like,
            saves=head,
            options={"latent_dim": WIDTH},
            outputs=["dose"],
        )
    yield folder, val, kept, train
    del TRAINED["dose"]


def predicted(head, cells):
    """The head's outputs for all cells."""
    function = lambda batch: (head(batch.latent["cell"], batch.key, batch.condition),)
    (outputs,) = infer(function, head, cells, InferConfig(), Runtime(torch.device("cpu")), "predicting")
    return outputs[:, 0]


def test_the_folder_holds_the_kept_epoch(trained):
    folder, val, kept, _ = trained
    error = np.square(predicted(load_model(folder, "dose").build(), val) - val.targets["dose"]).mean()
    np.testing.assert_allclose(error, kept["loss"], rtol=1e-4)
    assert error < 0.3  # the variance is about 5


def test_other_conditions_are_other_cells(trained):
    *_, train = trained
    swapped = CellDataset(
        {}, train.barcodes, latents=train.latents, conditions={"drug": train.conditions["drug"][::-1]}
    )
    same = CellDataset({}, train.barcodes, latents=train.latents, conditions=train.conditions)
    moved = CellDataset({}, train.barcodes, latents={"cell": train.latents["cell"] + 1}, conditions=train.conditions)
    assert same.fingerprint == train.fingerprint
    assert len({cells.fingerprint for cells in (train, swapped, moved)}) == 3


def test_the_width_must_be_that_of_the_weights(trained):
    folder, *_ = trained
    saved = load_model(folder, "dose")
    write_folder(folder.with_name("forged"), replace(saved, options={"latent_dim": WIDTH + 1}).write)
    with pytest.raises(UserError, match="forged"):
        load_model(folder.with_name("forged"), "dose")
