"""What benchmarks/gpu.py counts without a GPU, and that it needs no file formats."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.lib.bench import random_cells
from models.device import ON_CPU
from models.rna_encoder import RNAEncoder
from models.shapes import RNAEncoderConfig


@pytest.mark.parametrize("tokens", ["all", "expressed"])
def test_products_of_a_forward_pass(tokens, monkeypatch):
    """The formula against a counter of all products."""
    monkeypatch.setattr(gpu, "N_GENES", 300)
    monkeypatch.setattr(gpu, "N_EXPRESSED", 80)
    shape = RNAEncoderConfig(dim=24, depth=2, heads=3, dim_head=16, n_features=20, tokens=tokens)
    encoder, batch = RNAEncoder(shape, 300), random_cells("rna", 300, 80)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        encoder(encoder.tokenize(batch.rna))
    assert counted.get_total_flops() == gpu.flops(shape)


def test_a_gpus_sizes_need_fewer_operators(monkeypatch):
    monkeypatch.setattr(gpu, "N_GENES", 2000)
    monkeypatch.setattr(gpu, "N_EXPRESSED", 300)
    assert gpu.operators("all", 4, gpu.H100) < gpu.operators("all", 4, ON_CPU) / 2


def test_no_file_format_is_needed():
    absent = ("h5py", "anndata", "mudata", "scanpy", "muon", "sklearn", "matplotlib", "tensorboard", "rdkit")
    script = f"""
import sys
sys.modules |= dict.fromkeys({absent!r})
import benchmarks.gpu, tests.gpu.test_gpu
benchmarks.gpu.loader_rate(64)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
