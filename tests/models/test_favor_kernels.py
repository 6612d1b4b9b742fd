"""The kernels for NVIDIA GPUs, run by Triton's interpreter on the CPU, equal the plain attention."""

import os
import subprocess
import sys

import pytest
import torch

from models import favor
from tests.models.test_favor import draw, results

if torch.cuda.is_available():
    pytest.skip("on a GPU, tests/gpu runs the kernels themselves", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
pytest.importorskip("triton", reason="triton comes with PyTorch for GPUs, and is not installed here")
from models import favor_kernels
from models.favor_kernels import FusedFavor


def fused(*inputs):
    *tensors, features, valid = inputs
    return FusedFavor.apply(*tensors, features, valid)


@pytest.fixture(autouse=True)
def several_stretches(monkeypatch):
    """And float32 products with all their digits."""
    monkeypatch.setattr(favor_kernels, "STRETCH", 128)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 300, 16), (3, 2, 130, 32), (2, 1, 64, 64), (4, 2, 1, 16)], ids=str)
def test_values_and_gradients_are_the_plain_ones(shape, padded):
    arguments = draw(shape, 1, padded)
    expected = results(favor.Favor.apply, *arguments, torch.float32)
    ours = results(fused, *arguments, torch.float32)
    for found, truth in zip(ours, expected, strict=True):
        assert (found - truth).norm() <= 1e-4 * max(truth.norm(), expected[0].norm() * 1e-2)


def test_half_precision_is_near():
    """The interpreter has no products of bfloat16, so float16 stands for it."""
    inputs, features, valid = draw((2, 2, 200, 16), 2, padded=True)
    expected = results(favor.Favor.apply, inputs, features, valid, torch.float32)
    halves = [tensor.half().requires_grad_() for tensor in inputs]
    out = FusedFavor.apply(*halves, features.float(), valid)
    counted = valid[:, :, None].expand_as(out)
    found = [(out * counted).detach(), *torch.autograd.grad((out.float().sin() * counted).sum(), halves)]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() - theirs).norm() <= 2e-2 * theirs.norm()


def test_a_cell_of_padding_alone_is_finite():
    inputs, features, _ = draw((2, 2, 70, 16), 3, padded=False)
    valid = torch.ones(2, 70, dtype=torch.bool)
    valid[1] = False
    ours = results(fused, inputs, features, valid, torch.float32)
    expected = results(favor.Favor.apply, inputs, features, valid, torch.float32)
    for found, truth in zip(ours, expected, strict=True):
        assert found.isfinite().all()
        assert (found - truth).norm() <= 1e-4 * max(truth.norm(), 1e-3)


@pytest.mark.parametrize("factor", [1.0, 1.1, float("nan")])
def test_kernels_that_give_other_numbers_are_not_used(factor):
    class Changed(FusedFavor):
        @staticmethod
        def forward(ctx, x, *rest):
            return FusedFavor.forward(ctx, x, *rest) * factor

    difference = favor._difference(Changed, torch.device("cpu"), torch.float32, 16)
    assert (difference <= favor.LARGEST_DIFFERENCE) == (factor == 1)


@pytest.mark.slow
def test_the_kernels_compile_for_an_h100():
    command = [sys.executable, "-m", "tests.models.compile_kernels"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    lines = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()
    assert len(lines) == 5 * 2 * 2
    for line in lines:
        *_, cores, shared = line.split(" ", 3)[3].rpartition(" ")[::2]
        assert cores == "tensor cores"
        assert int(shared) < 227 * 1024  # bytes that a block of an H100 may have
