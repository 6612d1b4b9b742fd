"""Folders are whole or absent, and nothing in them is trusted before its hash is checked."""

import ast
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.helpers import ROOT
from utils.errors import UserError
from utils.train.checkpoint import load_model
from utils.train.folders import MANIFEST, check_folder, file_hash, write_folder


def write_text(text: str):
    return lambda folder: (folder / "a.txt").write_text(text)


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
    write_folder(folder, write_text("two"))  # what the killed one left is no obstacle
    assert (folder / "a.txt").read_text() == "two"
    assert os.listdir(folder.parent) == ["model"]


def test_a_full_disk_is_a_users_error(folder):
    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"model: cannot be written \(No space left on device\)"):
        write_folder(folder, fail)
    assert (folder / "a.txt").read_text() == "one"


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


@pytest.mark.parametrize("path", ["absent", "file", "empty"])
def test_what_is_no_model_folder(tmp_path, path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"{path}: not a model folder"):
        check_folder(tmp_path / path)


def test_another_kind_of_model_is_refused_by_name(model):
    with pytest.raises(UserError, match=r"holds an RNA encoder .*; expected a multimodal model"):
        load_model(model, "multimodal")


SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("models/**/*.py"), *ROOT.glob("utils/**/*.py")]
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADERS = {"torch.load", "torch.save", "pd.read_pickle", "pandas.read_pickle", "joblib.load"}


def unsafe(source: str) -> list[str]:
    """Imports of pickling modules and calls that unpickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += [node.module] if str(node.module).split(".")[0] in PICKLES else sorted(names & LOADERS)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in LOADERS:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append("allow_pickle")
    return found


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from torch import load", "torch.load(path)", "np.load(p, allow_pickle=True)", "import joblib.x"],
)
def test_the_search_for_pickle_finds_it(line):
    assert unsafe(f"def f(path):\n    {line}\n")


def test_no_source_file_unpickles():
    assert len(SOURCES) > 30
    assert {str(path.relative_to(ROOT)): found for path in SOURCES if (found := unsafe(path.read_text()))} == {}
