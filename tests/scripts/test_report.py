"""The page of predict_cell_type.py and evaluate.py: beside the output, only with --report, equal to the file."""

import json

import anndata as ad
import mudata
import numpy as np
import pytest

from tests.evaluate.test_label_report import flat_umap  # noqa: F401  the fixture counts for this file, too
from tests.evaluate.test_report_page import Page
from tests.helpers import error_of, run
from tests.scripts.test_predict import forge
from tests.scripts.test_trust import forget, trusted  # noqa: F401
from utils.files.write import write_whole


@pytest.fixture
def query(simulation, tmp_path):
    """Raw RNA of 40 cells with HTML in the barcodes and donors; the last one has no counts."""
    rna = simulation.mdata["rna"][:40].copy()
    rna.obs["donor"] = [f"<b>{name}&" for name in rna.obs["donor"]]
    rna.obs["true_type"] = simulation.mdata.obs["cell_type"].reindex(rna.obs_names).to_numpy()
    rna.obs_names = [f"<td>{name}" for name in rna.obs_names]
    rna.X.data[rna.X.indptr[39] :] = 0
    write_whole(rna, tmp_path / "a&b.h5ad")
    return tmp_path / "a&b.h5ad"


def page_of(query, model, out, **flags) -> Page:
    run("predict_cell_type", data_path=query, model_path=model, out_path=out, device="cpu", report=True, **flags)
    name = out.name.removesuffix(out.suffix).removesuffix(".predicted")
    text = (out.with_name(f"{name}.report.html")).read_text(encoding="utf-8")
    assert "<script" not in text
    page = Page(text)
    assert page.images and all(link.startswith("data:image/png;base64,") for link in page.links)
    return page


def test_the_page_stands_beside_the_output_and_agrees_with_it(query, trusted, tmp_path):  # noqa: F811
    page = page_of(query, trusted, tmp_path / "out.predicted.h5ad", label_column="true_type", prefix="new_")
    out = ad.read_h5ad(tmp_path / "out.predicted.h5ad")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("a&b.h5ad", "out.predicted.h5ad", "out.predicted.csv", "out.report.html")
    }
    rows = [row for row in page.cells if row]
    for name, n in out.obs["new_predicted_cell_type"].value_counts().items():
        assert any(row[0] == name and row[2:4] == [f"{n:,}", f"{n / 40:.1%}"] for row in rows)
    explained = {row[0] for row in rows}
    written = [f"obs['{name}']" for name in out.obs if name.startswith("new_")]
    assert {name[5:-2] for name in written} | set(out.obsm) <= explained
    entry = out.uns["new_scmomer"]
    facts = {row[0]: row[1] for row in rows if len(row) == 2}
    assert facts["hash of the model folder"] == entry["model_hash"]
    assert f"{entry['rna_coverage']:.1%}" in facts["genes of the model in the file"]
    assert entry["command"] in page.shown["pre"] and set(map(str, entry["warnings"])) <= set(page.shown["li"])
    right = (out.obs["new_predicted_cell_type"].astype(str) == out.obs["true_type"].astype(str)).mean()
    assert f"Accuracy {right:.3f}" in " ".join(page.shown["p"])


def test_without_the_flag_there_is_no_page(query, trusted, capsys):  # noqa: F811
    run("predict_cell_type", data_path=query, model_path=trusted, device="cpu")
    assert not list(query.parent.glob("*.html")) and (query.parent / "a&b.predicted.h5ad").exists()
    line = error_of(capsys, "predict_cell_type", data_path=query, model_path=trusted, sample_column="donor")
    assert "--sample_column" in line and "--report" in line
    for flag in ("sample_column", "label_column"):
        line = error_of(
            capsys,
            "predict_cell_type",
            data_path=query,
            model_path=trusted,
            report=True,
            device="cpu",
            **{flag: "nothing"},
        )
        assert f"--{flag} nothing" in line and "true_type" in line


def test_one_cell_by_an_old_folder(query, trusted, tmp_path):  # noqa: F811
    forge(trusted, tmp_path / "old", forget)
    one = ad.read_h5ad(query)[:1].copy()
    write_whole(one, tmp_path / "one.h5ad")
    page = page_of(tmp_path / "one.h5ad", tmp_path / "old", tmp_path / "one.predicted.h5ad")
    explained = {row[0] for row in page.cells if row}
    assert "confidence" in explained and "novelty" not in explained
    assert any("left out" in line for line in page.shown["li"])


def test_paired_cells_of_which_some_lack_what_the_model_reads(simulation, trusted, tmp_path):  # noqa: F811
    rna, atac = simulation.mdata["rna"][:30].copy(), simulation.mdata["atac"][5:40].copy()
    mdata = mudata.MuData({"rna": rna, "atac": atac})
    write_whole(mdata, tmp_path / "both.h5mu")
    page = page_of(tmp_path / "both.h5mu", trusted, tmp_path / "both.predicted.h5mu")
    out = mudata.read_h5mu(tmp_path / "both.predicted.h5mu")
    missing = int(out.obs["predicted_cell_type"].isna().sum())
    assert missing == 10 and any(f"{missing} cells have no prediction" in line for line in page.shown["p"])
    assert len(page.images) >= 4 and np.isnan(out.obs["confidence"].to_numpy(float)).sum() == 10


def test_evaluate_writes_the_same_page(ready_file, trusted, tmp_path):  # noqa: F811
    flags = {"data_path": ready_file, "model_path": trusted, "out_path": tmp_path, "split": "val", "device": "cpu"}
    run("evaluate", **flags, model_alone=True)
    assert not list(tmp_path.glob("*.html"))
    run("evaluate", **flags, model_alone=True, report=True)
    page = Page((tmp_path / "report_val.html").read_text(encoding="utf-8"))
    scores = json.loads((tmp_path / "evaluation_val.json").read_text())["scmomer"]
    text = " ".join(page.shown["p"])
    assert f"Accuracy {scores['accuracy']:.3f}, macro F1 {scores['macro_f1']:.3f}" in text
    assert any(f"{scores['set_coverage']:.1%} of the sets hold the true type" in line for line in page.shown["li"])
    assert "What each column means" in page.shown["h2"] and len(page.images) >= 5
