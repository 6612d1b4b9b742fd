"""Folders are whole or absent, and nothing in them is trusted before its hash is checked."""

import ast
import io
import json
import os
import pickle
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import RNA, ROOT, assert_same_tensors, last_weights, run, weights
from tests.processes import Processes
from utils.errors import UserError
from utils.train.folders import MANIFEST, file_hash, read_folder, write_folder
from utils.train.log import training_folder
from utils.train.model_folder import load_model


def write_text(text: str):
    return lambda folder: (folder / "a.txt").write_text(text)


def check_folder(path: Path) -> tuple[Path, str]:
    """Where a whole folder lies, and its hash."""
    return read_folder(path, lambda place, digest: (place, digest))


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "deep" / "model"
    write_folder(path, write_text("one"))
    return path


@pytest.fixture
def model(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs["rna"], tmp_path / "rna"))


def test_written_folder_is_found_with_its_hash(folder):
    digest = write_folder(folder, write_text("two"))
    assert check_folder(folder) == (folder, digest)
    assert digest == file_hash(folder / MANIFEST)
    assert json.loads((folder / MANIFEST).read_text()) == {"a.txt": file_hash(folder / "a.txt")}
    assert (folder / "a.txt").read_text() == "two"
    assert os.listdir(folder.parent) == ["model"]


def test_other_content_has_another_hash(tmp_path):
    one, two, again = (write_folder(tmp_path / text, write_text(text[:3])) for text in ("one", "two", "one again"))
    assert one == again != two


def test_a_writer_that_fails_leaves_the_old_folder(folder):
    def fail(path: Path) -> None:
        (path / "a.txt").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_folder(folder, fail)
    assert (check_folder(folder)[0] / "a.txt").read_text() == "one"
    assert os.listdir(folder.parent) == ["model"]
    shutil.copytree(folder, folder.with_name(".model.partial"))
    write_folder(folder, write_text("two"))  # what a killed one left is no obstacle
    assert (folder / "a.txt").read_text() == "two"
    assert os.listdir(folder.parent) == ["model"]


def test_a_full_disk_is_a_users_error(folder):
    def fail(path: Path) -> None:
        (path / "a.txt").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"model: .*No space left on device"):
        write_folder(folder, fail)
    assert (folder / "a.txt").read_text() == "one"
    assert os.listdir(folder.parent) == ["model"]


def test_killed_between_the_renames_the_previous_folder_loads(model):
    expected = load_model(model, "rna")
    shutil.copytree(model, model.with_name(".rna.partial"))  # the new one, complete but not in place
    os.rename(model, model.with_name(".rna.previous"))
    found = load_model(model, "rna")
    assert (found.hash, found.path) == (expected.hash, model)
    write_folder(model, write_text("new"))
    assert (model / "a.txt").read_text() == "new"
    assert sorted(os.listdir(model.parent)) == ["rna"]


def test_killed_after_the_renames_the_new_folder_loads(folder):
    shutil.copytree(folder, folder.with_name(".model.previous"))
    (folder.with_name(".model.previous") / "a.txt").write_text("old")
    assert (check_folder(folder)[0] / "a.txt").read_text() == "one"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "genes.txt", "README.md"])
@pytest.mark.parametrize("what", ["edited", "deleted"])
def test_a_changed_file_is_named(model, name, what):
    path = model / name
    if what == "edited":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(UserError) as error:
        load_model(model, "rna")
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["old.safetensors", "genes.txt.bak", ".hidden"])
def test_a_file_the_manifest_lacks_is_refused_by_name(model, name):
    (model / name).write_text("what is this")
    with pytest.raises(UserError, match=re.escape(str(model / name))):
        load_model(model, "rna")


def test_what_our_scripts_and_systems_add_to_a_folder_is_no_foreign_file(model):
    for name in ("metrics.jsonl", "loss_curve.png", ".DS_Store", ".gitattributes"):
        (model / name).write_text("")
    for name in ("tensorboard", "evaluation"):
        (model / name).mkdir(exist_ok=True)
    load_model(model, "rna")


@pytest.mark.parametrize("entry", ["../secret.txt", "sub/file.txt", "absolute", "..", "."])
def test_an_entry_that_leaves_the_folder_is_refused(folder, entry):
    secret = folder.parent / "secret.txt"
    secret.write_text("secret")
    (folder / "sub").mkdir()
    shutil.copy(secret, folder / "sub" / "file.txt")
    entry = str(secret) if entry == "absolute" else entry
    files = json.loads((folder / MANIFEST).read_text()) | {entry: file_hash(secret)}
    (folder / MANIFEST).write_text(json.dumps(files))
    with pytest.raises(UserError):
        check_folder(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", '{"a.txt": 3}'])
def test_a_damaged_manifest_is_a_users_error(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(UserError):
        check_folder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("there", [True, False])
def test_a_file_the_manifest_does_not_list_is_not_trusted(model, name, there):
    files = json.loads((model / MANIFEST).read_text())
    del files[name]
    (model / MANIFEST).write_text(json.dumps(files))
    if not there:
        (model / name).unlink()
    with pytest.raises(UserError, match=str(model)):
        load_model(model, "rna")


def test_a_folder_whose_head_does_not_standardise_loads(runs, tmp_path):
    """The first version wrote such folders; they predict as they did then."""
    saved = load_model(runs["celltype_atac"], "celltype")
    older = {name: x for name, x in saved.state.items() if name not in ("head.mean", "head.deviation")}
    assert len(older) == len(saved.state) - 2
    write_folder(tmp_path / "older", replace(saved, state=older).write)
    model = load_model(tmp_path / "older", "celltype").build()
    embedding = torch.randn(3, len(saved.state["head.mean"]))
    torch.testing.assert_close(model.head(embedding), model.head.layers(embedding))
    del older["head.layers.1.weight"]
    write_folder(tmp_path / "broken", replace(saved, state=older).write)
    with pytest.raises(UserError):
        load_model(tmp_path / "broken", "celltype").build()


@pytest.mark.parametrize("kind", ["celltype", "student"])
def test_a_folder_of_version_0_2_loads_as_it_was(kind, runs, tmp_path):
    """Then cell types were the only head, called classifier, and config.json had labels and temperature at its top."""
    now = load_model(runs[f"{kind}_atac"], kind)

    def write(folder: Path) -> None:
        now.write(folder)
        save_file({re.sub("^head[.]", "classifier.", k): x for k, x in now.state.items()}, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        if "head" in config["model"]:
            config["model"]["classifier"] = config["model"].pop("head")
        config["labels"] = config.pop("outputs")
        config |= config.pop("fitted")
        (folder / "config.json").write_text(json.dumps(config))

    write_folder(tmp_path / "older", write)
    older = load_model(tmp_path / "older", kind)
    then = {name: now.fitted[name] for name in ("temperature", "calibration") if name in now.fitted}
    assert (older.config, older.outputs, older.fitted) == (now.config, now.outputs, then)
    assert_same_tensors(older.build().state_dict(), now.build().state_dict())


@pytest.mark.parametrize("path", ["absent", "file", "empty"])
def test_what_is_no_model_folder(tmp_path, path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"{path}: "):
        check_folder(tmp_path / path)


def test_another_kind_of_model_is_refused_by_name(model):
    with pytest.raises(UserError, match=r"rna: .*pretrain_rna\.py.*pretrain_multimodal\.py"):
        load_model(model, "multimodal")


SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("models/**/*.py"), *ROOT.glob("utils/**/*.py")]
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADERS = {"torch.load", "torch.save", "pd.read_pickle", "pandas.read_pickle", "joblib.load"}
CHECKPOINTS = "utils/files/checkpoint.py"
"""Reads and writes published files; without weights_only it reads nothing either."""


def unsafe(source: str) -> list[str]:
    """Imports of pickling modules and calls that unpickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += [node.module] if str(node.module).split(".")[0] in PICKLES else sorted(names & LOADERS)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            found.append("torch.load" + (" of weights" if options.get("weights_only") == "True" else ""))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in LOADERS - {"torch.load"}:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Assign) and ast.unparse(node.value) in LOADERS:
            found.append(ast.unparse(node.value))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append("allow_pickle")
    return found


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from torch import load", "torch.load(path)", "torch.load(path, weights_only=False)"),
        *("read = torch.load", "np.load(p, allow_pickle=True)", "import joblib.x"),
    ],
)
def test_the_search_for_pickle_finds_it(line):
    assert unsafe(f"def f(path):\n    {line}\n")


def test_no_source_file_unpickles():
    assert len(SOURCES) > 30
    found = {str(path.relative_to(ROOT)): found for path in SOURCES if (found := unsafe(path.read_text()))}
    assert found == {CHECKPOINTS: ["torch.load of weights", "torch.save"]}


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def bombs(trace: Path) -> dict[str, bytes]:
    """The same as a bare pickle, and as torch and numpy wrap it."""
    plain, wrapped, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pickle.dump(Bomb(trace), plain)
    torch.save(Bomb(trace), wrapped)
    np.savez(array, data=np.array([Bomb(trace)], dtype=object), allow_pickle=True)
    return {"pickle": plain.getvalue(), "torch": wrapped.getvalue(), "npz": array.getvalue()}


def test_the_bombs_do_explode(tmp_path):
    for name, content in bombs(tmp_path / "trace").items():
        load = {
            "pickle": pickle.loads,
            "torch": lambda content: torch.load(io.BytesIO(content), weights_only=False),
            "npz": lambda content: np.load(io.BytesIO(content), allow_pickle=True)["data"],
        }[name]
        load(content)
        (tmp_path / "trace").rmdir()


@pytest.mark.parametrize("kind", ["pickle", "torch", "npz"])
def test_no_planted_pickle_runs(kind, runs, ready_file, tmp_path, capsys):
    """In the place of each file of a model, a training state, latents and data, with a manifest that vouches for it."""
    trace = tmp_path / "trace"
    bomb = bombs(trace)[kind]
    names = [path.name for path in runs["celltype_atac"].iterdir() if path.is_file() and path.name != MANIFEST]
    for name in [*names, MANIFEST]:
        model = Path(shutil.copytree(runs["celltype_atac"], tmp_path / f"model {name}"))
        plant(model / name, bomb)
        flags = {"data_path": ready_file, "model_path": model, "out_path": tmp_path / "out.h5mu", "device": "cpu"}
        with suppress(SystemExit):
            run("predict_cell_type", **flags)
    for name in ("state.safetensors", "state.json"):
        folder = tmp_path / f"rna {name}"
        shutil.copytree(runs["rna"], folder)
        shutil.copytree(training_folder(runs["rna"]), training_folder(folder))
        plant(training_folder(folder) / "state" / name, bomb)
        flags = {"data_path": ready_file, "ckpt_dir": tmp_path, "model_name": folder.name} | RNA
        with pytest.raises(SystemExit):
            run("pretrain_rna", **flags | {"epochs": 3, "resume": True})
    for name in ("cells.h5ad", "cells.h5mu", "cells.h5", "cells.loom", "cells.csv", "cells.txt.gz"):
        (tmp_path / name).write_bytes(bomb)
        with pytest.raises(SystemExit):
            run("preprocess", data_path=tmp_path / name, out_path=tmp_path / "out.h5ad")
        with pytest.raises(SystemExit):
            run("preprocess", data_path=ready_file, out_path=tmp_path / "out.h5mu", gene_reference=tmp_path / name)
        with pytest.raises(SystemExit):
            run("pretrain_rna", data_path=tmp_path / name, ckpt_dir=tmp_path, model_name="new", **RNA)
    assert not trace.exists()


def plant(path: Path, content: bytes) -> None:
    """Replace a file, and its hash in the manifest."""
    path.write_bytes(content)
    if path.name != MANIFEST:
        files = json.loads((path.parent / MANIFEST).read_text())
        (path.parent / MANIFEST).write_text(json.dumps(files | {path.name: file_hash(path)}))


# Full disks ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_the_last_state_and_model(ready_file, runs, tmp_path):
    """A small disk is filled between two runs: the second says so, and goes on when there is space again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs rights that this user has not")
    try:
        flags = {"data_path": ready_file, "model_name": "run"} | RNA | {"epochs": 3}
        run("pretrain_rna", **flags | {"ckpt_dir": tmp_path})
        run("pretrain_rna", **flags | {"ckpt_dir": disk, "max_steps": 15})
        before = load_model(disk / "run", "rna").hash
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(max(free - 8192, 0)))
        again = Processes("pretrain_rna", flags | {"ckpt_dir": disk, "resume": True}, 1, tmp_path / "output.txt")
        codes, text = again.start().join(), (tmp_path / "output.txt").read_text()
        assert codes == [2], text
        assert "No space left on device" in text
        assert "Traceback" not in text
        assert load_model(disk / "run", "rna").hash == before
        (disk / "filler").unlink()
        run("pretrain_rna", **flags | {"ckpt_dir": disk, "resume": True})
        assert_same_tensors(weights(disk / "run"), weights(tmp_path / "run"))
        assert_same_tensors(last_weights(disk / "run"), last_weights(tmp_path / "run"))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # weights may still be mapped
