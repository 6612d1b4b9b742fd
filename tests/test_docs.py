"""The documents: links lead somewhere, commands have the flags that they are shown with, promises have their tests."""

import contextlib
import io
import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers import ROOT, call

PAGES = sorted(
    page.relative_to(ROOT) for pattern in ("*.md", "docs/*.md", "benchmarks/*.md") for page in ROOT.glob(pattern)
)


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as links give them."""
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@cache
def flags_of(script: str) -> set[str]:
    """The flags that a script's --help lists."""
    out = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(out):
        call(script, "--help")
    return set(re.findall(r"--\w+", out.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_have_the_flags_they_are_shown_with(page):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    commands = re.findall(r"(?m)(?:^|`|\$ )python ((?:-m )?[\w./]+)((?: [^\n`#]+)?)", text)
    for script, words in commands:
        name = script.removeprefix("-m ").removesuffix(".py")
        path = ROOT / (f"{name.replace('.', '/')}.py" if script.startswith("-m ") else script)
        if script in ("-m venv", "-m pip") or "NAME" in script:
            continue
        assert path.is_file(), script
        if not script.startswith("-m "):
            unknown = set(re.findall(r"--\w+", words)) - flags_of(name)
            assert not unknown, (script, unknown)


def test_every_promise_names_a_test_that_is_there():
    tests = {path: path.read_text() for path in (ROOT / "tests").glob("**/*.py")}
    table = (ROOT / "docs" / "reliability.md").read_text().split("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "promise" not in line]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py|test_\w+)`", row.split("|")[2])
        assert named, row
        for name in named:
            there = (ROOT / name).is_file() or any(f"def {name}(" in text for text in tests.values())
            assert there, name
