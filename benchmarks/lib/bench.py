"""Results of benchmarks: the target, the measured value and the machine of each claim."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks.lib.stages import ROOT
from models.minibatch import Minibatch, Ragged
from utils.as_json import to_json

RESULTS = str(ROOT / "benchmarks" / "results")


@dataclass
class Row:
    """One claim about speed or memory.

    Attributes
    ----------
    work : description of the measured work
    measured : measured value
    reach : target
    unit : unit of both values
    at_most : whether the target is an upper limit; by default it is a lower limit
    """

    work: str
    measured: float
    reach: float
    unit: str
    at_most: bool = False

    @property
    def ratio(self) -> float:
        """The measured value relative to the target: above 1 if the target was exceeded, below 1 if it was missed."""
        return self.reach / self.measured if self.at_most else self.measured / self.reach

    def __str__(self) -> str:
        bound = "at most" if self.at_most else "at least"
        verdict = "" if self.ratio >= 1 else "  MISSED"
        return (
            f"{self.work}: {number(self.measured)} {self.unit}, target {bound} {number(self.reach)} "
            f"(ratio {self.ratio:.2f}){verdict}"
        )


def number(value: float) -> str:
    """Return a value as text with three digits; values of 1,000 and more get all their digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def random_cells(modality: str, n_features: int, n_values: int, n_cells: int = 1) -> Minibatch:
    """Return a minibatch of random cells with `n_values` values each; only its size matters."""
    rng = np.random.default_rng(n_cells)
    indices = np.concatenate([np.sort(rng.choice(n_features, n_values, replace=False)) for _ in range(n_cells)])
    values = rng.uniform(1, 6, len(indices)) if modality == "rna" else np.ones(len(indices))
    offsets = torch.arange(n_cells + 1) * n_values
    values = torch.from_numpy(values.astype(np.float32))
    cells = Ragged(torch.from_numpy(indices), values, offsets, n_features, longest=n_values)
    rows = torch.arange(n_cells)
    return Minibatch(rows, rows * 7919 + 17, torch.ones(n_cells), n_cells, **{modality: cells})


def machine() -> str:
    """Return processor, cores, memory, operating system and version of torch in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        name = next((line.split(":")[1].strip() for line in cpuinfo.open() if line.startswith("model name")), name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return (
        f"{platform.machine()}, {name}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}, "
        f"torch {torch.__version__}{device}"
    )


def when_and_where() -> dict[str, str]:
    """Return today's date and a description of this machine."""
    return {"date": date.today().isoformat(), "machine": machine()}


def save_rows(name: str, rows: list[Row], folder: str | Path, **more) -> None:
    """Print the rows and write them, with further results in `more`, to <folder>/<name>.json."""
    for row in rows:
        print(row, flush=True)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = when_and_where() | {"rows": [asdict(row) for row in rows]}
    (folder / f"{name}.json").write_text(to_json(metadata | more))
    print(f"wrote {folder / f'{name}.json'}")


def read_rows(path: str | Path) -> tuple[list[Row], dict]:
    """Return the rows in a file of results, and its whole content."""
    metadata = json.loads(Path(path).read_text())
    return [Row(**row) for row in metadata["rows"]], metadata
