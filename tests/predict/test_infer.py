"""A cell's result is the same to the bit in any minibatch; the models are wide enough for blocked matrix code."""

from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

from models.atac_encoder import ATACEncoderConfig
from models.heads import CellTypeHead
from models.rna_encoder import RNAEncoderConfig
from models.scmomer import ScMomer, ScMomerConfig
from models.shapes import ClassifierConfig, FusionConfig
from models.student import StudentConfig
from tests.models.helpers import accessibility, expression
from tests.pretend_gpu import PretendGPU
from tests.processes import finish
from utils.cells.minibatches import CellDataset, LengthPlan, padded_length
from utils.predict.infer import CellByCell, InferConfig, infer
from utils.train.distributed import Runtime

N_CELLS, N_GENES, N_PEAKS = 40, 500, 2000
ALONE = Runtime(torch.device("cpu"))
SHAPE = {"dim": 64, "depth": 1, "heads": 3, "dim_head": 32}


@pytest.fixture(scope="module")
def values() -> dict[str, csr_matrix]:
    lengths = np.random.default_rng(0).integers(1, 500, N_CELLS)
    return {
        "rna": csr_matrix(expression(tuple(lengths), N_GENES)),
        "atac": csr_matrix(accessibility(tuple(lengths[::-1] * 3), N_PEAKS)),
    }


def make_model(tokens: str, other_modality: str) -> ScMomer:
    torch.manual_seed(0)
    config = ScMomerConfig(
        rna=RNAEncoderConfig(tokens=tokens, **SHAPE),
        atac=ATACEncoderConfig(n_patches=32, **SHAPE),
        fusion=FusionConfig(),
        student=StudentConfig(),
        other_modality=other_modality,
    )
    return ScMomer(config, N_GENES, N_PEAKS, lambda latent_dim: CellTypeHead(ClassifierConfig(), latent_dim, 7))


def embed(model: ScMomer, values: dict[str, csr_matrix], rows: np.ndarray, **how) -> np.ndarray:
    """[rows, latent_dim + classes]"""
    dataset = CellDataset({name: matrix[rows] for name, matrix in values.items()}, pd.Index(rows.astype(str)))
    return np.hstack(infer(model, model, dataset, InferConfig(device="cpu", **how), ALONE, "test"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("other_modality", ["student", "measured"])
@pytest.mark.parametrize("tokens", ["all", "expressed"])
def test_a_cells_result_does_not_depend_on_its_minibatch(tokens, other_modality, precision, values):
    model, everybody = make_model(tokens, other_modality), np.arange(N_CELLS)
    expected = embed(model, values, everybody, precision=precision)
    assert np.ptp(expected, axis=0).max() > 1e-2
    rng = np.random.default_rng(1)
    for batch_size in (1, 2, 7, 64):
        for rows in (everybody, rng.permutation(N_CELLS), rng.choice(N_CELLS, 5, replace=False)):
            ours = embed(model, values, rows, batch_size=batch_size, precision=precision)
            np.testing.assert_array_equal(ours, expected[rows])


def by_several_threads(tokens: str, values: dict[str, csr_matrix]) -> None:
    """Compare the results of one, two and three threads, to the bit."""
    model, rows = make_model(tokens, "measured"), np.arange(N_CELLS)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(embed(model, values, rows, batch_size=8))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("tokens", ["all", "expressed"])
def test_the_number_of_threads_does_not_matter(tokens, values, tmp_path):
    """torchrun gives each of several processes one thread; a process alone takes all.

    In a process of its own: threads that have been started once slow down all that comes after, also with one thread.
    """
    finish(by_several_threads, {"tokens": tokens, "values": values}, 1, tmp_path / "output.txt")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 17), (5, 9, 17), (5, 3, 9, 17)])
@pytest.mark.parametrize("context", [CellByCell, nullcontext])
def test_linear_layers_keep_their_meaning(context, shape, bias):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(17, 6, bias=bias).double(), torch.randn(*shape, dtype=torch.float64)
    expected = torch.einsum("...i,oi->...o", x, layer.weight) + (layer.bias if bias else 0)
    with context():
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_padding_depends_on_the_cell_alone_and_is_little():
    lengths = np.arange(20_000)
    padded = padded_length(lengths)
    assert (padded >= lengths).all() and (np.diff(padded) >= 0).all()
    assert (padded[65:] <= 1.13 * lengths[65:]).all()
    assert len(np.unique(padded)) < 90


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_cell_once(world_size, batch_size):
    lengths = np.random.default_rng(0).integers(0, 300, 50)
    seen = []
    for rank in range(world_size):
        for micro in LengthPlan(lengths, batch_size, rank, world_size):
            assert 2 <= len(micro.rows) <= max(batch_size, 2)
            assert 1 <= (micro.weight > 0).sum() <= batch_size
            assert (padded_length(lengths[micro.rows]) == micro.padded_length).all()
            seen.extend(micro.rows[micro.weight > 0])
    assert sorted(seen) == list(range(50))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("other_modality", ["student", "measured", "zeros"])
@pytest.mark.parametrize("tokens", ["all", "expressed"])
def test_another_device_gives_the_same_results(tokens, other_modality, precision, values):
    model = make_model(tokens, other_modality)
    dataset = CellDataset(values, pd.Index(np.arange(N_CELLS).astype(str)))
    config = InferConfig(device="cpu", batch_size=16, precision=precision)
    expected = infer(model, model, dataset, config, ALONE, "test")
    with PretendGPU(has_float64=False) as gpu:
        ours = infer(model, model, dataset, config, Runtime(gpu.device), "test")
        model.to("cpu")
    tolerance = 5e-2 if precision == "bf16" else 1e-4
    for found, truth in zip(ours, expected, strict=True):
        assert np.abs(found - truth).max() <= tolerance * np.abs(truth).max()
