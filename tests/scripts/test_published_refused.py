"""What import_published.py and export_published.py refuse: one line on stderr, exit code 2, and nothing is written."""

import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests import published
from tests.helpers import error_of, lacks
from tests.published import CLASSES, LAYOUTS, N_PEAKS, flags_of, genes, import_state, state_of, write_lists
from utils.train.folders import write_folder
from utils.train.model_folder import load_model

# A tensor of each layout: in a block, of a head, or outside both.
TENSORS = {
    "rna": ["pos_emb.emb.weight", "performer.net.layers.1.0.fn.to_q.weight", "to_out.bias"],
    "scbert": ["to_out.conv1.weight", "to_out.fc1.weight", "to_out.fc3.bias", "token_emb.weight"],
    "atac": ["embeddings.mask_token", "encoder.layer.1.attention.attention.key.bias", "decoder_pred.weight"],
    "multimodal": ["rna_projection.weight", "sub_task.linear1.weight", "atac_model.pooler.dense.bias"],
    "student": ["encoder.encoder.0.weight", "ATAC.output_mean.0.weight", "rna_model.model.to_out.conv1.bias"],
    "celltype": ["encoder.encoder.4.bias", "fc.first.weight", "to_out.weight"],
}
CASES = [(layout, name) for layout, names in TENSORS.items() for name in names]


def refused(capsys, folder: Path, layout: str, content: object, **flags) -> str:
    """The error of the script for a file with this content."""
    write_lists(folder)
    torch.save(content, folder / "file.pth")
    return error_of_file(capsys, folder, layout, **flags)


def error_of_file(capsys, folder: Path, layout: str, **flags) -> str:
    flags = {"checkpoint": folder / "file.pth"} | flags_of(layout, folder) | flags
    flags = {name: value for name, value in flags.items() if value is not None}
    line = error_of(capsys, "import_published", ckpt_dir=folder, model_name="new", **flags)
    assert not (folder / "new").exists()
    return line


def with_one(layout: str, name: str, change: Callable) -> dict:
    return state_of(layout) | {name: change(state_of(layout)[name])}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_missing_tensor_is_named(layout, tmp_path, capsys):
    kept = ("calls_since_last_redraw", "loss_fn.pos_weight")  # constants, which no model needs
    kept += () if layout == "atac" else ("decoder_pred.weight", "decoder_pred.bias")
    state = state_of(layout)
    read = ("rna_", "to_out", "encoder.", "fc.") if layout == "celltype" else ""  # it may lack stage II's own parts
    names = [name for name in state if name.startswith(read) and not name.endswith(kept)]
    for name in names[:: 5 if layout == "multimodal" else 1]:  # the student has all of its tensors, too
        line = refused(capsys, tmp_path, layout, {key: x for key, x in state.items() if key != name})
        partner = name.rpartition(".")[0]  # of two layers known by their shapes, the rest is named
        assert name in line or (layout == "celltype" and "fc." in line and partner.startswith("fc.")), line


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_a_tensor_of_another_shape_is_refused(layout, name, tmp_path, capsys):
    line = refused(
        capsys, tmp_path, layout, with_one(layout, name, lambda tensor: torch.cat([tensor, tensor[-1:], tensor[-1:]]))
    )
    # The numbers of genes and of classes are compared with the lists, and those are named.
    is_counted = {"pos_emb.emb.weight": "gene_reference", "to_out.fc3.bias": "labels"}
    assert is_counted.get(name, name) in line


@pytest.mark.parametrize(
    ("layout", "name", "shape"),
    [
        ("rna", "token_emb.weight", (7, 0)),
        ("rna", "token_emb.weight", ()),
        ("rna", "performer.net.layers.0.0.fn.fast_attention.projection_matrix", (10**9, 0)),
        ("rna", "performer.net.layers.0.0.fn.fast_attention.projection_matrix", (0, 64)),
        ("scbert", "to_out.fc1.weight", (10**12, 0)),
        ("scbert", "to_out.conv1.weight", (1,)),
        ("atac", "embeddings.position_embeddings", (1, 1, 48)),
        ("atac", "embeddings.position_embeddings", (1, 10**12, 0)),
        ("atac", "embeddings.cls_token", (48,)),
        ("student", "rna_projection.weight", (10**12, 0)),
        ("student", "encoder.encoder.0.weight", (0, 97)),
    ],
)
def test_impossible_sizes(layout, name, shape, tmp_path, capsys):
    line = refused(capsys, tmp_path, layout, state_of(layout) | {name: torch.zeros(shape)})
    assert lacks(line, "file.pth") == []


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_numbers_that_are_not_finite_float32(layout, name, tmp_path, capsys):
    for change, word in (
        (torch.Tensor.half, "float16"),
        (torch.Tensor.bfloat16, "bfloat16"),
        (torch.Tensor.double, "float64"),
        (lambda tensor: tensor.clone().fill_(torch.nan), "not finite"),
        (lambda tensor: tensor.index_fill(0, torch.tensor([0]), torch.inf), "not finite"),
    ):
        assert lacks(refused(capsys, tmp_path, layout, with_one(layout, name, change)), name, word) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_extra_tensor_is_named(layout, tmp_path, capsys):
    prefix = {"rna": "", "scbert": "", "atac": "encoder.layer.0."}.get(layout, "rna_model.model.")
    for name in (f"{prefix}extra.weight", "other"):
        line = refused(capsys, tmp_path, layout, state_of(layout) | {name: torch.zeros(3)})
        assert name in line


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def cut(path: Path) -> None:
    torch.save(state_of("rna"), path)
    path.write_bytes(path.read_bytes()[:50_000])


def changed_inside(path: Path) -> None:
    """A number of a weight has changed on the way."""
    torch.save(state_of("rna"), path)
    content = bytearray(path.read_bytes())
    start = content.index(state_of("rna")["norm.weight"].numpy().tobytes())
    content[start : start + 4] = np.float32(1.5).tobytes()
    path.write_bytes(content)


FILES = {
    "safetensors": (lambda path: save_file(state_of("rna"), path), "safetensors"),
    "TorchScript": (torchscript, "TorchScript"),
    "text": (lambda path: path.write_text("TP53\nCD4\n"), "no file of torch.save"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "truncated zip": (cut, "cut off"),
    "changed": (changed_inside, "damaged"),
    "old torch": (lambda path: torch.save(state_of("rna"), path, _use_new_zipfile_serialization=False), "pickle"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(state_of("rna"))), "pickle"),
    "npz": (lambda path: np.savez(path.open("wb"), a=np.zeros(3)), "zip archive"),
    "a number": (lambda path: torch.save(3, path), "no tensors by name"),
    "a list": (lambda path: torch.save([torch.zeros(3)], path), "no tensors by name"),
    "text inside": (lambda path: torch.save({"model_state_dict": {"a": "b"}}, path), "a is no plain tensor"),
    "another model": (lambda path: torch.save({"layer.weight": torch.zeros(3)}, path), "layer.weight"),
    "odd name": (lambda path: torch.save({"a\nb": torch.zeros(3)}, path), "no name of a weight"),
    "huge": (lambda path: torch.save({"a": torch.zeros(1).expand(10**9, 10**3)}, path), "repeats its numbers"),
    "absent": (lambda path: None, "no such file"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_another_kind(kind, tmp_path, capsys):
    write_lists(tmp_path)
    make, word = FILES[kind]
    make(tmp_path / "file.pth")
    assert lacks(error_of_file(capsys, tmp_path, "rna"), "file.pth", word) == []


@pytest.mark.parametrize("where", ["alone", "in a state", "beside a state", "bare pickle"])
def test_a_pickle_bomb_does_not_run(where, tmp_path, capsys):
    bomb = Bomb(tmp_path / "trace")
    content = {
        "alone": bomb,
        "in a state": {"model_state_dict": state_of("rna") | {"a": bomb}},
        "beside a state": {"model_state_dict": state_of("rna"), "args": bomb},
    }
    if where == "bare pickle":
        write_lists(tmp_path)
        (tmp_path / "file.pth").write_bytes(pickle.dumps(bomb))
        line = error_of_file(capsys, tmp_path, "rna")
    else:
        line = refused(capsys, tmp_path, "rna", content[where])
    assert lacks(line, "could run code", "file.pth") == []
    assert not (tmp_path / "trace").exists()


def listed(folder: Path, name: str, lines: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return folder / name


@pytest.mark.parametrize(
    ("layout", "flag", "lines", "words"),
    [
        ("rna", "gene_reference", genes()[:-2], ["95", "97"]),
        ("rna", "gene_reference", genes(98), ["98", "97"]),
        ("rna", "gene_reference", [*genes()[:-1], genes()[0]], [genes()[0], "twice"]),
        ("rna", "gene_reference", [], ["names none"]),
        ("scbert", "labels", CLASSES[:-1], ["4 classes", "5"]),
        ("scbert", "labels", [*CLASSES, "more"], ["6 classes", "5"]),
        ("celltype", "labels", CLASSES[:-1], ["4 classes", "5"]),
        ("scbert", "labels", [*CLASSES[:-1], CLASSES[0]], [CLASSES[0], "twice"]),
        ("scbert", "labels", ["", *CLASSES[:-1]], ["empty line"]),
        ("atac", "peak_reference", published.PEAKS[:-20], ["280", "289 to 304"]),
        ("atac", "peak_reference", [f"chr1:{i}-{i + 9}" for i in range(400)], ["400", "289 to 304"]),
        ("student", "peak_reference", published.PEAKS[:-1], ["299", "300"]),
        ("student", "peak_reference", [*published.PEAKS[:-1], published.PEAKS[0]], [published.PEAKS[0], "twice"]),
        ("student", "peak_reference", genes(N_PEAKS), ["cannot be read"]),
    ],
)
def test_lists_that_do_not_fit(layout, flag, lines, words, tmp_path, capsys):
    path = listed(tmp_path / "lists", "list.txt", lines)
    line = refused(capsys, tmp_path, layout, state_of(layout), **{flag: path})
    assert lacks(line, f"--{flag}", path, *words) == []


@pytest.mark.parametrize(
    ("layout", "flags", "words"),
    [
        ("rna", {"gene_reference": None}, ["--gene_reference is missing"]),
        ("student", {"peak_reference": None}, ["--peak_reference is missing"]),
        ("scbert", {"labels": None}, ["--labels is missing"]),
        ("rna", {"labels": "x.txt"}, ["--labels x.txt"]),
        ("rna", {"peak_reference": "x.bed"}, ["--peak_reference x.bed"]),
        ("atac", {"gene2vec": "x.npy"}, ["--gene2vec x.npy"]),
        ("atac", {"atac_heads": 5}, ["--atac_heads 5", "48"]),
        ("atac", {"atac_heads": 0}, ["--atac_heads 0"]),
        ("rna", {"gene_reference": "absent.txt"}, ["absent.txt", "no such file"]),
    ],
)
def test_flags_that_do_not_fit_the_file(layout, flags, words, tmp_path, capsys):
    assert lacks(refused(capsys, tmp_path, layout, state_of(layout), **flags), *words) == []


def test_the_pickle_of_labels_is_refused_with_the_way_to_a_text(tmp_path, capsys):
    (tmp_path / "label_dict").write_bytes(pickle.dumps(np.array(CLASSES)))
    line = refused(capsys, tmp_path, "scbert", state_of("scbert"), labels=tmp_path / "label_dict")
    first, second = line.split("`")[1::2]
    namespace, here = {}, Path.cwd()
    os.chdir(tmp_path)
    try:
        exec(f"{first}\n{second}", namespace)
    finally:
        os.chdir(here)
    assert (tmp_path / "labels.txt").read_text().splitlines() == CLASSES


def test_arrays_of_python_objects_are_refused(tmp_path, capsys):
    np.save(tmp_path / "classes.npy", np.array(CLASSES, dtype=object), allow_pickle=True)
    line = refused(capsys, tmp_path, "scbert", state_of("scbert"), labels=tmp_path / "classes.npy")
    assert lacks(line, "--labels", "classes.npy", "Python objects") == []


def test_labels_as_an_array(tmp_path):
    np.save(tmp_path / "label_classes.npy", np.array(CLASSES))
    folder = import_state(tmp_path, "scbert", labels=tmp_path / "label_classes.npy")
    assert load_model(folder, "celltype").outputs == CLASSES


@pytest.mark.parametrize("array", [np.zeros((96, 7)), np.zeros(96), np.zeros((50, 40))], ids=str)
def test_a_gene2vec_of_another_shape(array, tmp_path, capsys):
    np.save(tmp_path / "gene2vec.npy", array)
    line = refused(capsys, tmp_path, "scbert", state_of("scbert"), gene2vec=tmp_path / "gene2vec.npy")
    assert lacks(line, "--gene2vec", "97", "40") == []


def test_an_existing_folder_is_replaced_only_on_request(tmp_path, capsys):
    folder = import_state(tmp_path, "rna")
    flags = {"checkpoint": tmp_path / "rna.pth", "ckpt_dir": tmp_path, "model_name": "rna"}
    line = error_of(capsys, "import_published", **flags, **flags_of("rna", tmp_path))
    assert lacks(line, folder, "--overwrite") == []
    import_state(tmp_path, "rna", overwrite=True)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda saved: replace(saved, options=saved.options | {"missing": "rna"}), "replaces RNA"),
        (lambda saved: replace(saved, options=saved.options | {"other_modality": "zeros"}), "zeros"),
    ],
)
def test_models_without_a_published_counterpart_are_not_exported(change, word, tmp_path, capsys):
    saved = change(load_model(import_state(tmp_path, "student"), "student"))
    if saved.options["missing"] == "rna":  # a student that reads peaks
        saved.state["student.embed.weight"] = torch.zeros(N_PEAKS, 256)
    write_folder(tmp_path / "own", saved.write)
    line = error_of(capsys, "export_published", model_path=tmp_path / "own", out_path=tmp_path / "x.pth")
    assert lacks(line, tmp_path / "own", word) == []
    assert not (tmp_path / "x.pth").exists()
