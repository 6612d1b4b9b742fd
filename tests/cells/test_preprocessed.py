"""Raw files that are read or refused, preprocessed cells, and files that are written completely or not at all."""

import json
import os
import re
import shutil
from dataclasses import replace

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

from tests.helpers import run
from utils.cells.labels import encode_labels
from utils.cells.minibatches import CellDataset, train_and_val
from utils.cells.preprocessed import STAMP, read_cells, read_raw
from utils.errors import UserError
from utils.files.disk_rows import FileRows
from utils.files.write import write_whole


def rna(n: int = 4, prefix: str = "cell", **obs) -> ad.AnnData:
    counts = csr_matrix(np.arange(3 * n, dtype=np.float32).reshape(n, 3))
    index = [f"{prefix}{i}" for i in range(n)]
    return ad.AnnData(counts, pd.DataFrame(obs, index=index), pd.DataFrame(index=["CD4", "CD8A", "MS4A1"]))


def atac(n: int = 4) -> ad.AnnData:
    peaks = ["chr1:10-20", "chr1:30-40", "chr2:10-20"]
    return ad.AnnData(rna(n).X, rna(n).obs, pd.DataFrame(index=peaks))


def stamped(content, **changes):
    """Mark the cells as preprocessed."""
    content.uns[STAMP] = json.dumps({"version": 1, "label_column": "kind"} | changes)
    return content


@pytest.mark.parametrize(
    ("content", "name", "modalities"),
    [
        (rna(), "a.h5ad", ["rna"]),
        (atac(), "a.h5ad", ["atac"]),
        (mudata.MuData({"atac": atac(), "rna": rna(), "adt": rna()}), "a.h5mu", ["rna", "atac"]),
        (mudata.MuData({"atac": atac()}), "a.h5mu", ["atac"]),
    ],
    ids=["rna", "atac", "both", "atac in h5mu"],
)
def test_modalities_are_recognised(tmp_path, content, name, modalities):
    content.write(tmp_path / name)
    file = read_raw(str(tmp_path / name))
    assert (list(file.modalities), file.stamp, file.path) == (modalities, None, tmp_path / name)
    for source in file.modalities.values():
        np.testing.assert_array_equal(source.matrices["X"][0].rows(0, 4).toarray(), rna().X.toarray())


def test_obs_has_the_columns_of_the_file_and_of_its_modalities(tmp_path):
    content = mudata.MuData({"rna": rna(donor=list("abab")), "atac": atac()})
    content.obs["plate"] = [1, 2, 3, 4]
    content.write(tmp_path / "a.h5mu")
    obs = read_raw(tmp_path / "a.h5mu").obs
    assert obs["plate"].tolist() == [1, 2, 3, 4]
    assert obs["donor"].tolist() == list("abab")


def duplicated_barcodes() -> ad.AnnData:
    content = rna()
    content.obs_names = ["a", "b", "a", "c"]
    return content


BAD = {
    "absent.h5ad": (None, "no such file"),
    "folder.h5ad": ("folder", "matrix.mtx"),
    "words.csv": ("cell,CD4\nc1,many\n", "'many'"),
    "line.tsv": ("cell\tCD4\n", "1 line"),
    "binary.txt": ("\x00\x01\x02\n\x00\n", "table"),
    "text.h5ad": ("not a matrix\n", ".h5ad"),
    "text.h5mu": ("not a matrix\n", ".h5mu"),
    "empty.h5ad": ("", "is empty"),
    "empty.csv": ("", "is empty"),
    "other.h5mu": (mudata.MuData({"adt": rna()}), "adt"),
    "twice.h5ad": (duplicated_barcodes(), "unique"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BAD)
def test_unreadable_files_are_named(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / name
    if isinstance(content, str):
        path.mkdir() if content == "folder" else path.write_text(content)
    elif content is not None:
        written = tmp_path / f"written{'.h5mu' if isinstance(content, mudata.MuData) else '.h5ad'}"
        content.write(written)
        os.rename(written, path)
    with pytest.raises(UserError) as error:
        read_raw(path)
    named, _, problem = str(error.value).partition(": ")
    assert named == str(path)
    assert message in problem
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "a.h5ad"
    rna(400).write(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=f"{path}: "):
        read_raw(path)


# Stamped files -----------------------------------------------------------------------------------------------------


def test_cells_of_two_modalities_are_joined_by_barcode(tmp_path):
    both = mudata.MuData({"rna": rna(6), "atac": atac(6)[[5, 2, 0, 3]].copy()})
    both.obs["split"] = both.obs_names.map(lambda name: "val" if name == "cell2" else "train")
    stamped(both).write(tmp_path / "a.h5mu")
    cells = read_cells(tmp_path / "a.h5mu", ("rna", "atac"))
    rows = [0, 2, 3, 5]
    assert list(cells.obs.index) == [f"cell{i}" for i in rows]
    for name in ("rna", "atac"):
        np.testing.assert_array_equal(cells.values[name][:].toarray(), rna(6).X.toarray()[rows])
        assert cells.values[name][:].dtype == np.float32
    assert cells.rows("val").tolist() == [1]
    assert cells.rows("train").tolist() == [0, 2, 3]
    assert cells.rows("test").tolist() == []
    assert cells.features["atac"].tolist() == atac().var_names.tolist()


def test_labels_come_from_the_stamped_column_and_missing_ones_stay_missing(tmp_path):
    kind = pd.Categorical(["T", None, "B", "T", ""], categories=["", "B", "T"])
    content = rna(5, split=["train"] * 5, kind=kind, number=[1, 2, 1, 2, 3])
    stamped(content).write(tmp_path / "a.h5ad")
    cells = read_cells(tmp_path / "a.h5ad", ("rna",))
    labels = cells.labels()
    assert labels.isna().tolist() == [False, True, False, False, True]
    assert labels.dropna().tolist() == ["T", "B", "T"]
    assert cells.codes("kind", "--pair_labels").tolist() == [0, -1, 1, 0, -1]
    assert cells.labels("number").tolist() == ["1", "2", "1", "2", "3"]
    assert cells.labels("absent") is None


FOREIGN = ("foo", "", "[1]", '{"model": "x"}', {"prediction": {"model": "x"}}, 3)


def foreign(what) -> ad.AnnData:
    """A file in which another program, or a prediction, wrote something under our key of uns."""
    content = rna(4)
    content.uns[STAMP] = what
    return content


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_with_a_foreign_stamp_is_a_raw_file(what, tmp_path):
    foreign(what).write(tmp_path / "a.h5ad")
    file = read_raw(tmp_path / "a.h5ad")
    assert file.stamp is None
    assert "uns['scmomer']" in " ".join(file.notes)
    run("preprocess", data_path=tmp_path / "a.h5ad", out_path=tmp_path / "ready.h5ad")
    assert read_raw(tmp_path / "ready.h5ad").stamp["version"] == 1
    assert read_raw(tmp_path / "ready.h5ad").notes == []


@pytest.mark.parametrize(
    ("content", "modalities", "message"),
    [
        (rna(), ("rna",), "run python preprocess.py --data_path {path} --out_path {ready}"),
        *((foreign(what), ("rna",), "has not been preprocessed by this project") for what in FOREIGN),
        (stamped(rna(), version=0), ("rna",), "preprocessed by another version"),
        (stamped(rna()), ("rna", "atac"), "holds rna only, but this stage needs rna and atac"),
        (stamped(rna()), ("atac",), "holds rna only, but this stage needs atac"),
    ],
)
def test_cells_that_are_not_preprocessed_are_refused(tmp_path, content, modalities, message):
    path = tmp_path / "a.h5ad"
    content.write(path)
    with pytest.raises(UserError) as error:
        read_cells(path, modalities)
    assert message.format(path=path, ready=tmp_path / "a.ready.h5ad") in str(error.value)


def partly_paired(tmp_path, split: list[str]):
    """Write ten cells: the first four have RNA only, the other six have both modalities."""
    both = mudata.MuData({"rna": rna(10), "atac": atac(10)[4:].copy()})
    both.obs["split"] = split
    stamped(both).write(tmp_path / "a.h5mu")
    return tmp_path / "a.h5mu"


def test_cells_without_a_modality_are_counted(tmp_path):
    path = partly_paired(tmp_path, ["train"] * 10)
    (note,) = read_cells(path, ("rna", "atac")).notes
    assert re.match(r"a\.h5mu: 6 of 10 cells .* both rna and atac; .* 4 ", note)
    (note,) = read_cells(path, ("atac",)).notes
    assert re.match(r"a\.h5mu: 6 of 10 cells .* atac; .* 4 ", note)
    assert read_cells(path, ("rna",)).notes == []


def test_training_needs_a_paired_training_cell(tmp_path):
    """Such files can still be read, for example to evaluate a model; only training stops."""
    path = partly_paired(tmp_path, ["train"] * 4 + ["test"] * 6)
    cells = read_cells(path, ("rna", "atac"))
    assert len(cells.rows("test")) == 6
    for use in (cells.need_training, lambda: cells.train_mean("rna"), lambda: train_and_val(cells, 0)):
        with pytest.raises(UserError, match=f"{path}: none of its 6 cells .*--test_groups"):
            use()
    cells.obs["kind"] = ["T", "B"] * 3
    with pytest.raises(UserError, match="none of its 6 cells"):
        encode_labels(cells, "kind")
    assert train_and_val(read_cells(path, ("rna",)), 0)[0].lengths.shape == (4,)


def test_simulated_cells_are_marked(simulation, raw_file, tmp_path):
    assert read_raw(raw_file).simulated
    simulation.mdata["rna"].copy().write(tmp_path / "rna.h5ad")
    assert read_raw(tmp_path / "rna.h5ad").simulated
    rna().write(tmp_path / "real.h5ad")
    assert not read_raw(tmp_path / "real.h5ad").simulated


def test_modalities_without_a_common_cell_are_refused(tmp_path):
    both = mudata.MuData({"rna": rna(3, "left"), "atac": atac(3)})
    stamped(both).write(tmp_path / "a.h5mu")
    with pytest.raises(UserError, match=f"{tmp_path / 'a.h5mu'}: no cell .* rna and atac"):
        read_cells(tmp_path / "a.h5mu", ("rna", "atac"))


# Writing -----------------------------------------------------------------------------------------------------------


def test_a_file_is_written_into_new_folders(tmp_path):
    path = tmp_path / "new" / "deep" / "a.h5ad"
    write_whole(rna(), path)
    np.testing.assert_array_equal(ad.read_h5ad(path).X.toarray(), rna().X.toarray())
    assert os.listdir(path.parent) == ["a.h5ad"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.h5ad"
    write_whole(rna(3), path)
    bad = rna(5)
    bad.uns["unwritable"] = object()
    with pytest.raises(Exception):  # noqa: B017  whatever anndata raises
        write_whole(bad, path)
    assert ad.read_h5ad(path).n_obs == 3
    assert os.listdir(tmp_path) == ["a.h5ad"]


def test_a_path_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=f"{tmp_path / 'file' / 'a.h5ad'}: .*--out_path"):
        write_whole(rna(), tmp_path / "file" / "a.h5ad")


class TestWhatPreprocessingKnows:
    """Hashes and sums that preprocessing wrote are used as long as they fit the values."""

    @pytest.fixture
    def reads(self, monkeypatch) -> list:
        """The numbers of cells that are read from the file."""
        counted, getitem = [], FileRows.__getitem__

        def noted(rows, numbers):
            part = getitem(rows, numbers)
            counted.append(part.shape[0])
            return part

        monkeypatch.setattr(FileRows, "__getitem__", noted)
        return counted

    def test_nothing_is_read_for_a_fingerprint_or_a_mean(self, ready_file, reads):
        cells = read_cells(ready_file, ("rna", "atac"))
        train, val = train_and_val(cells, 0)
        checked = sum(reads)
        assert checked <= 2 * 64
        known = train.fingerprint, val.fingerprint, cells.train_mean("rna"), cells.train_mean("atac")
        assert sum(reads) == checked
        forgetful = replace(cells, values={name: values[:] for name, values in cells.values.items()}, train_sums={})
        train, val = train_and_val(forgetful, 0)
        computed = train.fingerprint, val.fingerprint, forgetful.train_mean("rna"), forgetful.train_mean("atac")
        assert known[:2] == computed[:2]
        for ours, theirs in zip(known[2:], computed[2:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("change", ["values", "split", "hashes", "absent"])
    def test_what_does_not_fit_is_computed_anew(self, change, ready_file, tmp_path, reads):
        path = tmp_path / "cells.h5mu"
        shutil.copy(ready_file, path)
        with h5py.File(path, "r+") as file:
            if change == "values":
                file["mod/rna/X/data"][...] = file["mod/rna/X/data"][...] * 2
            elif change == "split":
                codes = file["obs/split/codes"][...]
                file["obs/split/codes"][...] = codes[::-1]
            elif change == "hashes":
                del file["uns/scmomer_known/rna/hashes"]
                file["uns/scmomer_known/rna/hashes"] = np.zeros(3, np.uint64)
            else:
                del file["uns/scmomer_known"]
        cells, before = read_cells(path, ("rna", "atac")), read_cells(ready_file, ("rna", "atac"))
        expected = cells.values["rna"][cells.rows("train")].mean(0)
        np.testing.assert_allclose(cells.train_mean("rna"), np.asarray(expected).ravel(), rtol=1e-5, atol=1e-7)
        ours, theirs = (CellDataset(c.values, c.obs.index).fingerprint for c in (cells, before))
        assert (ours == theirs) == (change != "values")
