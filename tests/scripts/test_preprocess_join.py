"""preprocess.py with several files: their cells one after the other, in the union of their genes."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from tests.builders import STATES, make_cells
from tests.helpers import RNA, TRAINING, call, error_of, lacks, run
from utils.cells.join import file_names, join_annotation
from utils.cells.preprocessed import STAMP
from utils.features.gene_symbols import load_gene_table
from utils.files import disk_matrix
from utils.files.file_hash import file_hash
from utils.files.write import write_whole

N_CELLS, N_GENES = 30, 40


def make_file(seed: int, genes: np.ndarray) -> ad.AnnData:
    """Cells of three types, with the given symbols."""
    adata = make_cells(seed, N_CELLS, len(genes))
    adata.var_names = genes
    adata.obs["cell_type"] = np.resize(["B", "NK", "T"], N_CELLS)
    return adata


@pytest.fixture
def parts() -> list[ad.AnnData]:
    """Two files that share 20 of 60 genes and one barcode: the symbols and counts, and Ensembl ids and log1p values."""
    table = load_gene_table().query("protein_coding and ensembl != ''")
    chosen = table.iloc[np.random.default_rng(0).choice(len(table), 60, replace=False)]
    symbols, ensembl = chosen["symbol"].to_numpy(), chosen["ensembl"].to_numpy()
    first, second = make_file(1, symbols[:N_GENES]), make_file(2, symbols[-N_GENES:])
    second.X = csr_matrix(STATES["log1p e"](second.X.toarray()).astype(np.float32))
    second.var_names = ensembl[-N_GENES:]
    second.obs_names = [first.obs_names[0], *second.obs_names[1:]]
    first.obs["donor"] = np.resize(["D1", "D2"], N_CELLS)
    first.obs["n"], second.obs["n"] = 1, 2.5
    second.obs["passed"] = True
    return [first, second]


@pytest.fixture
def paths(parts, tmp_path) -> list[Path]:
    for part, name in zip(parts, "ab", strict=True):
        write_whole(part, tmp_path / f"{name}.h5ad")
    return [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]


def joined(paths: list[Path], **flags) -> ad.AnnData:
    """Join files with preprocess.py, and read the result."""
    out = paths[0].with_name("joined.h5ad")
    run("preprocess", data_path=",".join(map(str, paths)), out_path=out, **flags)
    return ad.read_h5ad(out)


def test_rows_are_those_of_each_file_alone_against_the_union(paths, monkeypatch):
    together = joined(paths)
    assert together.shape == (2 * N_CELLS, 60) and list(together.var_names) == sorted(together.var_names)
    union = paths[0].with_name("union.txt")
    union.write_text("\n".join(together.var_names))
    for i, path in enumerate(paths):
        run("preprocess", data_path=path, out_path=path.with_suffix(".ready.h5ad"), gene_reference=union)
        alone, rows = ad.read_h5ad(path.with_suffix(".ready.h5ad")), together[i * N_CELLS : (i + 1) * N_CELLS]
        assert list(rows.var_names) == list(alone.var_names)
        np.testing.assert_array_equal(rows.X.toarray(), alone.X.toarray())
        np.testing.assert_array_equal(rows.layers["counts"].toarray(), alone.layers["counts"].toarray())
        assert (rows.layers["counts"].toarray().sum(0) > 0).sum() <= N_GENES
    # The same files against the union as reference, and in blocks of a few cells.
    for flags, block in (({"gene_reference": union}, disk_matrix.BLOCK), ({}, 3 * N_GENES)):
        monkeypatch.setattr(disk_matrix, "BLOCK", block)
        again = joined(paths, **flags)
        assert (again.X != together.X).nnz == 0 and again.obs.equals(together.obs)


def test_annotation_names_the_file_and_keeps_all_columns(parts, paths, capsys):
    obs = joined(paths, split_by="batch", test_groups="b", val_fraction=0.2).obs
    assert list(obs["batch"]) == ["a"] * N_CELLS + ["b"] * N_CELLS
    assert ((obs["split"] == "test") == (obs["batch"] == "b")).all()
    clash = parts[0].obs_names[0]
    assert [obs.index[0], obs.index[N_CELLS]] == [f"{clash}-a", f"{clash}-b"]
    assert list(obs.index[1:N_CELLS]) == list(parts[0].obs_names[1:])
    assert list(obs["donor"][:N_CELLS]) == list(parts[0].obs["donor"]) and obs["donor"][N_CELLS:].isna().all()
    assert obs["n"].tolist() == [1.0] * N_CELLS + [2.5] * N_CELLS
    assert obs["passed"][:N_CELLS].isna().all() and obs["passed"][N_CELLS:].all()
    shown = capsys.readouterr().out
    assert lacks(shown, "a.h5ad:", "b.h5ad:", "60 genes", "20 of them in every file", "a: 40 of", "b: 40 of") == []


def test_stamp_names_every_file(paths):
    stamp = json.loads(joined(paths).uns[STAMP])
    assert stamp["source"] == [{"name": path.name, "sha256": file_hash(path)} for path in paths]
    assert stamp["species"] == "human"


def test_a_panel_beside_a_large_file_is_joined(parts, paths):
    """As a file alone, it is not refused for having few of the genes; its column of symbols is found as before."""
    panel = parts[0][:, :4].copy()
    panel.obs["cell_type"] = np.resize(["B", "NK", "T"], N_CELLS)
    panel.var["name"] = panel.var_names
    panel.var_names = [f"row_{i}x" for i in range(4)]
    panel.obs_names = [f"p{i}" for i in range(N_CELLS)]
    write_whole(panel, paths[1].with_name("panel.h5ad"))
    out = joined([paths[0], paths[1].with_name("panel.h5ad")])
    assert out.n_vars == N_GENES
    expected = parts[0][:, :4].X.toarray()
    np.testing.assert_array_equal(out[N_CELLS:, parts[0].var_names[:4]].layers["counts"].toarray(), expected)


def test_no_counts_are_written_if_a_file_has_none(parts, paths, capsys):
    shares = np.random.default_rng(0).dirichlet(np.ones(N_GENES), N_CELLS)
    parts[1].X = csr_matrix(np.log1p(1e4 * shares).astype(np.float32))
    write_whole(parts[1], paths[1])
    out = joined(paths)
    assert "counts" not in out.layers and out.n_obs == 2 * N_CELLS
    assert lacks(capsys.readouterr().out, "no counts are written", "(b)") == []


def test_a_users_batch_column_is_not_replaced(parts, paths, capsys):
    parts[0].obs["batch"] = np.resize(["x", "y"], N_CELLS)
    write_whole(parts[0], paths[0])
    both = ",".join(map(str, paths))
    line = error_of(capsys, "preprocess", data_path=both, out_path=paths[0].with_name("joined.h5ad"))
    assert lacks(line, "--batch_column batch", "a.h5ad") == []
    obs = joined(paths, batch_column="study").obs
    assert set(obs["study"]) == {"a", "b"} and list(obs["batch"][:N_CELLS]) == list(parts[0].obs["batch"])


def test_doctor_examines_all_files(paths, capsys):
    split = ("--split_by", "batch", "--test_groups", "b")
    with pytest.raises(SystemExit) as stopped:
        call("preprocess", "--data_path", ",".join(map(str, paths)), "--json", *split)
    found = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 0 and found["usable"]
    assert {"rna of a", "rna of b"} <= found.keys()
    assert found["rna of b"]["ids"].startswith("Ensembl ids") and found["rna of a"]["ids"].startswith("symbols")
    assert lacks(" ".join(found["notes"]), "60 genes", "20 of them in every file", "a: 40 of") == []
    assert not paths[0].with_name("joined.h5ad").exists()


def test_training_and_prediction_on_the_joined_genes(paths, tmp_path):
    genes = list(joined(paths, val_fraction=0.2).var_names)
    ready = {"data_path": tmp_path / "joined.h5ad", "ckpt_dir": tmp_path}
    run("pretrain_rna", **ready, model_name="rna", **RNA)
    assert (tmp_path / "rna" / "genes.txt").read_text().splitlines() == genes
    model = {"pretrained_model_path": tmp_path / "rna", "model": "celltype", "other_modality": "zeros"}
    run("train_missing_celltype_func", **ready, **model, **TRAINING)
    for path in paths:
        run("predict_cell_type", data_path=path, model_path=tmp_path / "celltype", device="cpu")
        assert ad.read_h5ad(path.with_suffix(".predicted.h5ad")).obs["predicted_cell_type"].notna().all()


# Bad input ---------------------------------------------------------------------------------------------------------


def with_genes(names) -> ad.AnnData:
    """Cells whose genes have other names."""
    cells = make_cells(3, N_CELLS, N_GENES)
    cells.var_names = list(names(cells.var_names))
    return cells


BAD = {
    "mouse": (lambda: with_genes(lambda genes: [gene.capitalize() for gene in genes]), "mouse"),
    "no shared gene": (lambda: make_cells(3, N_CELLS, N_GENES), "shares no gene"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_do_not_fit(case, paths, capsys):
    make, word = BAD[case]
    write_whole(make(), paths[1])
    both = ",".join(map(str, paths))
    line = error_of(capsys, "preprocess", data_path=both, out_path=paths[0].with_name("joined.h5ad"))
    assert lacks(line, word, "a.h5ad" if case == "no shared gene" else "b.h5ad") == []
    assert not paths[0].with_name("joined.h5ad").exists()
    with pytest.raises(SystemExit) as stopped:
        call("preprocess", "--data_path", both, "--check")
    assert stopped.value.code == 2 and word in " ".join(capsys.readouterr().out.split())


def test_paths_that_are_not_joined(parts, paths, raw_file, capsys):
    first, second = map(str, paths)
    copy, folder = paths[0].with_name("copy.h5ad"), paths[0].parent
    copy.write_bytes(paths[0].read_bytes())
    joined(paths)
    for data_path, words in {
        f"{first},{first}": ("a.h5ad", "twice"),
        f"{first},{folder}/./a.h5ad": ("a.h5ad", "twice"),
        f"{first},{copy}": ("copy.h5ad", "same content"),
        f"{first},": ("--data_path", "empty"),
        f"{first},{folder / 'absent.h5ad'}": ("absent.h5ad",),
        f"{first},{raw_file}": ("cells.h5mu", "RNA only"),
        f"{second},{folder / 'joined.h5ad'}": ("joined.h5ad", "preprocessed already"),
    }.items():
        line = error_of(capsys, "preprocess", data_path=data_path, out_path=folder / "out.h5ad")
        assert lacks(line, *words) == [], line
    line = error_of(capsys, "preprocess", data_path=f"{first},{second}", out_path=second)
    assert lacks(line, "--out_path", "is the input") == []
    line = error_of(capsys, "preprocess", rna_path=f"{first},{second}", atac_path=first, out_path=folder / "out.h5ad")
    assert lacks(line, "--rna_path", "--data_path", "b.h5ad") == []
    assert not (folder / "out.h5ad").exists()


def test_a_file_with_a_comma_in_its_name_is_one_file(parts, tmp_path):
    write_whole(parts[0], tmp_path / "a,b.h5ad")
    assert "batch" not in joined([tmp_path / "a,b.h5ad"]).obs


# Functions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["x/a.h5ad", "y/b.h5ad"], ["a", "b"]),
        (["s1/cells.h5", "s2/cells.h5"], ["s1/cells", "s2/cells"]),
        (["a.csv.gz", "b.1.h5ad"], ["a", "b.1"]),
        (["a.h5ad", "a.csv"], ["a.h5ad", "a.csv"]),
        (["x/a.h5ad", "x/a.csv", "y/a.csv"], ["x/a.h5ad", "x/a.csv", "y/a.csv"]),
    ],
)
def test_file_names_tell_files_apart(paths, names):
    assert file_names([Path(path) for path in paths]) == names


def test_columns_keep_their_types(tmp_path):
    first = pd.DataFrame({"i": [1, 2], "f": [0.5, 1], "b": [True, False], "t": ["x", "y"], "m": [1, 2], "only": [3, 4]})
    second = first.drop(columns="only").assign(i=[3, 4], b=[1, 0], t=pd.Categorical(["z", "x"]), m=["1a", None])
    first.index, second.index = ["A", "B"], ["C", "D"]
    obs = join_annotation([first, second])
    assert [str(obs[column].dtype) for column in obs] == ["int64", "float64", "Int64", "category", "category", "Int64"]
    assert obs["t"].tolist() == ["x", "y", "z", "x"]
    assert obs["m"].isna().tolist() == [False, False, False, True] and obs["m"].tolist()[:3] == ["1", "2", "1a"]
    assert obs["only"].isna().tolist() == [False, False, True, True]
    write_whole(ad.AnnData(csr_matrix((4, 1)), obs), tmp_path / "obs.h5ad")
    assert ad.read_h5ad(tmp_path / "obs.h5ad").obs["only"].tolist()[:2] == [3, 4]
