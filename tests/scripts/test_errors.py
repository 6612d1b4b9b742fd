"""A user's mistake ends in one line on stderr and exit code 2, and changes no file.

The tests look for the file, the flag and the numbers that a message names, not for its sentence.
"""

import shutil
from pathlib import Path

import anndata as ad
import mudata
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

from tests.helpers import MULTIMODAL, RNA, TRAINING, command_line, error_of, lacks, python, run
from utils.features.gene_symbols import load_gene_table
from utils.files.write import write_whole
from utils.train.log import training_folder

# Raw files ---------------------------------------------------------------------------------------------------------


def change_rna(simulation, change) -> ad.AnnData:
    adata = simulation.mdata["rna"].copy()
    change(adata)
    return adata


def set_value(value: float):
    def change(adata: ad.AnnData) -> None:
        values = adata.X.toarray()
        values[3, 4] = value
        adata.X = csr_matrix(values)

    return change


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"split_by": "plate", "test_groups": "D1"}, ("--split_by plate", "cell_type, donor")),
        ({"split_by": "donor", "test_groups": "D1,D9"}, ("--test_groups D9", "donor", "D1, D2")),
        ({"split_by": "donor"}, ("--split_by", "--test_groups")),
        ({"test_groups": "D1"}, ("--split_by", "--test_groups")),
        ({"split_by": "donor", "test_groups": "D1,D2"}, ("--test_groups", "no training cell")),
        ({"val_fraction": 1.5}, ("--val_fraction 1.5",)),
        ({"target_sum": "mean"}, ("--target_sum", "mean")),
        ({"out_path": "out.h5ad"}, ("--out_path out.h5ad", ".h5mu")),
        ({"out_path": "{input}"}, ("--out_path {input}", "input")),
        ({"out_path": "{around}"}, ("--out_path {around}", "input")),
    ],
)
def test_mistaken_flags_of_preprocess(raw_file, tmp_path, capsys, flags, words):
    path = Path(shutil.copy(raw_file, tmp_path))
    around = tmp_path / "sub" / ".." / path.name
    (tmp_path / "sub").mkdir()
    flags = {"data_path": path, "out_path": tmp_path / "out.h5mu"} | {
        name: str(value).format(input=path, around=around) for name, value in flags.items()
    }
    line = error_of(capsys, "preprocess", **flags)
    assert lacks(line, *(word.format(input=path, around=around) for word in words)) == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cells.h5mu", "sub"]
    assert path.read_bytes() == raw_file.read_bytes()


# Every script ------------------------------------------------------------------------------------------------------


def complete(script: str, data_path: Path, runs, folder: Path) -> dict:
    """Flags with which a script would run."""
    flags = {"data_path": data_path}
    if script == "preprocess":
        return flags | {"out_path": folder / "out.h5mu"}
    if script == "predict_cell_type":
        return flags | {"model_path": runs["celltype_atac"], "device": "cpu"}
    flags |= {"ckpt_dir": folder}
    if script == "get_latent_emb":
        return flags | {"model_path": runs["multimodal"], "device": "cpu"}
    if script == "train_missing_celltype_func":
        return flags | {"pretrained_model_path": runs["student_atac"], "model": "new"} | TRAINING
    flags |= {"model_name": "new"} | TRAINING
    if script == "pretrain_multimodal":
        return flags | {"rna_model_path": runs["rna"], "atac_model_path": runs["atac"]}
    if script == "pretrain_missing_mod":
        return flags | {"model_path": runs["multimodal"], "dir_train": runs["latents"], "dir_val": runs["latents"]}
    return flags


PRETRAINING = ("pretrain_rna", "pretrain_atac", "pretrain_multimodal", "pretrain_missing_mod")
ON_READY_CELLS = (*PRETRAINING, "get_latent_emb", "train_missing_celltype_func")
SCRIPTS = ("preprocess", *ON_READY_CELLS, "predict_cell_type")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_data_file_that_is_absent_or_unreadable(script, runs, tmp_path, capsys):
    absent, text = tmp_path / "absent.h5mu", tmp_path / "text.h5ad"
    text.write_text("gene\tcount\n")
    assert f"{absent}: " in error_of(capsys, script, **complete(script, absent, runs, tmp_path))
    assert f"{text}: " in error_of(capsys, script, **complete(script, text, runs, tmp_path))
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize("script", ON_READY_CELLS)
def test_raw_cells_are_sent_to_preprocess(script, raw_file, runs, tmp_path, capsys):
    line = error_of(capsys, script, **complete(script, raw_file, runs, tmp_path))
    ready = raw_file.with_name("cells.ready.h5mu")
    assert f"python preprocess.py --data_path {raw_file} --out_path {ready}" in line  # a command to copy


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "preprocess"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(script, ready_file, runs, tmp_path, capsys):
    flags = complete(script, ready_file, runs, tmp_path) | {"device": "cuda"}
    assert "--device cuda: " in error_of(capsys, script, **flags)


@pytest.mark.parametrize("script", [*PRETRAINING, "train_missing_celltype_func"])
def test_an_existing_model_and_nothing_to_resume(script, ready_file, runs, tmp_path, capsys):
    flags = complete(script, ready_file, runs, tmp_path)
    assert lacks(error_of(capsys, script, **flags, resume=True), tmp_path / "new", "--resume") == []
    (tmp_path / "new").mkdir()
    line = error_of(capsys, script, **flags)
    assert lacks(line, f"{tmp_path / 'new'}: ", "--resume", "--overwrite") == []
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 5e-4},
        {"batch_size": 4},
        {"seed": 3},
        {"mask_ratio": 0.3},
        {"tokens": "expressed"},
        {"depth": 3},
    ],
    ids=str,
)
def test_resuming_with_other_settings(change, ready_file, runs, capsys):
    before = (training_folder(runs["rna"]) / "state" / "manifest.json").read_bytes()
    paths = {"data_path": ready_file, "ckpt_dir": runs.folder, "model_name": "rna"}
    ((name, _),) = change.items()
    line = error_of(capsys, "pretrain_rna", **paths, **RNA | change, resume=True)
    was = ({"mask_ratio": 0.15, "tokens": "all"} | RNA).get(name, 0)
    assert lacks(line, runs["rna"], f"--{name} {was}", change[name]) == []
    assert (training_folder(runs["rna"]) / "state" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    "flags", [{"batch_size": 0}, {"grad_acc": 0}, {"epochs": 0}, {"batch_size": -1}, {"seed": -1}], ids=str
)
def test_impossible_numbers_are_refused(flags, ready_file, runs, tmp_path, capsys):
    ((name, value),) = flags.items()
    line = error_of(capsys, "pretrain_rna", **complete("pretrain_rna", ready_file, runs, tmp_path) | flags)
    assert f"--{name} {value}" in line


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_cell_cannot_lose_all_of_its_genes(share, ready_file, runs, tmp_path, capsys):
    flags = complete("train_missing_celltype_func", ready_file, runs, tmp_path) | {"feature_dropout": share}
    assert f"--feature_dropout {share} " in error_of(capsys, "train_missing_celltype_func", **flags)


# Models ------------------------------------------------------------------------------------------------------------

# The script that made the model which was given, and the script that makes the one which is needed.
KINDS = [
    ("pretrain_multimodal", "rna_model_path", "atac", ("pretrain_atac.py", "pretrain_rna.py")),
    ("pretrain_multimodal", "atac_model_path", "multimodal", ("pretrain_multimodal.py", "pretrain_atac.py")),
    ("get_latent_emb", "model_path", "student_atac", ("pretrain_missing_mod.py", "pretrain_multimodal.py")),
    ("pretrain_missing_mod", "model_path", "rna", ("pretrain_rna.py", "pretrain_multimodal.py")),
    ("pretrain_missing_mod", "model_path", "student_atac", ("pretrain_missing_mod.py", "pretrain_multimodal.py")),
    ("train_missing_celltype_func", "pretrained_model_path", "rna", ("--other_modality zeros",)),
    ("train_missing_celltype_func", "pretrained_model_path", "multimodal", ("pretrain_missing_mod.py",)),
    (
        "train_missing_celltype_func",
        "pretrained_model_path",
        "celltype_atac",
        ("train_missing_celltype_func.py", "pretrain_missing_mod.py"),
    ),
    ("predict_cell_type", "model_path", "student_rna", ("pretrain_missing_mod.py", "train_missing_celltype_func.py")),
]


@pytest.mark.parametrize(("script", "flag", "name", "words"), KINDS)
def test_a_model_of_the_wrong_kind(script, flag, name, words, ready_file, runs, tmp_path, capsys):
    flags = complete(script, ready_file, runs, tmp_path) | {flag: runs[name]}
    assert lacks(error_of(capsys, script, **flags), f"{runs[name]}: ", *words) == []


MODEL_FLAGS = [
    ("pretrain_multimodal", "rna_model_path", "rna"),
    ("pretrain_multimodal", "atac_model_path", "atac"),
    ("get_latent_emb", "model_path", "multimodal"),
    ("pretrain_missing_mod", "model_path", "multimodal"),
    ("train_missing_celltype_func", "pretrained_model_path", "student_atac"),
    ("predict_cell_type", "model_path", "celltype_atac"),
]


@pytest.mark.parametrize(("script", "flag", "name"), MODEL_FLAGS)
def test_a_damaged_or_absent_model(script, flag, name, ready_file, runs, tmp_path, capsys):
    folder = Path(shutil.copytree(runs[name], tmp_path / "damaged"))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    flags = complete(script, ready_file, runs, tmp_path)
    assert f"{file}: " in error_of(capsys, script, **flags | {flag: folder})
    absent = tmp_path / "absent"
    assert f"{absent}: " in error_of(capsys, script, **flags | {flag: absent})


@pytest.fixture
def other_genes(simulation, tmp_path) -> Path:
    """Preprocessed cells without the last gene and with peaks of their own."""
    mdata = simulation.mdata
    part = mudata.MuData({"rna": mdata["rna"][:, :-1].copy(), "atac": mdata["atac"][:, 1:].copy()})
    part.obs = mdata.obs.copy()
    write_whole(part, tmp_path / "part.h5mu")
    run("preprocess", data_path=tmp_path / "part.h5mu", out_path=tmp_path / "other.h5mu", val_fraction=0.2)
    return tmp_path / "other.h5mu"


@pytest.mark.parametrize("script", ["pretrain_multimodal", "get_latent_emb", "pretrain_missing_mod"])
def test_cells_with_other_genes_than_the_models(script, other_genes, runs, tmp_path, capsys):
    line = error_of(capsys, script, **complete(script, other_genes, runs, tmp_path))
    assert f"{other_genes}: " in line
    assert not lacks(line, "59 genes", "60") or not lacks(line, "149 peaks", "150")


def test_an_rna_model_with_other_genes(other_genes, ready_file, runs, tmp_path, capsys):
    run("pretrain_rna", data_path=other_genes, ckpt_dir=tmp_path, model_name="rna59", **RNA)
    flags = complete("pretrain_multimodal", ready_file, runs, tmp_path) | {"rna_model_path": tmp_path / "rna59"}
    line = error_of(capsys, "pretrain_multimodal", **flags)
    assert lacks(line, f"{ready_file}: ", "60 genes", "59", tmp_path / "rna59") == []


def test_genes_in_another_order_are_the_same_file(simulation, ready_file, tmp_path):
    """A vocabulary depends on which genes there are, not on their order in the file."""
    for name, step in (("forth", 1), ("back", -1)):
        write_whole(simulation.mdata["rna"][:, ::step].copy(), tmp_path / f"{name}.h5ad")
        run("preprocess", data_path=tmp_path / f"{name}.h5ad", out_path=tmp_path / f"{name}.ready.h5ad")
    ours, theirs = (ad.read_h5ad(tmp_path / f"{name}.ready.h5ad") for name in ("forth", "back"))
    assert list(ours.var_names) == list(theirs.var_names)
    assert (ours.X != theirs.X).nnz == 0


def test_cells_normalised_otherwise(raw_file, runs, tmp_path, capsys):
    ready = tmp_path / "ready.h5mu"
    run("preprocess", data_path=raw_file, out_path=ready, target_sum=5000, val_fraction=0.2)
    line = error_of(capsys, "pretrain_multimodal", **complete("pretrain_multimodal", ready, runs, tmp_path))
    assert lacks(line, "5000.0", "--target_sum 10000.0") == []


# Latents -----------------------------------------------------------------------------------------------------------


def test_latents_of_another_teacher(ready_file, runs, tmp_path, capsys):
    paths = {"data_path": ready_file, "ckpt_dir": tmp_path, "model_name": "other"}
    encoders = {"rna_model_path": runs["rna"], "atac_model_path": runs["atac"]}
    run("pretrain_multimodal", **paths, **encoders, **MULTIMODAL | {"seed": 1, "epochs": 1})
    flags = complete("pretrain_missing_mod", ready_file, runs, tmp_path) | {"model_path": tmp_path / "other"}
    line = error_of(capsys, "pretrain_missing_mod", **flags)
    assert lacks(line, f"{runs['latents'] / 'train.h5ad'}: ", "get_latent_emb.py", tmp_path / "other") == []


def test_latents_that_are_not_there_or_lack_cells(ready_file, runs, tmp_path, capsys):
    flags = complete("pretrain_missing_mod", ready_file, runs, tmp_path)
    line = error_of(capsys, "pretrain_missing_mod", **flags | {"dir_val": tmp_path / "absent"})
    assert lacks(line, f"{tmp_path / 'absent'}: ", "get_latent_emb.py") == []
    latents = ad.read_h5ad(runs["latents"] / "train.h5ad")
    write_whole(latents[2:].copy(), tmp_path / "part.h5ad")
    line = error_of(capsys, "pretrain_missing_mod", **flags | {"dir_train": tmp_path / "part.h5ad"})
    assert lacks(line, f"{tmp_path / 'part.h5ad'}: ", f"2 of the {len(latents)}", ready_file) == []
    (tmp_path / "text.h5ad").write_text("no latents")
    line = error_of(capsys, "pretrain_missing_mod", **flags | {"dir_train": tmp_path / "text.h5ad"})
    assert f"{tmp_path / 'text.h5ad'}: " in line


# Labels and queries ------------------------------------------------------------------------------------------------


def test_label_columns_that_cannot_be_learned(ready_file, runs, tmp_path, capsys):
    flags = complete("train_missing_celltype_func", ready_file, runs, tmp_path)
    line = error_of(capsys, "train_missing_celltype_func", **flags, label_column="kind")
    assert lacks(line, f"{ready_file}: ", "kind", "cell_type, donor, split") == []
    content = mudata.read_h5mu(ready_file)
    content.obs["alone"] = "T"
    write_whole(content, tmp_path / "one.h5mu")
    flags["data_path"] = tmp_path / "one.h5mu"
    line = error_of(capsys, "train_missing_celltype_func", **flags, label_column="alone")
    assert lacks(line, "alone", "1 class", "2") == []


def renamed(names: list[str]):
    return lambda adata: setattr(adata, "var_names", names)


@pytest.mark.parametrize("case", ["no rna", "other genes", "no cells", "fraction"])
def test_queries_that_cannot_be_labelled(case, simulation, runs, tmp_path, capsys):
    path = tmp_path / "query.h5ad"
    if case == "no rna":
        query, words = simulation.mdata["atac"], ("no rna",)
    elif case == "other genes":
        known = set(simulation.mdata["rna"].var_names)
        others = [gene for gene in load_gene_table()["symbol"] if gene not in known]
        query = change_rna(simulation, renamed([*simulation.mdata["rna"].var_names[:12], *others[:48]]))
        words = ("12 of the 60 genes", "20.0%", "--min_gene_coverage", "0.3")
    elif case == "no cells":
        query, words = simulation.mdata["rna"][:0].copy(), ("no cells", "rna")
    else:
        query, words = change_rna(simulation, set_value(0.5)), ("rna", "fractional")
    query.write(path)
    line = error_of(capsys, "predict_cell_type", **complete("predict_cell_type", path, runs, tmp_path))
    assert lacks(line, f"{path}: ", *words) == []
    assert list(tmp_path.iterdir()) == [path]


def test_a_lower_coverage_can_be_allowed(simulation, runs, tmp_path):
    known = list(simulation.mdata["rna"].var_names)
    others = [gene for gene in load_gene_table()["symbol"] if gene not in known]
    change_rna(simulation, renamed([*known[:12], *others[:48]])).write(tmp_path / "query.h5ad")
    flags = complete("predict_cell_type", tmp_path / "query.h5ad", runs, tmp_path)
    run("predict_cell_type", **flags, min_gene_coverage=0.2)
    assert pd.notna(ad.read_h5ad(tmp_path / "query.predicted.h5ad").obs["predicted_cell_type"]).all()


# A process of its own ----------------------------------------------------------------------------------------------


def test_a_shell_sees_one_line_and_exit_code_2(raw_file, tmp_path):
    flags = complete("pretrain_rna", raw_file, None, tmp_path)
    done = python("pretrain_rna.py", *command_line(flags))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"pretrain_rna.py: error: {raw_file}: ")
