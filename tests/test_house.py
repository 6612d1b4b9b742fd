"""The layout of the repository, read from its imports: arrows go down, and no file is too long to read."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("predict", "train", "cells", "files", "features", "evaluate")
"""Of utils, from above to below: each imports only those to its right, models, and the modules of utils itself."""
FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("", "models", "utils", "downstream", "benchmarks", "tests")
    for path in (ROOT / folder).glob("**/*.py" if folder else "*.py")
)


def imported(path: Path) -> set[Path]:
    """The files of the repository that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {Path(f"{name.replace('.', '/')}.py") for name in names}
    return {file for file in found if (ROOT / file).is_file()}


def place(path: Path) -> str:
    """The wing that a file of utils is in, or the top folder of any other."""
    if path.parts[0] == "utils" and len(path.parts) > 2:
        return path.parts[1]
    return path.parts[0] if len(path.parts) > 1 else "scripts"


def test_the_wings_are_all_there():
    assert {path.parts[1] for path in FILES if path.parts[0] == "utils" and len(path.parts) > 2} == set(WINGS)


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] in ("models", "utils")], ids=str)
def test_arrows_go_down(path):
    allowed = {
        "models": {"models"},
        "utils": {"utils", "models"},
        **{wing: {*WINGS[i:], "utils", "models"} for i, wing in enumerate(WINGS)},
    }[place(path)]
    upwards = {str(file) for file in imported(path) if place(file) not in allowed}
    assert not upwards


def test_scripts_are_imported_by_tests_and_benchmarks_alone():
    scripts = {path for path in FILES if place(path) == "scripts"}
    for path in FILES:
        if place(path) not in ("tests", "benchmarks"):
            assert not imported(path) & scripts, path


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_can_be_read_in_one_sitting(path):
    text = (ROOT / path).read_text()
    assert text.count("\n") <= 400
    assert not re.search(r"sys\.path\.(insert|append)|sys\.path *=", text) or path.name == "test_house.py"
