"""The guide to attacking one's own model: its shell commands run as they stand, after its Python."""

import re
import shlex
import sys
from pathlib import Path

from typer.testing import CliRunner

from backpass import cli

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "attack.md").read_text()


def test_the_guides_commands_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mymodel", raising=False)
    names = {"__name__": "__main__"}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "attack.md", "exec"), names)
    commands = [
        shlex.split(block.replace("\\\n", " "))
        for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    ]
    assert [command[:2] for command in commands] == [["backpass", "attack"]] * 3 + [["backpass", "transfer"]]
    for command in commands:
        ended = CliRunner().invoke(cli.app, command[1:])
        assert ended.exit_code == 0, ended.output
        assert (tmp_path / command[command.index("--out") + 1] / "report.html").is_file()
    monkeypatch.delitem(sys.modules, "mymodel")
