"""What a network of the user's own raises ends in a message, whatever its type."""

import sys

import pytest

from backpass import cli

NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        if self.training:
            raise ValueError("my layer is not ready")
        return self.linear(x.flatten(1))
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
        "8",
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
    assert "ValueError: my layer is not ready" in error
    assert "Traceback" not in error
    monkeypatch.setenv("BACKPASS_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["backpass", *arguments, "--out", "again"])
    with pytest.raises(ValueError, match="my layer is not ready"):
        cli.main()
