"""Folders on the Hugging Face hub, against a stand-in of its API on this machine: download, cache, errors, push."""

import re
from pathlib import Path

import anndata as ad
import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from tests.helpers import error_of, lacks, python, run
from tests.hub_server import TOKEN, Hub, serve
from utils.errors import UserError
from utils.files.write import write_whole
from utils.predict.box import BOX
from utils.predict.label import label_cells
from utils.train.hub import local_folder, without_front_matter
from utils.train.model_folder import load_model

REAL = constants.ENDPOINT


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    """A hub to which this process is led, with an empty cache and nobody logged in."""
    with serve() as (hub, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(REAL, address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        disable_progress_bars()
        monkeypatch.delenv("HF_TOKEN", raising=False)
        hub.address = address
        yield hub
        enable_progress_bars()


@pytest.fixture
def query(simulation, tmp_path) -> Path:
    """Raw RNA of ten cells."""
    path = tmp_path / "query.h5ad"
    write_whole(simulation.mdata["rna"][:10].copy(), path)
    return path


def test_a_folder_from_the_hub_is_the_folder(hub, runs):
    hub.add("lab/blood", runs["celltype_atac"])
    ours, theirs = load_model("hf://lab/blood", "celltype"), load_model(runs["celltype_atac"], "celltype")
    assert ours.hash == theirs.hash and ours.outputs == theirs.outputs
    assert (ours.name, theirs.name) == ("lab/blood", "celltype_atac")
    assert load_model(Path("hf://lab/blood"), "celltype").address == ours.address == "hf://lab/blood"
    commit = ours.path.name
    asked = len(hub.asked)
    assert load_model(f"hf://lab/blood@{commit}", "celltype").path == ours.path
    assert not [path for method, path in hub.asked[asked:] if "resolve" in path]  # from the cache


def test_predictions_are_those_of_the_local_folder(hub, runs, query):
    hub.add("lab/blood", runs["celltype_atac"])
    run("predict_cell_type", data_path=query, model_path="hf://lab/blood", device="cpu", ckpt_dir=runs.folder)
    found, expected = ad.read_h5ad(query.with_name("query.predicted.h5ad")), label_cells(query, runs["celltype_atac"])
    assert found.obs["confidence"].tolist() == expected.obs["confidence"].tolist()
    assert found.uns["scmomer"]["model"] == "lab/blood"
    assert found.uns["scmomer"]["model_hash"] == expected.uns["scmomer"]["model_hash"]


def test_every_script_that_reads_a_model_folder_takes_an_address(hub, runs, ready_file, query, tmp_path, capsys):
    """Each reaches the hub: a folder of the wrong kind is refused under its address."""
    hub.add("lab/wrong", runs["rna"])
    address, ready = "hf://lab/wrong", {"data_path": ready_file, "ckpt_dir": tmp_path, "model_name": "m"}
    calls = [
        ("predict_cell_type", {"data_path": query, "model_path": address}),
        ("evaluate", {"data_path": ready_file, "model_path": address, "out_path": tmp_path}),
        ("get_latent_emb", {"data_path": ready_file, "model_path": address, "ckpt_dir": tmp_path}),
        ("pretrain_multimodal", {**ready, "rna_model_path": runs["rna"], "atac_model_path": address}),
        ("pretrain_missing_mod", {**ready, "model_path": address, "dir_train": tmp_path, "dir_val": tmp_path}),
        (
            "train_missing_celltype_func",
            {**ready, "pretrained_model_path": runs["student_atac"], "pseudo_labels_from": address},
        ),
        ("downstream.translate", {"data_path": query, "model_path": address}),
    ]
    for script, flags in calls:
        assert not lacks(error_of(capsys, script, **flags), address, "pretrain_rna.py"), script
    run("get_latent_emb", what="cells", data_path=query, model_path=address, out_path=tmp_path / "e.h5ad", device="cpu")
    assert ad.read_h5ad(tmp_path / "e.h5ad").uns["model"] == "lab/wrong"
    line = error_of(capsys, "evaluate", data_path=ready_file, model_path=address)
    assert not lacks(line, "--out_path", address)


def test_a_file_that_differs_from_the_manifest_is_refused(hub, runs):
    hub.add("lab/blood", runs["celltype_atac"])
    hub.models["lab/blood"]["README.md"] += b"edited on the hub"
    with pytest.raises(UserError, match=r"^hf://lab/blood/README.md: .*downloaded to .*cache"):
        load_model("hf://lab/blood", "celltype")


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("hf://lab/nothing", ("does not exist", "private", "hf auth login")),
        ("hf://lab/secret", ("does not exist", "private", "hf auth login")),
        ("hf://lab/gated", ("grant you access", "hf auth login")),
        ("hf://lab/blood@v9", ("revision",)),
        ("hf://blood", ("hf://owner/name",)),
        ("hf://lab/blood/sub", ("hf://owner/name",)),
        ("hf://lab/..", ("hf://owner/name",)),
        ("hf://", ("hf://owner/name",)),
    ],
)
def test_what_cannot_be_had_is_one_sentence(hub, query, capsys, address, named):
    for name in ("lab/blood", "lab/secret", "lab/gated"):
        hub.add(name, BOX)
    hub.hidden |= {"lab/secret": "private", "lab/gated": "gated"}
    assert not lacks(error_of(capsys, "predict_cell_type", data_path=query, model_path=address), address, *named)


def test_a_private_model_for_who_is_logged_in(hub, monkeypatch):
    hub.add("lab/secret", BOX)
    hub.hidden["lab/secret"] = "private"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load_model("hf://lab/secret", "celltype").outputs == load_model(BOX, "celltype").outputs


def test_without_a_connection_the_cache_is_used(hub, monkeypatch, query, capsys):
    hub.add("lab/blood", BOX)
    before = local_folder("hf://lab/blood")
    with serve() as (_, gone):
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone)  # nobody answers there any more
    assert local_folder("hf://lab/blood") == before
    line = error_of(capsys, "predict_cell_type", data_path=query, model_path="hf://lab/other")
    assert not lacks(line, "hf://lab/other", gone, "cannot be reached", "cache")
    (before / "genes.txt").unlink()  # as after an interrupted download
    line = error_of(capsys, "predict_cell_type", data_path=query, model_path="hf://lab/blood")
    assert not lacks(line, "hf://lab/blood", "cannot be reached")


@pytest.mark.slow
def test_the_environment_variables_of_the_hub_count(hub, query, tmp_path):
    hub.add("lab/blood", BOX)
    flags = ("predict_cell_type.py", "--data_path", str(query), "--model_path")
    where = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    done = python(*flags, "hf://lab/none", **where)
    assert done.returncode == 2 and not lacks(done.stderr, "hf://lab/none", "does not exist")
    done = python(*flags, "hf://lab/blood", **where)  # simulated cells: few of the bundled model's genes
    assert done.returncode == 2 and "genes" in done.stderr and any("resolve" in path for _, path in hub.asked)
    done = python(*flags, "hf://lab/none", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 2 and not lacks(done.stderr, "hf://lab/none", "cache")


# Pushing -------------------------------------------------------------------------------------------------------------


def test_what_is_pushed_comes_back(hub, runs, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run("push_to_hub", model_path=runs["student_atac"], repo="lab/student", private=True)
    assert not lacks(capsys.readouterr().out, "hf://lab/student", load_model(runs["student_atac"], "student").hash)
    assert hub.hidden == {"lab/student": "private"}
    assert hub.models["lab/student"].keys() == {
        *("README.md", "config.json", "genes.txt", "manifest.json", "model.safetensors", "peaks.txt")
    }
    assert load_model("hf://lab/student", "student").hash == load_model(runs["student_atac"], "student").hash


def test_a_licence_stands_in_the_pushed_card_and_nowhere_else(hub, runs, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    before = (runs["rna"] / "README.md").read_text()
    run("push_to_hub", model_path=runs["rna"], repo="lab/rna", license="cc-by-4.0")
    pushed = ModelCard(hub.models["lab/rna"]["README.md"].decode())
    assert pushed.data.license == "cc-by-4.0" and pushed.text.strip() == without_front_matter(before).strip()
    assert (runs["rna"] / "README.md").read_text() == before
    assert load_model("hf://lab/rna", "rna").hash != load_model(runs["rna"], "rna").hash


def test_what_cannot_be_pushed_is_one_sentence(hub, runs, monkeypatch, tmp_path, capsys):
    folder = {"model_path": runs["rna"]}
    assert not lacks(error_of(capsys, "push_to_hub", **folder, repo="lab/rna"), "--repo lab/rna", "hf auth login")
    assert not lacks(error_of(capsys, "push_to_hub", **folder, repo="rna"), "--repo rna", "owner/name")
    line = error_of(capsys, "push_to_hub", **folder, repo="lab/rna", license="my own!")
    assert "--license" in line
    assert str(tmp_path) in error_of(capsys, "push_to_hub", model_path=tmp_path, repo="lab/rna")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert not lacks(error_of(capsys, "push_to_hub", **folder, repo="stranger/rna"), "403", "hf auth login")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in error_of(capsys, "push_to_hub", **folder, repo="lab/rna")
    assert hub.models == {}


# Cards ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rna", "atac", "multimodal", "student_rna", "celltype_atac"])
def test_the_card_opens_with_what_the_hub_reads(runs, name):
    card = ModelCard.load(runs[name] / "README.md")
    assert (card.data.library_name, card.data.license) == ("scmomer", "unknown")
    assert {"single-cell", "simulated"} <= set(card.data.tags)
    assert ("scATAC-seq" in card.data.tags) == (name != "rna")
    assert card.data.pipeline_tag == ("tabular-classification" if name.startswith("celltype") else "feature-extraction")
    assert re.match(r"# scMomer: ", card.text.strip())


def test_the_box_has_such_a_card():
    card = ModelCard.load(BOX / "README.md")
    assert (card.data.license, card.data.library_name) == ("other", "scmomer") and "simulated" not in card.data.tags
    assert "GPL-3" in card.text
