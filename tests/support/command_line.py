"""The command line, called as a user does."""

import re
import sys

import pytest
from typer.testing import CliRunner

from backpass import cli


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "120", "TERM": "dumb"})


def call(monkeypatch, capsys, *arguments):
    """The entry point itself: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["backpass", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, *capsys.readouterr()


def words(text):
    """Text without the frames and line breaks that a terminal puts into it."""
    return re.sub(r"[\s\u2500-\u257f]+", " ", text)
