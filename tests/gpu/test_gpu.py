"""On an NVIDIA GPU: the CPU's numbers, the same bits each time, and no waiting within a pass.

`python -m pytest --noconftest -m gpu tests/gpu` runs these with PyTorch, SciPy, pandas and pytest alone.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_matrix

from models.device import sizes_for
from models.favor import favor_attention
from models.objectives import Denoising, Distillation, JointPairs, Objective
from models.performer import orthogonal_features
from tests.models.helpers import (
    LATENT_DIM,
    N_CLASSES,
    N_GENES,
    accessibility,
    celltypes,
    expression,
    masked_atac,
    masked_rna,
    minibatch,
    one_tower,
    scmomer,
)
from tests.models.plain_favor import plain_attention
from utils.cells.false_pairs import FalsePairs
from utils.cells.minibatches import CellDataset
from utils.predict.infer import infer
from utils.train import loop
from utils.train.config import InferConfig, TrainConfig
from utils.train.distributed import Runtime, set_up

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")]
CPU, GPU = Runtime(torch.device("cpu")), Runtime(torch.device("cuda", 0))
OBJECTIVES = {
    "rna": masked_rna,
    "rna expressed": lambda: masked_rna("expressed"),
    "atac": masked_atac,
    "pairs": lambda: JointPairs(scmomer("expressed"), feature_dropout=0.3),
    "one modality": lambda: Denoising(one_tower("rna", "expressed"), feature_dropout=0.3),
    "student": lambda: Distillation(scmomer("expressed", other_modality="student"), feature_dropout=0.3),
    "celltype": celltypes,
}


@pytest.fixture(autouse=True)
def exact():
    """Deterministic algorithms, and float32 products with all their digits."""
    set_up(GPU.device)
    torch.set_float32_matmul_precision("highest")


def cells(n: int = 40, seed: int = 0) -> CellDataset:
    """Random cells with all that any objective reads."""
    rng = np.random.default_rng(seed)
    lengths = tuple(rng.integers(1, N_GENES, n))
    latents = {name: rng.normal(size=(n, LATENT_DIM)).astype(np.float32) for name in ("rna", "atac")}
    return CellDataset(
        {"rna": csr_matrix(expression(lengths, seed=seed)), "atac": csr_matrix(accessibility(lengths, seed=seed))},
        pd.Index([f"cell {i}" for i in range(n)]),
        targets={"cell_type": rng.integers(0, N_CLASSES, n)},
        latents=latents,
        pairs=FalsePairs(n, None, None),
    )


def step(objective: Objective, runtime: Runtime, precision: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses [B] and gradients of one minibatch, on the CPU."""
    objective.to(runtime.device).train()
    loss, _ = loop.run(objective, minibatch(), TrainConfig(precision=precision), runtime)
    loss.sum().backward()
    return loss.detach().cpu(), {name: p.grad.cpu() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 5e-2)])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_losses_and_gradients_are_those_of_the_cpu(kind, precision, tolerance):
    loss, gradients = step(OBJECTIVES[kind](), GPU, precision)
    expected, expected_gradients = step(OBJECTIVES[kind](), CPU, "fp32")
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    ours, theirs = (torch.cat([g[name].flatten() for name in gradients]) for g in (gradients, expected_gradients))
    assert (ours - theirs).norm() <= 2 * tolerance * theirs.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_pass_never_waits(kind, precision):
    objective = OBJECTIVES[kind]()
    step(objective, GPU, precision)  # the first one loads kernels
    batch = minibatch().pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = loop.run(objective, batch, TrainConfig(precision=precision), GPU)
        loss.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_same_run_gives_the_same_bits_and_so_does_a_resumed_one(kind, precision, tmp_path, monkeypatch):
    class NoLog:
        def __init__(self, *_): ...
        def add(self, *_): ...
        def close(self, *_): ...

    monkeypatch.setattr(loop, "RunLog", NoLog)  # TensorBoard and matplotlib may be absent
    found = []
    for name, parts in (("first", (2,)), ("again", (2,)), ("cut", (1, 2))):
        for epochs in parts:
            objective = OBJECTIVES[kind]()
            write = lambda path, o=objective: save_file(
                {key: tensor.cpu().contiguous() for key, tensor in o.state_dict().items()}, path / "model.safetensors"
            )
            config = TrainConfig(
                epochs=epochs, batch_size=8, warmup_epochs=1, keep="last", precision=precision, resume=epochs > parts[0]
            )
            loop.fit(objective, cells(), cells(16, seed=1), config, GPU, tmp_path / name, write)
        found.append(load_file(tmp_path / name / "model.safetensors"))
    for other in found[1:]:
        assert all(torch.equal(found[0][key], other[key]) for key in found[0])


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 5e-2)])
@pytest.mark.parametrize("tokens", ["all", "expressed"])
def test_inference_gives_the_cpus_results(tokens, precision, tolerance):
    model = scmomer(tokens, classes=True, other_modality="student")
    config = InferConfig(batch_size=16, precision=precision)
    ours = infer(model, model, cells(), config, GPU, "test")
    expected = infer(model, model, cells(), InferConfig(batch_size=16), CPU, "test")
    for found, truth in zip(ours, expected, strict=True):
        assert np.abs(found - truth).max() <= tolerance * np.abs(truth).max()


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 5e-2)])
def test_attention_over_all_genes_is_the_plain_one(precision, tolerance):
    """At the published width and length, where sums are long."""
    generator = torch.Generator().manual_seed(0)
    width, heads, dim_head = 200, 10, 64
    x = torch.randn(2, 4000, width, generator=generator)
    to_q, to_k, to_v = (width**-0.5 * torch.randn(heads * dim_head, width, generator=generator) for _ in range(3))
    to_out = (heads * dim_head) ** -0.5 * torch.randn(width, heads * dim_head, generator=generator)
    bias, features = torch.zeros(width), orthogonal_features(266, dim_head, generator)
    inputs = [x, to_q, to_k, to_v, to_out, bias]
    on_gpu = [tensor.to(GPU.device).requires_grad_() for tensor in inputs]
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        out = favor_attention(*on_gpu, features.to(GPU.device))
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    expected = plain_attention(*exact, features.double())
    found = [out, *torch.autograd.grad(out.float().sin().sum(), on_gpu)]
    truth = [expected, *torch.autograd.grad(expected.sin().sum(), exact)]
    for ours, theirs in zip(found, truth, strict=True):
        assert (ours.double().cpu() - theirs).norm() <= tolerance * theirs.norm()


def test_sizes_follow_from_the_whole_memory():
    sizes = sizes_for(GPU.device)
    taken = torch.empty(2**28, device=GPU.device)
    sizes_for.cache_clear()
    assert sizes_for(GPU.device) == sizes
    assert sizes.block_values > 2**21
    assert len(taken)
