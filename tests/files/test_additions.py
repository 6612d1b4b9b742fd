"""Additions to a copy of a file: it stays what it was, bit for bit, and reads as cells that were changed in memory."""

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from tests.builders import make_cells, make_peaks
from utils.errors import UserError
from utils.files.additions import copied_file, fill, parts_in_memory


def items(group: h5py.Group) -> dict[str, tuple]:
    """Everything in a file by name: attributes, and of datasets also their values and how they are stored."""
    found = {}

    def visit(name: str, item) -> None:
        attributes = {key: np.asarray(value).tolist() for key, value in item.attrs.items()}
        stored = ()
        if isinstance(item, h5py.Dataset):
            stored = item.dtype, item.chunks, item.compression, np.asarray(item[()]).tobytes()
            if h5py.check_vlen_dtype(item.dtype):  # text: the bytes in memory are addresses
                stored = (*stored[:3], np.asarray(item[()]).tolist())
        found[name] = attributes, stored

    visit("", group)
    group.visititems(visit)
    return found


def untouched(before, after, written: set[str]) -> None:
    """Raise unless `after` holds all of `before`, and nothing else but `written` and what is below."""
    with h5py.File(before) as a, h5py.File(after) as b:
        ours, theirs = items(a), items(b)
    for name, item in ours.items():
        if name.endswith("obs") and name.removesuffix("obs") in ("", *(f"{w.split('/obs')[0]}/" for w in written)):
            kept = theirs[name][0]["column-order"][: len(item[0]["column-order"])]
            assert kept == item[0]["column-order"]
            continue
        assert theirs[name] == item, name
    new = {name for name in theirs if name not in ours}
    assert {name for name in new if not any(name == w or name.startswith(f"{w}/") for w in written)} == set()


@pytest.fixture
def rich(tmp_path):
    """A compressed file with something in each of its places."""
    cells = make_cells(n_cells=20)
    cells.obs["text"] = [f"#{i}" for i in range(20)]
    cells.obs["class"] = pd.Categorical(["a", None] * 10)
    cells.obs["flag"] = pd.array([None, *[True] * 19], dtype="boolean")
    cells.obs.index.name = "barcode"
    cells.layers["other"] = cells.X * 2
    cells.raw = cells.copy()
    cells.obsm["mine"] = pd.DataFrame({"x": np.arange(20.0)}, index=cells.obs_names)
    cells.obsp["near"] = csr_matrix(np.eye(20))
    cells.uns["nested"] = {"a": np.arange(3), "b": {"c": "text"}}
    cells.write(tmp_path / "rich.h5ad", compression="gzip")
    return tmp_path / "rich.h5ad"


def add_everything(part) -> None:
    """Column, array, table and entry, of some rows only and in two steps."""
    n = len(part.names)
    part.columns(pd.DataFrame({"new": pd.Categorical(["u", None] * (n // 2)), "score": np.float32(range(n))}))
    array = part.array("X_new", 3)
    fill(array, np.array([4, 2, -1, 3]), np.float32(np.arange(12).reshape(4, 3)))
    fill(array, np.array([0]), np.ones((1, 3), np.float32))
    for number, column in enumerate(part.table("table", ["T/B".replace("/", "|"), "barcode"])):
        fill(column, np.arange(n)[::-1], np.float32(np.arange(n) + number))
    part.set_entry("about", {"model": "m", "written": np.array(["obs['new']"], dtype=object)})


def test_the_copy_is_the_input_and_the_additions(rich, tmp_path):
    with copied_file(rich, tmp_path / "out.h5ad") as parts:
        add_everything(parts[0])
    written = {"obs/new", "obs/score", "obsm/X_new", "obsm/table", "uns/about"}
    untouched(rich, tmp_path / "out.h5ad", written)
    ours, theirs = ad.read_h5ad(tmp_path / "out.h5ad"), ad.read_h5ad(rich)
    add_everything(parts_in_memory(theirs)[0])
    pd.testing.assert_frame_equal(ours.obs, theirs.obs)
    np.testing.assert_array_equal(ours.obsm["X_new"], theirs.obsm["X_new"])
    assert ours.obsm["X_new"][2].tolist() == [3, 4, 5] and np.isnan(ours.obsm["X_new"][1]).all()
    pd.testing.assert_frame_equal(ours.obsm["table"], theirs.obsm["table"], check_names=False)
    assert ours.obsm["table"]["barcode"].tolist() == [float(20 - i) for i in range(20)]
    assert ours.uns["about"]["model"] == theirs.uns["about"]["model"]


def test_what_was_added_is_removed_again(rich, tmp_path):
    with copied_file(rich, tmp_path / "one.h5ad") as parts:
        add_everything(parts[0])
    with copied_file(tmp_path / "one.h5ad", tmp_path / "two.h5ad") as (part,):
        for kind, key in (("obs", "new"), ("obs", "score"), ("obsm", "X_new"), ("obsm", "table"), ("obsm", "nothing")):
            part.remove(kind, key)
        part.move_entry("about", "kept")
        assert part.entry("about") is None and part.entry("kept")["model"] == "m"
    untouched(rich, tmp_path / "two.h5ad", {"uns/kept"})
    assert list(ad.read_h5ad(tmp_path / "two.h5ad").obs) == list(ad.read_h5ad(rich).obs)


def test_each_modality_is_a_part(tmp_path):
    rna = make_cells(n_cells=12)
    mudata.MuData({"rna": rna, "atac": make_peaks(rna.obs_names[:8])}).write(tmp_path / "in.h5mu")
    with copied_file(tmp_path / "in.h5mu", tmp_path / "out.h5mu") as parts:
        assert [len(part.names) for part in parts] == [12, 8, 12]  # in the order of their names
        for part in parts:
            part.columns(pd.DataFrame({"score": np.arange(len(part.names))}))
    untouched(
        tmp_path / "in.h5mu", tmp_path / "out.h5mu", {f"{where}obs/score" for where in ("", "mod/rna/", "mod/atac/")}
    )
    assert mudata.read_h5mu(tmp_path / "out.h5mu").mod["atac"].obs["score"].tolist() == list(range(8))


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, OSError])
def test_an_interruption_leaves_nothing_or_the_earlier_file(error, rich, tmp_path):
    (tmp_path / "old.h5ad").write_text("old")
    for name in ("new.h5ad", "old.h5ad"):
        with pytest.raises((error, UserError)), copied_file(rich, tmp_path / name) as (part,):
            part.array("X_new", 3)
            raise error
    assert {path.name for path in tmp_path.iterdir()} == {"rich.h5ad", "old.h5ad"}
    assert (tmp_path / "old.h5ad").read_text() == "old"
