"""A file of the full published size: how long its import takes, and how much memory."""

import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

from models import published
from models.shapes import ATACEncoderConfig, ClassifierConfig, FusionConfig, RNAEncoderConfig, StudentConfig
from tests.builders import gene_names
from tests.helpers import python
from utils.train.model_folder import SavedModel

N_GENES, N_PEAKS, CLASSES = 16_906, 1_154_464, ["B cell", "T cell", "monocyte"]

MEASURE = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    print("used", used.ru_utime + used.ru_stime, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def measured(script: str, **flags) -> tuple[float, float, float]:
    """Run a script in a process of its own; seconds, those of them on the CPU, and peak memory in GB."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    started = time.monotonic()
    done = python("-c", MEASURE, f"{script}.py", *words, timeout=600)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr[-2000:]
    sys.stdout.write(done.stdout)
    cpu, peak = done.stdout.split("used ")[1].split()
    return seconds, float(cpu), int(peak) / 1e9


def full_state() -> dict[str, torch.Tensor]:
    """Random weights of the joined model with student and classifier, and its ATAC tower and decoders."""
    parts = {
        "rna": RNAEncoderConfig(),
        "atac": ATACEncoderConfig(),
        "fusion": FusionConfig(),
        "student": StudentConfig(),
    }
    n_features = {"rna": N_GENES + 1, "atac": N_PEAKS}
    joined = SavedModel("student", parts, {}, {}, options={"missing": "atac", "other_modality": "student"})
    with_head = replace(joined, kind="celltype", config=parts | {"head": ClassifierConfig()}, outputs=CLASSES)
    ours = joined.shapes(n_features) | with_head.shapes(n_features)
    table = published.table_of("celltype", 6, 6)
    on_meta = {name: torch.empty(shape, device="meta") for name, shape in ours.items()}
    shapes = {name: tensor.shape for name, tensor in published.to_theirs(on_meta, table).items()}
    rng = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=rng) * 0.02 for name, shape in shapes.items()}
    return state | published.constants("celltype")


def write_files(folder: Path) -> None:
    """The checkpoint, its lists, and one cell."""
    torch.save({"model_state_dict": full_state()}, folder / "scmomer.pth")
    genes = np.random.default_rng(0).permutation(gene_names())[:N_GENES]
    (folder / "genes.txt").write_text("\n".join(genes))
    (folder / "labels.txt").write_text("\n".join(CLASSES))
    starts = np.arange(N_PEAKS // 22 + 1) * 900
    peaks = (f"chr{1 + chrom}\t{start}\t{start + 500}\n" for chrom in range(22) for start in starts)
    (folder / "peaks.bed").write_text("".join(islice(peaks, N_PEAKS)))
    counts = np.random.default_rng(1).poisson(0.1, (1, N_GENES)).astype(np.float32)
    ad.AnnData(csr_matrix(counts), pd.DataFrame(index=["c"]), pd.DataFrame(index=genes)).write(folder / "cell.h5ad")


@pytest.mark.slow
@pytest.mark.alone
def test_the_full_published_size_is_imported_in_a_minute_and_four_gigabytes(tmp_path):
    write_files(tmp_path)
    lists = {"gene_reference": "genes.txt", "peak_reference": "peaks.bed", "labels": "labels.txt"}
    lists = {flag: tmp_path / name for flag, name in lists.items()}
    flags = {"checkpoint": tmp_path / "scmomer.pth", "ckpt_dir": tmp_path, "model_name": "full"}
    seconds, cpu, peak = measured("import_published", **flags, **lists)
    size = (tmp_path / "scmomer.pth").stat().st_size / 1e9
    print(f"import of a file of {size:.2f} GB: {seconds:.1f} s ({cpu:.1f} on the CPU), {peak:.2f} GB")
    assert seconds < 60
    assert peak < 4

    flags = {"data_path": tmp_path / "cell.h5ad", "model_path": tmp_path / "full", "device": "cpu"}
    seconds, cpu, peak = measured("predict_cell_type", **flags)
    print(f"one cell: {seconds:.1f} s ({cpu:.1f} on the CPU), {peak:.2f} GB")
    cell = ad.read_h5ad(tmp_path / "cell.predicted.h5ad")
    assert cell.obs["predicted_cell_type"].iloc[0] in CLASSES
    assert np.isfinite(cell.obsm["X_scmomer"]).all()
