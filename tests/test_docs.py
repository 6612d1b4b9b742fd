"""The documents: links lead somewhere, commands and modules exist, promises have their tests, the tutorial has run."""

import ast
import contextlib
import io
import json
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from tests.helpers import ROOT, call
from utils import __version__

TUTORIAL = Path("docs/tutorial.ipynb")
PATTERNS = ("*.md", "docs/*.md", "docs/*.ipynb", "benchmarks/*.md")
PAGES = sorted(page.relative_to(ROOT) for pattern in PATTERNS for page in ROOT.glob(pattern))
NOT_OURS = {"max_restarts", "nproc_per_node", "rdzv_endpoint"}  # flags of torchrun


@cache
def read(page: Path) -> str:
    """A page's text; of a notebook, that of its cells."""
    text = (ROOT / page).read_text()
    if page.suffix == ".ipynb":
        text = "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as links give them."""
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_can_be_reached_from_the_readme():
    reached, new = set(), {Path("README.md")}
    while new:
        page = new.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s]+)", read(page)) if page.suffix in (".md", ".ipynb") else []
        paths = {(ROOT / page).parent.joinpath(link).resolve() for link in links if "://" not in link}
        new |= {path.relative_to(ROOT) for path in paths if path.is_file()} - reached
    assert set(PAGES) <= reached


@cache
def flags_of(script: str) -> set[str]:
    """The flags that --help of a script, or of a module that is run as one, lists."""
    out = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(out):
        call(script, "--help")
    return set(re.findall(r"--\w+", out.getvalue()))


def commands(page: Path) -> list[tuple[str, str]]:
    """Scripts (`train.py`) or modules (`benchmarks.plan`) that a page runs, each with the rest of its command."""
    text = read(page).replace("\\\n", " ")
    start = r"(?m)(?:^|`|\$ )(?:python |torchrun (?:--\w+=\S+ )+)"
    found = re.findall(start + r"(-m [\w.]+|[\w/]+\.py)((?: [^\n`#]+)?)", text)
    return [(script, words) for script, words in found if script not in ("-m venv", "-m pip", "-m pytest")]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_have_the_flags_they_are_shown_with(page):
    written_here = set(re.findall(r"`(\w+\.py)`, in the top folder", read(page)))  # a how-to's own script
    for script, words in commands(page):
        if "NAME" in script or script in ("script.py", *written_here):
            continue
        name = script.removeprefix("-m ").removesuffix(".py").replace("/", ".")
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), script
        flags = set(re.findall(r"--\w+", words))
        unknown = flags and flags - flags_of(name)
        assert not unknown, (script, unknown)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=str)
def test_flags_named_in_the_text_exist(page):
    flags = set(re.findall(r"`--(\w+)[^`\n]*`", read(page)))
    scripts = [path.stem for path in ROOT.glob("*.py")]
    modules = ["benchmarks.paired", "benchmarks.study", "benchmarks.peers", "benchmarks.tasks"]
    modules += [f"downstream.{path.stem}" for path in ROOT.glob("downstream/[!_]*.py")]
    known = {flag.removeprefix("--") for script in (*scripts, *modules) for flag in flags_of(script)}
    assert flags <= known | NOT_OURS, page


@pytest.mark.parametrize("page", [Path("README.md"), *sorted(Path("docs").glob("*.md"))], ids=str)
def test_python_examples_import_what_exists(page):
    for block in re.findall(r"(?ms)^ *```python\n(.*?)^ *```$", (ROOT / page).read_text()):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("models", "utils"):
                for alias in node.names:
                    defined_here = re.search(rf"(?m)^{alias.name} = ", (ROOT / page).read_text())
                    assert defined_here or hasattr(import_module(node.module), alias.name), ast.unparse(node)


def test_the_architecture_names_every_module():
    text = read(Path("docs/architecture.md"))
    tree = text.split("```")[1]
    folders = re.split(r"(?m)^(?=  \w+/|\w+/)", tree)
    for folder in ("models", *(f"utils/{path.name}" for path in (ROOT / "utils").iterdir() if path.is_dir())):
        if folder.endswith("__pycache__"):
            continue
        (part,) = [part for part in folders if re.match(rf" *{Path(folder).name}/", part)]
        missing = {path.stem for path in (ROOT / folder).glob("[!_]*.py")} - set(re.findall(r"\w+", part))
        assert not missing, folder
    for path in re.findall(r"`((?:utils|models|downstream|tests|benchmarks)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


def test_every_promise_names_a_test_that_is_there():
    tests = {path: path.read_text() for path in (ROOT / "tests").glob("**/*.py")}
    table = read(Path("docs/reliability.md")).split("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "promise" not in line]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py|test_\w+)`", row.split("|")[2])
        assert named, row
        for name in named:
            there = (ROOT / name).is_file() or any(f"def {name}(" in text for text in tests.values())
            assert there, name


def test_the_tutorial_was_run_to_its_end_and_names_no_machine():
    text = (ROOT / TUTORIAL).read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    printed = "".join("".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs)
    assert not re.search(r"(?<![\w.<])/\w+/|site-packages|[A-Z]:\\", printed)  # absolute paths
    assert len(text) < 1_000_000


def test_versions_are_stated_once():
    pins = dict(line.split("==") for line in (ROOT / "requirements-dev.txt").read_text().split())
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["rev"] for hook in hooks] == [f"v{pins['ruff']}"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"## {__version__} (" in read(Path("CHANGELOG.md"))
    assert citation["preferred-citation"]["doi"].split("/")[1] in read(Path("README.md"))


def test_the_readme_stays_a_page():
    assert len(read(Path("README.md")).splitlines()) <= 130
