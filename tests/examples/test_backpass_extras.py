"""The example package: its rule and attack compute what they say, and the command line finds them."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from backpass import BackpassError, cli, parse_rule
from backpass.attacks import IFGSM, make_attack
from backpass.plugins import _points
from support.packages import install

PACKAGE = Path(__file__).parents[2] / "examples" / "backpass-extras"


@pytest.fixture(autouse=True)
def _installed(tmp_path, monkeypatch):
    points = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]["entry-points"]
    install(tmp_path / "site", monkeypatch, "backpass-extras", points, PACKAGE / "src")
    yield
    _points.cache_clear()


def run(*arguments):
    ended = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "160", "TERM": "dumb"})
    assert ended.exit_code == 0, ended.output
    return ended.output


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_rectified_gradients_are_their_formula(threshold):
    torch.manual_seed(0)
    first, second = nn.Linear(6, 8).double(), nn.Linear(8, 5).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
    with parse_rule(f"rectgrad:threshold={threshold}").attach(model):
        found = torch.autograd.grad(model(x).sum(), x)[0]
    z1 = first(x)
    z2 = second(z1.relu())
    at_z2 = torch.ones_like(z2) * (z2.relu() > threshold)
    g = at_z2 @ second.weight
    assert (g < 0).any()
    expected = (g * (g * z1.relu() > threshold)) @ first.weight
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_one_stair_is_plain_ifgsm(cnn, held_out):
    x, y = held_out.x[:20], held_out.y[:20]
    settings = {"eps": 0.1, "step": 0.03, "steps": 4}
    ours = make_attack("ssfgsm", stairs=1, **settings)(cnn, x, y)
    assert torch.equal(ours.x_adv, IFGSM(**settings)(cnn, x, y).x_adv)


def test_the_direction_weighs_the_sign_by_the_rank_of_the_gradient(cnn, held_out):
    x, y = held_out.x[:5].double(), held_out.y[:5]
    model = cnn.double()
    attack = make_attack("ssfgsm", stairs=4, eps=0.2, step=0.05, steps=1, early_stop=False)
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)
    expected = x.clone()
    for image, g in zip(expected, gradient, strict=True):
        for rank, place in enumerate(g.abs().flatten().argsort().tolist()):
            image.view(-1)[place] += 0.05 * g.flatten()[place].sign() * (2 * (rank * 4 // 64) + 1) / 4
    torch.testing.assert_close(attack(model, x, y).x_adv, expected.clamp(0, 1), rtol=0, atol=1e-12)


def test_stairs_are_at_least_one():
    with pytest.raises(BackpassError, match="stairs must be a whole number of at least 1; got 0"):
        make_attack("ssfgsm", stairs=0)


def test_the_command_line_finds_both(tmp_path):
    assert "relu" in run("sites", "cnn", "--rule", "rectgrad:start=-2")
    digits = ["--data", "digits", "--limit", "30"]
    attack = [
        "--attack",
        "ssfgsm:stairs=8,step=0.03",
        "--eps",
        "0.1",
        "--rule",
        "bp",
        "--rule",
        "rectgrad",
        "--curves",
        "6",
    ]
    run("attack", "--model", "cnn", *digits, *attack, "--out", str(tmp_path / "attack"))
    written = json.loads((tmp_path / "attack" / "result.json").read_text())
    assert list(written["numbers"]["rules"]) == ["bp", "rectgrad"]
    assert "stairs 8" in written["settings"]["ssfgsm:stairs=8,step=0.03 at eps 0.1"]
    assert len(written["series"]) == 2
    adversary = [
        "--batch-size",
        "15",
        "--adversary",
        "ssfgsm:eps=0.1,steps=2,stairs=8",
        "--rule",
        "rectgrad",
        "--robust",
        "none",
    ]
    run("train", "--model", "cnn", *digits, *adversary, "--epochs", "1", "--out", str(tmp_path / "run"))
    assert 'adversary = "ssfgsm:eps=0.1' in (tmp_path / "run" / "recipe.toml").read_text()


@pytest.mark.slow
def test_it_can_be_installed(tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    source = tmp_path / "source"
    subprocess.run(["cp", "-r", str(PACKAGE), str(source)], check=True)  # building writes beside the source
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(source)], check=True)
    code = "from backpass import parse_rule; print(type(parse_rule('rectgrad')).__module__)"
    shown = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == "backpass_extras.rectgrad"
