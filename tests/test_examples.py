"""The Python examples of the documents run as they are written."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mudata
import pytest

from tests.helpers import ROOT


def blocks(page: str) -> list[str]:
    """The Python examples of a page, in order."""
    return re.findall(r"(?ms)^```python\n(.*?)^```$", (ROOT / page).read_text())


@pytest.fixture
def folder(raw_file, ready_file, runs, tmp_path, monkeypatch) -> Path:
    """A working folder with the files that the examples name."""
    mudata.read(raw_file)["rna"].write(tmp_path / "new_cells.h5ad")
    shutil.copy(ready_file, tmp_path / "cells.ready.h5mu")
    (tmp_path / "runs").mkdir()
    for name in ("student", "celltype"):
        (tmp_path / "runs" / name).symlink_to(runs[f"{name}_atac"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_example_of_the_readme_labels_cells_and_draws_them(folder, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: plt.savefig("umap.png"))
    (example,) = blocks("README.md")
    names: dict = {}
    exec(example, names)
    assert set(names["cells"].obs) >= {"predicted_cell_type", "confidence"}
    assert names["cells"].obsm["X_umap"].shape == (96, 2)
    assert (folder / "umap.png").stat().st_size > 10_000


def test_the_example_of_the_predictions_page_loads_a_model(folder, capsys):
    (example,) = [block for block in blocks("docs/predictions.md") if "load_model" in block]
    exec(example, {})
    assert capsys.readouterr().out.strip().endswith(" 60")


@pytest.mark.slow
def test_the_task_of_the_how_to_page_trains_and_predicts(folder):
    for name in ("models", "utils"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    head, task, script, use = blocks("docs/add_a_task.md")
    for path, more in (("models/heads.py", head), ("utils/train/cell_types.py", task)):
        text = (folder / path).read_text()
        (folder / path).write_text(
            text.replace("import CellTypeHead", "import CellTypeHead, NumberHead") + "\n\n" + more
        )
    (folder / "train_number.py").write_text(script)
    (folder / "use.py").write_text(f"{use}\nassert cells.obs['predicted_number'].notna().all()\n")
    cells = mudata.read("cells.ready.h5mu")
    cells.obs["age"] = range(len(cells))
    cells.write("cells.ready.h5mu")

    options = "--data_path cells.ready.h5mu --pretrained_model_path runs/student --column age --epochs 2 --device cpu"
    run(folder, "train_number.py", *options.split(), "--ckpt_dir", "runs", "--model_name", "age")
    run(folder, "use.py")


def run(folder: Path, *words: str) -> None:
    """A process that imports the folder's copy of the code, and must succeed."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
