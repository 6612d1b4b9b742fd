"""Prediction streams: the result is the same for any size of the blocks, any number of processes, and in memory."""

import shutil

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest

from tests.evaluate.test_label_report import flat_umap  # noqa: F401
from tests.files.test_additions import untouched
from tests.helpers import ROOT, command_line, run, torchrun
from tests.scripts.test_predict import COLUMNS, MATRICES, MEASURED
from tests.scripts.test_trust import NOVELTY, trusted  # noqa: F401  the fixture counts for this file, too
from utils.files.write import write_whole
from utils.predict import query as query_module

ALL_COLUMNS = [*COLUMNS, *NOVELTY, *MEASURED]


@pytest.fixture(scope="module")
def mixed(simulation, tmp_path_factory):
    """Modalities of some of the cells each, in different orders, one cell without counts, and a third modality."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("mixed") / "mixed.h5mu"
    rna, atac = (simulation.mdata[name].copy() for name in ("rna", "atac"))
    counts = rna.X.tolil()
    counts[4] = 0
    rna.X = counts.tocsr()
    names = rng.permutation(rna.obs_names)
    proteins = ad.AnnData(np.ones((len(names), 3)), pd.DataFrame(index=names))
    parts = {"rna": rna[rng.permutation(70)].copy(), "atac": atac[rng.permutation(96)[:80]].copy(), "prot": proteins}
    write_whole(mudata.MuData(parts), path)
    return path


@pytest.fixture(scope="module")
def expected(mixed, trusted, tmp_path_factory):  # noqa: F811
    """The file that one process writes in one block."""
    out = tmp_path_factory.mktemp("expected") / "out.h5mu"
    run("predict_cell_type", data_path=mixed, model_path=trusted, out_path=out, device="cpu")
    return out


def plain(value):
    """An entry of uns that can be compared."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return np.asarray(value).tolist()


def assert_same(ours, theirs) -> None:
    """All that was written, to the bit."""
    mine, other = (path if isinstance(path, mudata.MuData) else mudata.read_h5mu(path) for path in (ours, theirs))
    for name in (None, *other.mod):
        a, b = (content if name is None else content.mod[name] for content in (mine, other))
        pd.testing.assert_frame_equal(a.obs[ALL_COLUMNS], b.obs[ALL_COLUMNS])
        for key in MATRICES if name is None else MATRICES[:1]:
            np.testing.assert_array_equal(a.obsm[key], b.obsm[key])
    entries = [{k: v for k, v in c.uns["scmomer"].items() if k not in ("date", "command")} for c in (mine, other)]
    assert plain(entries[0]) == plain(entries[1])


@pytest.mark.parametrize("size", [1, 7])
def test_blocks_of_any_size_give_the_same_file(size, mixed, trusted, expected, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(query_module, "BLOCK_CELLS", size)
    run("predict_cell_type", data_path=mixed, model_path=trusted, out_path=tmp_path / "out.h5mu", device="cpu")
    assert_same(tmp_path / "out.h5mu", expected)
    tables = [
        (path.parent / "out.predicted.csv").read_text().splitlines() for path in (tmp_path / "out.h5mu", expected)
    ]
    assert tables[0][-96:] == tables[1][-96:]


def test_processes_share_the_cells(mixed, trusted, expected, tmp_path):  # noqa: F811
    flags = command_line(
        {"data_path": mixed, "model_path": trusted, "out_path": tmp_path / "out.h5mu", "device": "cpu"}
    )
    torchrun(2, str(ROOT / "predict_cell_type.py"), *flags)
    assert_same(tmp_path / "out.h5mu", expected)


def test_all_that_the_run_does_not_write_is_the_inputs(mixed, expected):
    parts = ("", "mod/rna/", "mod/atac/", "mod/prot/")
    written = {f"{part}obs/{name}" for part in parts for name in ALL_COLUMNS}
    written |= {f"{part}obsm/X_scmomer" for part in parts} | {f"obsm/{name}" for name in MATRICES} | {"uns/scmomer"}
    untouched(mixed, expected, written)
    with h5py.File(expected) as file:
        assert file["mod/prot/obsm/X_scmomer"].shape == (96, 16)


def test_labelling_again_changes_nothing(expected, trusted, tmp_path):  # noqa: F811
    run("predict_cell_type", data_path=expected, model_path=trusted, out_path=tmp_path / "out.h5mu", device="cpu")
    assert_same(tmp_path / "out.h5mu", expected)


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_cells_in_memory_give_the_numbers_of_the_file(compression, mixed, trusted, expected, tmp_path):  # noqa: F811
    from utils.predict import annotate

    cells = mudata.read_h5mu(mixed)
    assert_same(annotate(cells, trusted), expected)
    assert not {*ALL_COLUMNS, *MATRICES} & {*cells.obs, *cells.obsm, *cells["rna"].obs}
    cells.write(tmp_path / "in.h5mu", compression=compression)
    run("predict_cell_type", data_path=tmp_path / "in.h5mu", model_path=trusted, out_path=tmp_path / "out.h5mu")
    assert_same(tmp_path / "out.h5mu", expected)


def test_the_page_of_a_stream_reads_the_output(mixed, trusted, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(query_module, "BLOCK_CELLS", 7)
    shutil.copy(mixed, tmp_path / "in.h5mu")
    run("predict_cell_type", data_path=tmp_path / "in.h5mu", model_path=trusted, device="cpu", report=True)
    assert "26 cells have no prediction" in (tmp_path / "in.report.html").read_text(encoding="utf-8")
