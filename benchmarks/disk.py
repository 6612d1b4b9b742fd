"""Measure the disk that X and the counts of a cell take, before and after preprocess.py.

    python -m benchmarks.disk                              # simulated: RNA, and RNA with ATAC (2 GB of disk, minutes)
    python -m benchmarks.disk --data_path cells.h5mu       # a file of your own

Simulated cells express about 1,500 of 20,000 genes, and have 4,000 of 400,000 peaks open, at random: only their
numbers matter. The raw files are uncompressed, as anndata writes them. Annotation is not counted: it does not change.
Prints kB per cell, and writes disk.json into --out_path.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from benchmarks.lib.bench import RESULTS, Row, save_rows
from benchmarks.preprocessing import BLOCK, preprocess, simulate, write_blocks
from utils.cli import flag, parse_flags, run_script

N_PEAKS, N_OPEN = 400_000, 4_000


@dataclass
class Flags:
    cells: int = flag("simulated cells", 10_000)
    data_path: str | None = flag("a raw .h5ad or .h5mu to measure instead", None)
    work_path: str | None = flag("folder for the files; by default a temporary folder", None)
    out_path: str = flag("folder for the result", RESULTS)


def matrix_bytes(path: Path) -> dict[str, float]:
    """Return modality → bytes per cell of X and layers in a .h5ad or .h5mu; what has two names counts once."""
    found = {}
    with h5py.File(path) as file:
        groups = {name: file["mod"][name] for name in file["mod"]} if "mod" in file else {"all": file}
        for modality, group in groups.items():
            stored: dict[str, int] = {}

            def note(name, held, stored=stored) -> None:
                if isinstance(held, h5py.Dataset) and name.split("/")[0] in ("X", "layers"):
                    stored[name] = held.id.get_storage_size()

            group.visititems(note)  # calls once for each dataset, whatever its number of names
            index = group["obs"][group["obs"].attrs["_index"]]
            found[modality] = sum(stored.values()) / len(index)
    return found


def simulate_peaks(path: Path, obs: pd.DataFrame, seed: int = 1, dtype: type = np.float32) -> None:
    """Write an .h5ad with counts of open peaks, at random, for the cells of another file."""
    rng = np.random.default_rng(seed)

    def draw(start: int) -> csr_matrix:
        n = min(BLOCK, len(obs) - start)
        peaks = np.sort(rng.integers(0, N_PEAKS, (n, N_OPEN), dtype=np.int32), axis=1)
        counts = rng.geometric(0.7, n * N_OPEN).astype(dtype)
        counts = csr_matrix((counts, peaks.ravel(), np.arange(n + 1) * N_OPEN), shape=(n, N_PEAKS))
        counts.sum_duplicates()
        return counts

    names = [f"chr{1 + i % 20}:{1000 * (i // 20) + 1}-{1000 * (i // 20) + 501}" for i in range(N_PEAKS)]
    frame = ad.AnnData(obs=obs, var=pd.DataFrame(index=names))
    write_blocks(path, frame, (draw(start) for start in range(0, len(obs), BLOCK)))


def measure(raw: Path, folder: Path) -> list[Row]:
    """Preprocess a file; return a row for each modality."""
    ready = folder / f"ready{raw.suffix}"
    preprocess(raw, ready)
    before, after = matrix_bytes(raw), matrix_bytes(ready)
    ready.unlink()
    rows = []
    for modality in sorted(before.keys() & after.keys(), reverse=True):
        kept = (before[modality] / 1e3, after[modality] / 1e3)
        print(f"{raw.name}, {modality}: {kept[0]:.2f} kB per cell raw, {kept[1]:.2f} preprocessed", flush=True)
        rows.append(Row(f"{raw.name}, {modality}: preprocessed", kept[1], kept[0], "kB per cell", at_most=True))
    return rows


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    with tempfile.TemporaryDirectory(dir=flags.work_path) as name:
        folder = Path(name)
        if flags.data_path:
            rows = measure(Path(flags.data_path), folder)
        else:
            rna, peaks, both = folder / "rna.h5ad", folder / "atac.h5ad", folder / "both.h5mu"
            simulate(rna, flags.cells, "csr", seed=0)
            rows = measure(rna, folder)
            cells = ad.read_h5ad(rna)
            simulate_peaks(peaks, cells.obs)
            mudata.MuData({"rna": cells, "atac": ad.read_h5ad(peaks)}).write(both)
            rows += measure(both, folder)
    save_rows("disk", rows, flags.out_path)


if __name__ == "__main__":
    run_script(main)
