"""The doctor announces what preprocessing would change, and nothing else."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from tests.builders import STATES, make_cells
from utils.cells.config import IngestConfig
from utils.cells.inspect import Examination, examine


def examination(path) -> Examination:
    split = lambda obs: np.full(len(obs), "train")
    return examine((str(path), None, None), IngestConfig(), {}, split, "cell_type", False, "1e4")


@pytest.mark.parametrize("state", STATES)
def test_recovered_counts_are_announced(state, tmp_path):
    adata = make_cells()
    adata.X = csr_matrix(STATES[state](adata.X.toarray()).astype(np.float32))
    adata.write(tmp_path / "cells.h5ad")
    found = examination(tmp_path / "cells.h5ad")
    assert found.problems == []
    assert any("back into counts" in action for action in found.actions) == (state != "counts")
    assert found.sections["rna"]["counts per cell"]["most"] == make_cells().X.sum(1).max()


def test_changes_that_do_not_happen_are_not_listed(tmp_path):
    make_cells().write(tmp_path / "cells.h5ad")
    actions = " ".join(examination(tmp_path / "cells.h5ad").actions)
    assert "40 genes" in actions
    for word in ("updated", "summed", "left out"):
        assert word not in actions
