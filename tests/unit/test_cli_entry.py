"""What a network of the user's own raises ends in a message, whatever its type."""

import sys

import pytest

from backpass import cli

NETWORK = """
from torch import nn

def Net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
"""


def test_an_error_of_the_network_has_a_traceback_only_where_it_is_asked_for(monkeypatch, capsys, tmp_path):
    (tmp_path / "normed.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    arguments = [
        "train",
        "--data",
        "digits",
        "--model",
        "normed:Net",
        "--batch-size",
        "1",
        "--limit",
        "8",
        "--out",
        "run",
    ]
    monkeypatch.setattr(sys, "argv", ["backpass", *arguments, "--out", "run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "ValueError: Expected more than 1 value per channel" in error
    assert "Traceback" not in error
    monkeypatch.setenv("BACKPASS_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["backpass", *arguments, "--out", "again"])
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        cli.main()
