"""Makes what tests need: small files of cells and peaks, simulated multiome, and a folder of trained models."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from tests import helpers
from utils.cells.preprocessed import read_cells
from utils.cells.simulate import Simulation, SimulationConfig, simulate
from utils.features.count_detection import BASES
from utils.features.gene_symbols import load_gene_table


@cache
def gene_names() -> np.ndarray:
    """Symbols of the human genes that code for proteins."""
    return load_gene_table().query("protein_coding")["symbol"].to_numpy()


def make_cells(seed: int = 0, n_cells: int = 12, n_genes: int = 40) -> ad.AnnData:
    """Human cells with counts in a sparse X; each cell has a count of 1, by which its scale can be found."""
    rng = np.random.default_rng(seed)
    counts = rng.negative_binomial(1, 0.3, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < 0.5)
    counts[:, 0] = 1
    barcodes = ["".join(rng.choice(list("ACGT"), 16)) + "-1" for _ in range(n_cells)]
    genes = np.sort(rng.choice(gene_names(), n_genes, replace=False))
    return ad.AnnData(csr_matrix(counts.astype(np.float32)), pd.DataFrame(index=barcodes), pd.DataFrame(index=genes))


STATES = {
    "counts": lambda counts: counts,
    **{f"log1p {b}": lambda c, b=b: np.log1p(c * 1e4 / c.sum(1, keepdims=True)) / np.log(BASES[b]) for b in BASES},
    "cpm": lambda counts: counts * 1e6 / counts.sum(1, keepdims=True),
}


def make_peaks(barcodes: pd.Index, seed: int = 0) -> ad.AnnData:
    """Counts of 30 peaks for cells with the given barcodes; the first peak is open in all of them."""
    rng = np.random.default_rng(seed)
    names = [f"chr{1 + i % 20}:{1000 * i}-{1000 * i + 500}" for i in range(1, 31)]
    counts = rng.poisson(0.5, (len(barcodes), 30)).astype(np.float32)
    counts[:, 0] = 1
    return ad.AnnData(csr_matrix(counts), pd.DataFrame(index=barcodes), pd.DataFrame(index=names))


def tokens(path: Path, out: Path, modality: str = "rna", **flags) -> pd.DataFrame:
    """Preprocess a file and read what the models see: cells × features, with their names."""
    helpers.run("preprocess", data_path=path, out_path=out, **flags)
    cells = read_cells(out, (modality,))
    return pd.DataFrame(cells.values[modality][:].toarray(), cells.obs.index.rename(None), cells.features[modality])


def make_simulation() -> Simulation:
    """96 simulated cells of three types and two donors."""
    return simulate(SimulationConfig(n_cells=96, n_genes=60, n_peaks=150, n_types=3, n_donors=2))


@dataclass(frozen=True)
class Runs:
    """A folder of trained models; `runs[name]` is the path of one. Tests must not change them."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


def make_teacher(ready_file: Path, folder: Path) -> Runs:
    """Run the stages up to the teacher's latents: rna, atac, multimodal, latents."""
    runs = Runs(folder)
    paths = {"data_path": ready_file, "ckpt_dir": runs.folder}
    helpers.run("pretrain_rna", **paths, model_name="rna", **helpers.RNA)
    helpers.run("pretrain_atac", **paths, model_name="atac", **helpers.ATAC)
    encoders = {"rna_model_path": runs["rna"], "atac_model_path": runs["atac"]}
    helpers.run("pretrain_multimodal", **paths, **encoders, model_name="multimodal", **helpers.MULTIMODAL)
    teacher = runs["multimodal"]
    helpers.run("get_latent_emb", data_path=ready_file, model_path=teacher, ckpt_dir=runs["latents"], device="cpu")
    return runs


def make_runs(ready_file: Path, folder: Path) -> Runs:
    """Run all stages: `make_teacher`, then a student and a classifier for each missing modality."""
    runs = make_teacher(ready_file, folder)
    paths = {"data_path": ready_file, "ckpt_dir": runs.folder}
    latents = {"model_path": runs["multimodal"], "dir_train": runs["latents"], "dir_val": runs["latents"]}
    for missing in ("atac", "rna"):
        student = f"student_{missing}"
        helpers.run("pretrain_missing_mod", **paths, **latents, model_name=student, missing=missing, **helpers.TRAINING)
        helpers.run(
            "train_missing_celltype_func",
            **paths,
            pretrained_model_path=runs[student],
            model=f"celltype_{missing}",
            **helpers.TRAINING | {"epochs": 25, "learning_rate": 0.01, "patience": 0, "trainable_blocks": -1},
        )
    return runs
