"""The page about labelled cells: its numbers are those of the cells, and it is whole for any number of types."""

import base64
from dataclasses import replace
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.sparse import csr_matrix

from tests.evaluate.test_report_page import Page
from utils.evaluate import plots
from utils.evaluate.dot_plots import differing_genes, listed_genes
from utils.evaluate.label_figures import Types
from utils.evaluate.label_report import MEANINGS, LabelledCells, samples_of, write_label_report

ODD = '<b>&"quoted" $_{$; a very long name ' + "x" * 200


@pytest.fixture(autouse=True)
def flat_umap(monkeypatch):
    """The first two dimensions instead of UMAP, whose import alone takes as long as all of these tests."""
    monkeypatch.setattr(plots, "umap_coordinates", lambda embedding, **how: np.asarray(embedding)[:, :2])


def made(n_types: int = 3, n_cells: int = 240) -> LabelledCells:
    """Cells of which every type has three genes of its own, a tenth wrong, a few unassigned."""
    rng = np.random.default_rng(0)
    names = np.array([ODD, *(f"type {i}" for i in range(1, n_types))], dtype=object)
    true = np.arange(n_cells) % n_types
    code = np.where(rng.random(n_cells) < 0.9, true, (true + 1) % n_types)
    empty = np.arange(n_cells) % 60 == 59
    confidence = np.where(empty, 0.0, rng.uniform(0.4, 1, n_cells)).astype(np.float32)
    novelty = np.where(empty, np.nan, rng.random(n_cells)).astype(np.float32)
    sets = ["" if e else f"type {i}; type 0" if i else "type 1" for e, i in zip(empty, code, strict=True)]
    columns = pd.DataFrame(
        {
            "predicted_cell_type": pd.Categorical(np.where(empty, "unassigned", names[code])),
            "confidence": confidence,
            "prediction_set": pd.Categorical(sets),
            "novelty": novelty,
            "is_novel": np.nan_to_num(novelty) > 0.95,
            "rna_measured": ~empty,
        },
        index=[f"<i>&#{i}" for i in range(n_cells)],
    )
    counts = rng.poisson(0.1, (n_cells, 3 * n_types + 5))
    for i in range(n_types):
        counts[true == i, 3 * i : 3 * i + 3] += 3
    return LabelledCells(
        columns,
        rng.normal(size=(n_cells, 8)).astype(np.float32),
        {"file": "a & <b>.h5ad"},
        "predict_cell_type.py --data_path 'a & <b>.h5ad'",
        ["warning <x>"],
        csr_matrix(np.log1p(counts).astype(np.float32)),
        np.array([f"GENE{i}" for i in range(counts.shape[1])]),
        samples=np.array([f"donor <{i % 4}>" for i in range(n_cells)], dtype=object),
        sample_column="donor",
        truth=names[true],
        label_column="cell_type",
        known=list(names),
        novel_below=0.05,
        prefix="new_",
        written=("X_new_scmomer",),
    )


def read(cells: LabelledCells, folder) -> Page:
    """The page, which holds all that it shows and nothing that runs."""
    text = write_label_report(cells, folder / "page.html", "Types of <a>", "lead").read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text and "url(" not in text and "@import" not in text and "@media print" in text
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert len(page.links) == len(page.images)
    page.sizes = [Image.open(BytesIO(base64.b64decode(link.partition(",")[2]))).size for link in page.links]
    assert all(300 < width < 2600 and 200 < height < 3600 for width, height in page.sizes)
    return page


def rows_of(page: Page) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in page.cells if row}


@pytest.mark.parametrize("n_types", [1, 3, 40])
def test_the_numbers_are_those_of_the_cells(n_types, tmp_path):
    cells = made(n_types, 800 if n_types == 40 else 240)
    page = read(cells, tmp_path)
    assert len(page.images) == {1: 5, 3: 6, 40: 8}[n_types]  # 40 types need three dot plots
    columns = cells.columns
    head = next(row for row in page.cells if row and row[0] == "predicted type")
    tables = page.cells[page.cells.index(head) + 1 :]
    for name, n in columns["predicted_cell_type"].value_counts().items():
        row = dict(zip(head, next(row for row in tables if row[0] == name), strict=True))
        mine = columns[columns["predicted_cell_type"] == name]
        assert row["cells"] == f"{n:,}" and row["share"] == f"{n / len(columns):.1%}"
        assert row["novel"] == f"{mine['is_novel'].mean():.1%}"
        known = mine["confidence"][mine["confidence"] > 0].astype(float)
        assert row["median confidence"] == (f"{known.median():.3f}" if len(known) else "")
    listed = [row[0] for row in tables[: columns["predicted_cell_type"].nunique()]]
    sizes = columns["predicted_cell_type"].value_counts()
    assert listed[-1] == "unassigned" and list(sizes[listed[:-1]]) == sorted(sizes[listed[:-1]], reverse=True)


def test_every_column_is_explained_under_its_name_in_the_file(tmp_path):
    cells = made()
    explained = rows_of(read(cells, tmp_path))
    for name in cells.columns:
        assert explained[f"new_{name}"] == [MEANINGS[name]]
    assert "new_second_cell_type" not in explained and "X_new_scmomer" in explained
    assert explained["file"] == ["a & <b>.h5ad"]


def test_scores_against_the_true_labels(tmp_path):
    cells = made()
    page = read(cells, tmp_path)
    predicted = cells.columns["predicted_cell_type"].to_numpy(object)
    text = " ".join(page.shown["p"])
    assert f"Accuracy {(predicted == cells.truth).mean():.3f}" in text
    true_positive = ((predicted == "type 1") & (cells.truth == "type 1")).sum()
    f1 = 2 * true_positive / ((predicted == "type 1").sum() + (cells.truth == "type 1").sum())
    assert [f"{f1:.3f}"] in [row[-1:] for row in page.cells if row and row[0] == "type 1"]
    read_cells = predicted != "unassigned"
    held = [t in s.split("; ") for t, s in zip(cells.truth, cells.columns["prediction_set"], strict=True)]
    assert any(f"{np.mean(np.array(held)[read_cells]):.1%}" in line for line in page.shown["li"])
    other = replace(cells, truth=np.full(len(predicted), "neuron", dtype=object))
    assert len(read(other, tmp_path).images) == 5 and "Against the true labels" in read(other, tmp_path).shown["h2"]


def test_an_old_folder_and_a_file_without_samples(tmp_path):
    cells = made()
    few = cells.columns[["predicted_cell_type", "confidence"]]
    page = read(replace(cells, columns=few, samples=None, sample_column=None, truth=None), tmp_path)
    explained = rows_of(page)
    assert "new_novelty" not in explained and "new_prediction_set" not in explained
    assert "Against the true labels" not in page.shown["h2"] and "--sample_column" in " ".join(page.shown["p"])
    assert len(page.images) == 5


def test_one_cell_and_no_cell_that_was_read(tmp_path):
    cells = made()
    one = replace(
        cells,
        columns=cells.columns[:1],
        embedding=cells.embedding[:1],
        values=cells.values[:1],
        samples=cells.samples[:1],
        truth=cells.truth[:1],
    )
    assert len(read(one, tmp_path).images) == 5  # no genes differ
    columns = cells.columns.assign(predicted_cell_type="unassigned", confidence=0.0, prediction_set="", novelty=np.nan)
    page = read(replace(cells, columns=columns.assign(is_novel=False)), tmp_path)
    assert (
        any(row[:3] == ["unassigned", "–", "240"] for row in page.cells) and len(page.images) == 2
    )  # composition and confusion
    missing = columns.assign(predicted_cell_type=np.nan, confidence=np.nan)
    assert read(replace(cells, columns=missing), tmp_path).images == []


def test_genes_that_differ_are_the_planted_ones():
    cells = made(4, 400)
    types = Types(cells.columns["predicted_cell_type"])
    found = differing_genes(cells.values, cells.features, types)
    for i, genes in found.groupby("type")["gene"]:
        name = types.names[i]
        code = 0 if name == ODD else int(name.removeprefix("type "))
        assert set(genes) == {f"GENE{3 * code + j}" for j in range(3)}
    row = found.iloc[0]
    mine = np.flatnonzero(types.codes == row["type"])
    column = cells.values[:, int(row["gene"].removeprefix("GENE"))].toarray().ravel()
    assert row[f"mean {row['type']}"] == pytest.approx(column[mine].mean(), abs=1e-5)
    assert row[f"share {row['type']}"] == pytest.approx((column[mine] > 0).mean())
    rng = np.random.default_rng(1)  # labels that mean nothing: differences near zero
    shuffled = Types(rng.permutation(cells.columns["predicted_cell_type"].to_numpy(object)))
    noise = differing_genes(cells.values, cells.features, shuffled)
    assert noise["difference"].max() < 0.4 * found["difference"].min()


def explained(cells: LabelledCells, n_types: int, n: int = 10) -> LabelledCells:
    """The same cells with the planted genes of each type as an explanation, and further genes."""
    names = [ODD, *(f"type {i}" for i in range(1, n_types))]
    rows = [(name, f"GENE{(3 * i + j) % len(cells.features)}") for i, name in enumerate(names) for j in range(n)]
    listed = pd.DataFrame(rows, columns=["type", "feature"])
    return replace(cells, explained=listed, explained_check=["explanation of <all>: the check holds"])


@pytest.mark.parametrize(("n_types", "figures"), [(1, 1), (3, 1), (15, 1), (40, 3)])
def test_genes_of_an_explanation_are_drawn(n_types, figures, tmp_path):
    page = read(explained(made(n_types, 800 if n_types > 10 else 240), n_types), tmp_path)
    assert len(page.images) == {1: 5, 3: 6, 15: 6, 40: 8}[n_types] + figures
    assert "explanation of <all>: the check holds" in page.shown["li"]
    assert any("model has used" in heading for heading in page.shown["h2"])


def test_an_explanation_without_genes(tmp_path):
    page = read(replace(made(), explained=pd.DataFrame(columns=["type", "feature"])), tmp_path)
    assert len(page.images) == 6 and any("speaks for a type" in line for line in page.shown["p"])


def test_listed_genes_have_the_means_of_the_cells():
    cells = explained(made(4, 400), 4)
    types = Types(cells.columns["predicted_cell_type"])
    found = listed_genes(cells.values, cells.features, types, cells.explained, 2)
    assert len(found) == 8 and found["type"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert set(found.loc[found["type"] == types.names.index("type 2"), "gene"]) == {"GENE6", "GENE7"}
    mine = np.flatnonzero(types.codes == types.names.index("type 2"))
    row = found[found["gene"] == "GENE6"].iloc[0]
    mean = cells.values[mine][:, 6].mean()
    assert row[f"mean {types.names.index('type 2')}"] == pytest.approx(mean, abs=1e-5)


def test_the_column_of_samples():
    obs = pd.DataFrame({"batch": ["1", "2"], "donor": ["a", "b"]})
    assert samples_of(obs, None)[0] == "donor" and list(samples_of(obs, "batch")[1]) == ["1", "2"]
    assert samples_of(obs[[]], None) == (None, None)
