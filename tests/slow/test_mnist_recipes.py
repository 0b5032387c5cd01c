"""The recipes for MNIST reach the accuracy that their titles say, through the command line."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from backpass import cli

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.slow
@pytest.mark.skipif("BACKPASS_DATA" not in os.environ, reason="BACKPASS_DATA names no folder with mnist")
@pytest.mark.parametrize(("name", "least"), [("mnist-lenet5", 0.985), ("mnist-mlp", 0.975)])
def test_mnist_is_learned_in_three_epochs(name, least, tmp_path):
    ended = CliRunner().invoke(
        cli.app, ["train", "--recipe", str(RECIPES / f"{name}.toml"), "--out", str(tmp_path / "run")]
    )
    assert ended.exit_code == 0, ended.output
    state = json.loads((tmp_path / "run/run.json").read_text())
    assert state["epoch"] <= 3
    assert state["last"]["evaluation"]["accuracy"] >= least
