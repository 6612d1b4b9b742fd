"""Presence of genes and peaks: 1 changes nothing, 0 is as if a value were not there, and nothing passes in between."""

from dataclasses import replace

import pytest
import torch

from models.fusion import ATACTower, RNATower
from models.minibatch import Ragged
from models.student import Student
from tests.models.helpers import (
    ATAC,
    LATENT_DIM,
    N_GENES,
    N_PEAKS,
    STUDENT,
    accessibility,
    expression,
    jitter,
    ragged,
    rna_config,
)


def made(name: str) -> tuple[torch.nn.Module, Ragged]:
    """A module that reads one modality, and cells."""
    torch.manual_seed(0)
    if name in ("all", "expressed"):
        return jitter(RNATower(rna_config(name), N_GENES, LATENT_DIM)).eval(), ragged(expression())
    if name == "student":
        return jitter(Student(STUDENT, N_GENES, LATENT_DIM)).eval(), ragged(expression())
    return jitter(ATACTower(ATAC, N_PEAKS, LATENT_DIM)).eval(), ragged(accessibility())


@torch.no_grad()
@pytest.mark.parametrize("name", ["all", "expressed", "student", "atac"])
def test_full_presence_changes_nothing(name):
    module, cells = made(name)
    torch.testing.assert_close(module(replace(cells, presence=torch.ones_like(cells.values))), module(cells))


@torch.no_grad()
@pytest.mark.parametrize("name", ["student", "atac"])
def test_no_presence_is_removal(name):
    module, cells = made(name)
    keep = cells.indices % 3 > 0
    torch.testing.assert_close(module(replace(cells, presence=keep.float())), module(cells.keep(keep)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["all", "expressed"])
def test_a_gene_without_presence_has_the_number_of_an_absent_gene(name):
    """In the first layer's terms: without blocks, states do not depend on other genes, so this is removal."""
    tower, cells = made(name)
    tower.encoder.blocks = torch.nn.ModuleList()
    keep = cells.indices % 3 > 0
    torch.testing.assert_close(tower(replace(cells, presence=keep.float())), tower(cells.keep(keep)))


@pytest.mark.parametrize("name", ["all", "expressed", "student", "atac"])
def test_every_value_that_the_module_reads_has_a_gradient(name):
    module, cells = made(name)
    presence = torch.ones_like(cells.values, requires_grad=True)
    module.requires_grad_(False)(replace(cells, presence=presence))[:, 0].sum().backward()
    assert torch.isfinite(presence.grad).all() and (presence.grad != 0).float().mean() > 0.3
