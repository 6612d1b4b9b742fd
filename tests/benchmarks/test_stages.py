"""Stages run scripts, keep what they cost, and remember it where asked to."""

import json
import shlex

import pytest

from benchmarks.lib.stages import Stages
from utils.errors import UserError


def adding(path) -> str:
    """A command that adds a letter to a file, and uses about 80 MB and 0.2 s."""
    program = f"import time; x = bytes(80_000_000); time.sleep(0.2); open({str(path)!r}, 'a').write('x')"
    return f"-c {shlex.quote(program)}"


def test_a_stage_runs_once_for_each_command_and_keeps_its_cost(tmp_path, capsys):
    memory, file = tmp_path / "stages.json", tmp_path / "file"
    for _ in range(2):
        stages = Stages(memory)
        stages.run("add", adding(file))
        assert file.read_text() == "x"
    assert "add: " in capsys.readouterr().out
    used = stages.used["add"]
    assert used["seconds"] >= 0.2 and used["peak_memory_gb"] >= 0.08
    assert json.loads(memory.read_text()) == {"add": used}
    stages.run("after", adding(tmp_path / "after"))
    stages.run("add", adding(file) + " again")  # another command, after which what follows is run again
    stages.run("after", adding(tmp_path / "after"))
    assert file.read_text() == (tmp_path / "after").read_text() == "xx"
    with pytest.raises(UserError, match="after"):
        stages.run("after", "-c 'raise SystemExit(3)'")
    Stages(memory).run("after", adding(tmp_path / "after"))  # what failed may have left its folder half done
    assert (tmp_path / "after").read_text() == "xxx"
    Stages().run("add", adding(file))  # no memory
    assert file.read_text() == "xxx"


def test_a_stage_that_fails_is_not_remembered(tmp_path):
    stages = Stages(tmp_path / "stages.json")
    with pytest.raises(UserError, match=r"broken.*python -c"):
        stages.run("broken", "-c 'raise SystemExit(3)'")
    assert not stages.used and not (tmp_path / "stages.json").exists()
