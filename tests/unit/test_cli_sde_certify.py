"""``backpass sde certify``: a recipe and the folder of a run, and settings that the SDE does not cover."""

import json

import pytest
from typer.testing import CliRunner

from backpass.attacks import FAB, FGSM, PGD
from backpass.cli import app
from backpass.errors import BackpassError
from backpass.experiments.certificate import inner_loop

RECIPE = """
data = "digits"
model = "mlp"
adversary = "pgd:eps=0.1,steps=2"
optimizer = "{optimizer}"
lr = 0.002
batch_size = 16
limit = 200
"""


def run(*arguments):
    return CliRunner().invoke(app, ["sde", "certify", *map(str, arguments)], catch_exceptions=False)


def recipe(tmp_path, optimizer="sgd:momentum=0.5"):
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE.format(optimizer=optimizer))
    return file


def test_a_page_with_checks_predictions_and_a_schedule(tmp_path):
    done = run(recipe(tmp_path), "--steps", 4, "--replicas", 4, "--probe", 48, "--out", tmp_path / "page")
    assert done.exit_code == 0
    assert "Momentum 0.5 counts as the rate that it makes" in done.stdout
    result = json.loads((tmp_path / "page" / "result.json").read_text())
    assert [series["id"] for series in result["series"]] == [
        "svag",
        "predicted-eta",
        "predicted-k",
        "predicted-eta-inner",
    ]
    checks = {row[0]: row[3] for row in result["tables"][0]["rows"]}
    assert set(checks) >= {"eta times curvature", "kurtosis of the noise", "spread, permuted batches"}
    assert set(checks.values()) <= {"passed", "failed", "undecided"}
    assert "<svg" in (tmp_path / "page" / "report.html").read_text()


def test_what_the_sde_does_not_model_is_refused(tmp_path):
    with pytest.raises(BackpassError, match="models SGD"):
        run(recipe(tmp_path, "adam"), "--out", tmp_path)
    with pytest.raises(BackpassError, match="whole numbers such as 1,4,16"):
        run(recipe(tmp_path), "--amplifications", "1,x", "--out", tmp_path)
    with pytest.raises(BackpassError, match="FGSM, I-FGSM or PGD"):
        inner_loop(FAB(eps=0.1))


def test_attacks_become_inner_loops():
    found = inner_loop(PGD(eps=0.1, step=0.03, steps=4))
    assert (found.steps, found.eta, found.direction, found.eps) == (4, 0.03, "sign", 0.1)
    assert (inner_loop(FGSM(eps=0.1)).steps, inner_loop(None).steps) == (1, 0)
    assert callable(inner_loop(PGD(eps=1.0, step=0.3, norm="l2")).direction)
