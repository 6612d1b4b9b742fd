"""One step of the RNA encoder, ours or that of performer-pytorch, to be measured: training or inference."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.lib.bench import random_cells
from models.objectives import MaskedRNA
from models.rna_encoder import RNAEncoder
from models.shapes import RNAEncoderConfig

N_GENES, N_EXPRESSED = 16_906, 2_000
PUBLISHED = RNAEncoderConfig()
Step = Callable[[], None]


def our_step(
    n_cells: int = 1, shape: RNAEncoderConfig = PUBLISHED, device="cpu", precision="fp32", trains=True
) -> Step:
    """Return a step of our encoder on random cells of the published number of genes."""
    torch.manual_seed(0)
    objective = MaskedRNA(RNAEncoder(shape, N_GENES), seed=0).to(device)
    batch = random_cells("rna", N_GENES, N_EXPRESSED, n_cells).to(device)

    @torch.no_grad()
    def infer() -> None:
        with _autocast(device, precision):
            objective.encoder(objective.encoder.tokenize(batch.rna))

    def loss() -> torch.Tensor:
        return objective(batch)[0].sum()

    return _training(objective, loss, device, precision) if trains else infer


def peer_step(n_cells: int = 1, device="cpu", precision="fp32", trains=True) -> Step:
    """Return a step of the peer at the published size, which takes all genes as tokens."""
    from performer_pytorch import PerformerLM  # here, because it need not be installed, and takes memory

    torch.manual_seed(0)
    model = PerformerLM(num_tokens=7, dim=200, depth=6, max_seq_len=N_GENES, heads=10, dim_head=64).to(device)
    bins = random_cells("rna", N_GENES, N_EXPRESSED, n_cells).rna.dense().long().clamp(max=5).to(device)
    target = bins > 0

    @torch.no_grad()
    def infer() -> None:
        with _autocast(device, precision):
            model(bins, return_encodings=True)

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(bins)[target].float(), bins[target])

    return _training(model, loss, device, precision) if trains else infer


def _autocast(device, precision: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


def _training(model: torch.nn.Module, loss: Callable[[], torch.Tensor], device, precision: str) -> Step:
    """A forward and backward pass, and a step of the optimiser."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def train() -> None:
        with _autocast(device, precision):
            total = loss()
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train
