"""Files in each published layout, made of the recorded weights in tests/golden, and their import by the script."""

from functools import cache
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from tests.builders import gene_names
from tests.helpers import run

FOLDER = Path(__file__).resolve().parent / "golden"
ATAC_HEADS = 4  # the one size that the published weights do not show
N_TOKENS, N_PEAKS = 97, 300
CLASSES = ["B cell", "CD4 T cell", "monocyte", "NK cell", "pDC"]
CLASSIFIER = ("fc.first", "fc.second")
"""Names that no other test and no table of ours knows: the layers are recognised by their shapes."""
WORDS = {"rna": "lm", "atac": "vit", "student": "scmomer"}
RECORD = {"lm": "rna_performer", "vit": "atac_vit", "scmomer": "scmomer"}


@cache
def golden(name: str) -> dict[str, dict[str, Tensor]]:
    """Part of a recording's keys before the first slash → the rest → array."""
    out: dict[str, dict[str, Tensor]] = {}
    with np.load(FOLDER / f"{name}.npz") as file:
        for key in file.files:
            part, rest = key.split("/", 1)
            out.setdefault(part, {})[rest] = torch.from_numpy(np.asarray(file[key]))
    return out


def _random(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    scale = lambda shape: 2 * shape[-1] ** -0.5 if len(shape) > 1 else 0.1
    return {n.replace("__", "."): torch.randn(shape, generator=rng) * scale(shape) for n, shape in shapes.items()}


@cache
def state_of(layout: str) -> dict[str, Tensor]:
    """Published tensors of a layout. The heads of classifiers, which no recording has, are random."""
    if layout in WORDS:
        return golden(RECORD[WORDS[layout]])[WORDS[layout]]
    if layout == "multimodal":
        return {name: tensor for name, tensor in state_of("student").items() if not name.startswith("encoder.")}
    n, dim = len(CLASSES), golden("rna_performer")["lm"]["token_emb.weight"].shape[1]
    if layout == "celltype":
        first, second = ({f"{name}.{kind}": kind for kind in ("weight", "bias")} for name in CLASSIFIER)
        shapes = {"weight": (64, 128), "bias": (64,)}, {"weight": (n, 64), "bias": (n,)}
        head = {name: shapes[0][kind] for name, kind in first.items()}
        head |= {name: shapes[1][kind] for name, kind in second.items()}
        return state_of("student") | _random(1, **{name.replace(".", "__"): shape for name, shape in head.items()})
    encoder = {name: tensor for name, tensor in state_of("rna").items() if not name.startswith("to_out")}
    encoder["pos_emb.emb.weight"] = encoder["pos_emb.emb.weight"].clone()
    encoder["pos_emb.emb.weight"][-1] = 0  # the token after the last gene
    return encoder | _random(
        2,
        to_out__conv1__weight=(1, 1, 1, dim),
        to_out__conv1__bias=(1,),
        to_out__fc1__weight=(512, N_TOKENS),
        to_out__fc1__bias=(512,),
        to_out__fc2__weight=(128, 512),
        to_out__fc2__bias=(128,),
        to_out__fc3__weight=(n, 128),
        to_out__fc3__bias=(n,),
    )


LAYOUTS = ("rna", "scbert", "atac", "multimodal", "student", "celltype")
ALONE = ("rna", "scbert")
"""Layouts without ATAC."""


@cache
def genes(n: int = N_TOKENS) -> list[str]:
    """Symbols in an order of their own, as in published lists."""
    return [str(name) for name in np.random.default_rng(0).permutation(gene_names())[:n]]


PEAKS = [f"chr{1 + i // 30}:{1000 * (i % 30) + 100}-{1000 * (i % 30) + 600}" for i in range(N_PEAKS)]


def raw_cells(path: Path, gene_names: list[str], peaks: list[str] | None = None, n_cells: int = 60) -> Path:
    """Raw counts of labelled cells of three types and two batches; with peaks as .h5mu."""
    rng = np.random.default_rng(3)
    types = np.arange(n_cells) % 3
    obs = {"cell_type": [CLASSES[i] for i in types], "batch": [f"b{i // 3 % 2}" for i in range(n_cells)]}
    frame = pd.DataFrame(obs, index=[f"c{i}" for i in range(n_cells)])

    def counts(names: list[str], mean: float) -> ad.AnnData:
        means = rng.gamma(0.5, mean, (3, len(names)))[types]
        values = rng.poisson(means).astype(np.float32)
        values[:, 0] = 1
        return ad.AnnData(csr_matrix(values), frame.copy(), pd.DataFrame(index=names))

    rna = counts(gene_names, 20)
    if peaks is None:
        rna.write(path)
    else:
        mudata.MuData({"rna": rna, "atac": counts(peaks, 1)}).write(path)
    return path


def write_lists(folder: Path) -> None:
    """genes.txt, genes_but_one.txt (scBERT's, for one token more), peaks.bed and labels.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "genes.txt").write_text("".join(f"{gene}\n" for gene in genes()))
    (folder / "genes_but_one.txt").write_text("".join(f"{gene}\n" for gene in genes()[:-1]))
    (folder / "peaks.bed").write_text("".join(peak.replace(":", "\t").replace("-", "\t") + "\n" for peak in PEAKS))
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in CLASSES))


def flags_of(layout: str, lists: Path) -> dict:
    """The lists that import_published.py asks for."""
    flags = {}
    if layout != "atac":
        flags["gene_reference"] = lists / ("genes_but_one.txt" if layout == "scbert" else "genes.txt")
    if layout not in ALONE:
        flags |= {"peak_reference": lists / "peaks.bed", "atac_heads": ATAC_HEADS}
    if layout in ("scbert", "celltype"):
        flags["labels"] = lists / "labels.txt"
    return flags


def import_state(folder: Path, layout: str, state: dict | None = None, **flags) -> Path:
    """Write a published file of a layout, or the given content, and import it by the script; returns the folder."""
    write_lists(folder)
    checkpoint = folder / f"{layout}.pth"
    torch.save({"model_state_dict": state_of(layout)} if state is None else state, checkpoint)
    lists = flags_of(layout, folder) | flags
    run("import_published", checkpoint=checkpoint, ckpt_dir=folder, model_name=layout, **lists)
    return folder / layout
