"""Guards of a run: steps without a finite loss, embeddings that collapse, and the state of another run."""

import math
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.helpers import lacks, last_weights, make_stage, records, take, train
from utils.cells.minibatches import MicroBatch
from utils.errors import UserError
from utils.train.guards import StopSignal


def poison(stage, rows: list[int]) -> list[str]:
    """Values that make the loss of some training cells infinite; their barcodes."""
    matrix = stage.train.values["rna"] = stage.train.values["rna"][:]
    for row in rows:
        matrix.data[matrix.indptr[row] : matrix.indptr[row + 1]] = np.inf
    return list(stage.train.barcodes[rows])


def test_a_step_without_a_finite_loss_is_left_out_and_counted(cells, tmp_path, capsys):
    """One bad cell, minibatches of two: one step of each epoch is left out, the others are as if it were not there."""
    stage = make_stage("student", take(cells, 12, 4))
    poison(stage, [5])
    train(stage, tmp_path / "run", epochs=3, batch_size=2)
    rows = records(tmp_path / "run", "train")
    assert [row["skipped"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values() if not isinstance(value, str))
    assert all(torch.isfinite(tensor).all() for tensor in last_weights(tmp_path / "run").values())
    assert capsys.readouterr().out.count("no finite loss") == 3


def test_several_bad_steps_in_a_row_end_the_run_and_name_the_cells(cells, tmp_path):
    stage = make_stage("student", take(cells, 6, 4))
    barcodes = poison(stage, list(range(6)))
    with pytest.raises(UserError) as error:
        train(stage, tmp_path / "run", batch_size=2)
    assert lacks(str(error.value), "3 steps", "step 2") == []
    assert all(barcode in str(error.value) for barcode in barcodes[:1])
    assert sum(barcode in str(error.value) for barcode in barcodes) == 5  # and how many more there are
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_end_the_run(cells, tmp_path):
    stage = make_stage("student", take(cells, 8, 4))
    with torch.no_grad():
        stage.objective.student.to_latent.bias.fill_(math.inf)
    with pytest.raises(UserError, match="finite loss"):
        train(stage, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_embeddings_that_collapse_are_reported(cells, tmp_path, capsys):
    cells = take(cells, 16, 8)
    stage = make_stage("student", cells)
    train(stage, tmp_path / "healthy", epochs=1)
    assert "collapsed" not in capsys.readouterr().out
    spread = records(tmp_path / "healthy", "val")[0]["spread"]
    with torch.no_grad():
        embeddings = []
        for i in range(8):
            stage.objective(stage.val[MicroBatch(np.array([i]), np.ones(1, np.float32), 0, 1)])
            embeddings.append(stage.objective.embedding[0].double())
    expected = torch.stack(embeddings).var(0, correction=0).mean().sqrt()
    assert spread == pytest.approx(float(expected), rel=1e-5)
    with torch.no_grad():
        stage.objective.student.to_latent.weight.zero_()
    train(stage, tmp_path / "flat", epochs=1, learning_rate=0.0)
    assert "collapsed" in capsys.readouterr().out


def test_a_thread_may_train(cells, tmp_path):
    """Where Python allows no signal handlers, as in a notebook's or a service's thread."""
    stage = make_stage("student", take(cells, 6, 4))
    with ThreadPoolExecutor(1) as pool:
        metrics = pool.submit(train, stage, tmp_path / "run", epochs=1).result()
    assert math.isfinite(metrics["loss"])


def test_handlers_are_put_back(cells, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_resuming_another_run_is_refused(cells, tmp_path):
    """Other cells, or settings of the script that the engine does not know."""
    stage = make_stage("rna", take(cells, 16, 4))
    train(stage, tmp_path / "run", epochs=1)
    other = make_stage("rna", take(cells, 15, 4))
    with pytest.raises(UserError, match=r"run.*training cells"):
        train(other, tmp_path / "run", resume=True)
