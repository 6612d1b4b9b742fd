"""Training on a device that is not the CPU: every tensor in its place, the same numbers, no waiting within a pass."""

import numpy as np
import pandas as pd
import pytest
import torch

from models.drug_head import DrugHead, DrugHeadConfig
from models.objectives import OnEmbeddings
from models.perturbation_head import PerturbationConfig, PerturbationHead
from tests.helpers import CPU, KINDS, last_weights, make_stage, records, take, train
from tests.pretend_gpu import PretendGPU
from utils.cells.minibatches import CellDataset, Plan
from utils.train.distributed import Runtime
from utils.train.loop import TrainConfig, run

N_CELLS, WIDTH = 8, 12

DROPPING = {"pairs": 0.3, "denoising": 0.3, "student": 0.3, "celltype": 0.3}
"""Share of features that these objectives leave out, which is done another way on a GPU."""


def stage_of(kind: str, cells):
    stage = make_stage(kind, cells)
    if kind in DROPPING:
        stage.objective.feature_dropout = DROPPING[kind]
    return stage


def drug_stage(**config):
    """A head for drug responses on random embeddings, and its cells."""
    torch.manual_seed(0)
    rng, n_drugs = np.random.default_rng(0), 5
    head = DrugHead(DrugHeadConfig(n_lines=3, n_known=n_drugs, n_features=16, n_atoms=4, **config), WIDTH, n_drugs)
    head.drugs.copy_(torch.randint(0, 2, head.drugs.shape))
    if head.bonds is not None:
        head.bonds.copy_(torch.eye(4))
    head.set_means(torch.zeros(n_drugs), torch.zeros(3), torch.ones(n_drugs))
    given = {"drug": rng.integers(0, n_drugs, N_CELLS), "line": rng.integers(0, 4, N_CELLS)}
    return OnEmbeddings(head), on_embeddings({"ln_ic50": rng.normal(size=N_CELLS).astype(np.float32)}, given)


def perturbation_stage():
    """A head for perturbations on random embeddings, and its cells."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    head = PerturbationHead(PerturbationConfig("A,B,C", vector_dim=6), WIDTH, 20)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    genes = np.stack([rng.integers(0, 3, N_CELLS), rng.integers(-1, 3, N_CELLS)], 1)
    return OnEmbeddings(head), on_embeddings(
        {"change": rng.normal(size=(N_CELLS, 20)).astype(np.float32)}, {"genes": genes}
    )


def on_embeddings(target: dict, given: dict) -> CellDataset:
    cell = np.random.default_rng(1).normal(size=(N_CELLS, WIDTH)).astype(np.float32)
    barcodes = pd.Index([f"cell {i}" for i in range(N_CELLS)])
    return CellDataset({}, barcodes, targets=target, latents={"cell": cell}, conditions=given)


HEADS = {
    "drug fingerprints": drug_stage,
    "drug graphs": lambda: drug_stage(drug="graph"),
    "published drug head": lambda: drug_stage(head="published"),
    "perturbation": perturbation_stage,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_another_device_has_the_numbers_of_the_cpu(kind, cells, tmp_path):
    """Training, validation, saving and resuming."""
    cells = take(cells, 21, 11)
    for name, epochs, resume in (("whole", 2, False), ("cut", 1, False), ("cut", 2, True)):
        with PretendGPU(has_float64=False) as gpu:
            train(stage_of(kind, cells), tmp_path / name, Runtime(gpu.device), epochs=epochs, resume=resume)
    train(stage_of(kind, cells), tmp_path / "cpu", CPU, epochs=2)
    ours, theirs = records(tmp_path / "whole"), records(tmp_path / "cpu")
    assert len(ours) == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {"seconds", "cells_per_second", "phase"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    whole, cut = last_weights(tmp_path / "whole"), last_weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [*KINDS, *HEADS])
def test_a_pass_never_waits_for_the_device(kind, precision, cells):
    if kind in HEADS:
        objective, dataset = HEADS[kind]()
    else:
        stage = stage_of(kind, take(cells, N_CELLS, 4))
        objective, dataset = stage.objective, stage.train
    config = TrainConfig(precision=precision, device="cpu")
    batch = dataset[next(iter(Plan(dataset.lengths, N_CELLS)))]
    losses = []
    for runtime, device in ((CPU, "cpu"), (Runtime(PretendGPU.device), "pretend")):
        with PretendGPU() as gpu:
            objective.to(device).train()
            gpu.waits.clear()
            loss, _ = run(objective, batch, config, runtime)
            loss.sum().backward()
            objective.zero_grad(set_to_none=True)
            assert not gpu.waits
            assert bool(gpu.operators) == (device == "pretend")
            losses.append(loss.detach().cpu())
            objective.to("cpu")
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2 if precision == "bf16" else 1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_once(kind, cells, tmp_path):
    """Two runs that differ by one epoch of three steps, each of two passes."""
    cells, waits = take(cells, 24, 8), []
    for epochs in (1, 2):
        with PretendGPU() as gpu:
            train(make_stage(kind, cells), tmp_path / str(epochs), Runtime(gpu.device), epochs=epochs, grad_acc=2)
        waits.append({place: n for (_, place), n in gpu.waits.items() if place.startswith("utils/train/sums")})
    (first,), (second,) = (list(counted.values()) for counted in waits)
    n_steps, n_validations = 2, 1  # 24 cells, 2 × 8 in a step
    assert second - first == n_steps + n_validations
