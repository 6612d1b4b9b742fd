"""Fixtures that all tests share."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # on models this small, threads mostly wait for each other


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real cells, which lies beside the repository and is not part of it."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real cells not available: ../shared/data is absent")
    return folder


@pytest.fixture(scope="session")
def simulation():
    """96 simulated cells of three types and two donors; copy before changing."""
    from utils.cells.simulate import SimulationConfig, simulate

    return simulate(SimulationConfig(n_cells=96, n_genes=60, n_peaks=150, n_types=3, n_donors=2))


@pytest.fixture(scope="session")
def raw_file(simulation, tmp_path_factory) -> Path:
    """The simulated counts as a user would have them."""
    from utils.files.write import write_whole

    path = tmp_path_factory.mktemp("raw") / "cells.h5mu"
    write_whole(simulation.mdata, path)
    return path


@pytest.fixture(scope="session")
def ready_file(raw_file) -> Path:
    """The same after preprocess.py, a fifth of the cells for validation, none for testing."""
    from tests.helpers import run

    path = raw_file.with_name("cells.ready.h5mu")
    run("preprocess", data_path=raw_file, out_path=path, val_fraction=0.2)
    return path


@pytest.fixture(scope="session")
def cells(ready_file):
    """The model-ready cells, both modalities; not to be changed."""
    from utils.cells.preprocessed import read_cells

    return read_cells(ready_file, ("rna", "atac"))


@dataclass(frozen=True)
class Runs:
    """A folder of trained models and how to name what is in it; tests leave it as they find it."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="session")
def runs(ready_file, tmp_path_factory) -> Runs:
    """All stages, by the scripts: rna, atac, multimodal, latents; student and celltype for each missing modality."""
    return make_runs(ready_file, tmp_path_factory.mktemp("runs"))


def make_runs(ready_file: Path, folder: Path) -> Runs:
    """Train them."""
    from tests import helpers

    runs = Runs(folder)
    paths = {"data_path": ready_file, "ckpt_dir": runs.folder}
    helpers.run("pretrain_rna", **paths, model_name="rna", **helpers.RNA)
    helpers.run("pretrain_atac", **paths, model_name="atac", **helpers.ATAC)
    encoders = {"rna_model_path": runs["rna"], "atac_model_path": runs["atac"]}
    helpers.run("pretrain_multimodal", **paths, **encoders, model_name="multimodal", **helpers.MULTIMODAL)
    teacher = runs["multimodal"]
    helpers.run("get_latent_emb", data_path=ready_file, model_path=teacher, ckpt_dir=runs["latents"], device="cpu")
    latents = {"model_path": teacher, "dir_train": runs["latents"], "dir_val": runs["latents"]}
    for missing in ("atac", "rna"):
        student = f"student_{missing}"
        helpers.run("pretrain_missing_mod", **paths, **latents, model_name=student, missing=missing, **helpers.TRAINING)
        helpers.run(
            "train_missing_celltype_func",
            **paths,
            pretrained_model_path=runs[student],
            model=f"celltype_{missing}",
            **helpers.TRAINING | {"epochs": 25, "learning_rate": 0.01, "patience": 0, "trainable_blocks": -1},
        )
    return runs
