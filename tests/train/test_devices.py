"""Training on a device that is not the CPU: every tensor in its place, the same numbers, few waits."""

import pytest
import torch

from tests.helpers import CPU, KINDS, last_weights, make_stage, records, take, train
from tests.pretend_gpu import PretendGPU
from utils.train.distributed import Runtime


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_another_device_has_the_numbers_of_the_cpu(kind, cells, tmp_path):
    cells = take(cells, 21, 11)
    train(make_stage(kind, cells), tmp_path / "cpu", CPU, epochs=1)
    with PretendGPU() as gpu:
        train(make_stage(kind, cells), tmp_path / "gpu", Runtime(gpu.device), epochs=1)
    for place, n in gpu.waits.items():
        print(n, place)
    print(sum(gpu.operators.values()))
