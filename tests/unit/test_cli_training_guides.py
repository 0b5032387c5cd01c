"""The guides to training: their shell commands run as they stand, in their order, after their Python."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from backpass import cli

GUIDES = Path(__file__).parents[2] / "docs" / "how-to"


@pytest.mark.parametrize("name", ["train-from-the-command-line.md", "adversarial-training.md"])
def test_the_guides_commands_run_as_they_stand(name, tmp_path, monkeypatch):
    page = (GUIDES / name).read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mymodel", raising=False)
    names = {"__name__": "__main__"}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, name, "exec"), names)
    commands = [
        shlex.split(block.replace("\\\n", " "))
        for block in re.findall(r"^ *```sh\n(.*?)^ *```$", page, re.MULTILINE | re.DOTALL)
    ]
    assert len(commands) >= 3
    for command in commands:
        assert command[0] == "backpass"
        ended = CliRunner().invoke(cli.app, command[1:])
        assert ended.exit_code == 0, f"{command}: {ended.output} {ended.exception}"
    monkeypatch.delitem(sys.modules, "mymodel", raising=False)
