"""Fixtures that all tests share, made once for each process that runs tests."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

# On models this small, threads mostly wait for each other. numba, which scanpy's normalisation calls, sets OpenMP's
# number of threads for torch as well; it reads this variable when it is imported.
os.environ["NUMBA_NUM_THREADS"] = "1"

import pytest
import torch

from tests import builders, helpers
from utils.cells.preprocessed import read_cells
from utils.files.write import write_whole

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let a test marked `alone` wait until no other process runs a test, and the others until it is done.

    Who waits for its turn holds the gate, and the next test waits there: so an `alone` test is not overtaken.
    """
    if not hasattr(item.config, "workerinput"):  # there is one process
        return (yield)
    here = Path(__file__).parent
    how = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    with (here / "__init__.py").open("rb") as gate, (here / "conftest.py").open("rb") as running:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(running, how)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(running, fcntl.LOCK_UN)  # closing is not enough while a forked child is alive


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
    return builders.make_simulation()


@pytest.fixture(scope="session")
def raw_file(simulation, tmp_path_factory) -> Path:
    """The simulated counts as a user would have them."""
    path = tmp_path_factory.mktemp("raw") / "cells.h5mu"
    write_whole(simulation.mdata, path)
    return path


@pytest.fixture(scope="session")
def ready_file(raw_file) -> Path:
    """The same after preprocess.py: a fifth of the cells validates, none is a test cell."""
    path = raw_file.with_name("cells.ready.h5mu")
    helpers.run("preprocess", data_path=raw_file, out_path=path, val_fraction=0.2)
    return path


@pytest.fixture(scope="session")
def cells(ready_file):
    """The model-ready cells, both modalities; not to be changed."""
    return read_cells(ready_file, ("rna", "atac"))


@pytest.fixture(scope="session")
def runs(ready_file, tmp_path_factory) -> builders.Runs:
    """One model of each stage, trained by the scripts; `builders.make_runs` lists them."""
    return builders.make_runs(ready_file, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def query(simulation, tmp_path) -> Path:
    """Raw RNA of 40 cells, in a file."""
    rna = simulation.mdata["rna"][:40].copy()
    rna.obs = rna.obs[["donor"]].copy()
    write_whole(rna, tmp_path / "query.h5ad")
    return tmp_path / "query.h5ad"
