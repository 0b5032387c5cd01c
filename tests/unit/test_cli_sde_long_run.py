"""``backpass sde long-run`` and ``backpass sde control`` in small."""

import json

import pytest
from typer.testing import CliRunner

from backpass.cli import app
from backpass.errors import BackpassError


def run(*arguments):
    return CliRunner().invoke(app, ["sde", *map(str, arguments)], catch_exceptions=False)


def test_control_writes_the_schedule_of_the_worked_example(tmp_path):
    done = run("control", "--out", tmp_path)
    assert done.exit_code == 0
    assert "0.005248" in done.stdout
    assert "0.008721" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert [series["id"] for series in result["series"]] == ["control", "risk"]
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_long_run_predicts_the_law_that_it_measures(tmp_path):
    done = run("long-run", "--paths", 64, "--relaxations", 8, "--eta", 0.05, "--dim", 1, "--out", tmp_path)
    assert done.exit_code == 0
    result = json.loads((tmp_path / "result.json").read_text())
    chain, prediction = result["tables"][0]["rows"]
    width = chain[1]["high"] - chain[1]["low"]
    assert abs(chain[1]["mean"] - prediction[1]["mean"]) < 2 * width
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_bad_numbers_are_named(tmp_path):
    with pytest.raises(BackpassError, match="eta is a finite number above 0"):
        run("control", "--eta", 0, "--out", tmp_path)
    with pytest.raises(BackpassError, match="at least 8 paths"):
        run("long-run", "--paths", 2, "--out", tmp_path)
