"""A run that diverges is stopped, recorded as diverged, and leaves its last good checkpoint."""

import json
import math

import pytest
import torch
from torch import nn

from backpass.training import PerSample, Trainer
from backpass.training.checkpoint import Checkpoints
from backpass.training.meter import Divergence


def run(rate: float, folder=None, loss=None, **settings):
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    x = torch.randn(40, 4, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    squared = PerSample(loss or (lambda output, y: (output[:, 0] - y).square()))
    settings = {"epochs": 30, "batch_size": 10, "objective": squared, "log_every": 4, **settings}
    return Trainer(model, optimizer, (x, x.sum(1)), folder=folder, **settings).fit()


def test_a_run_that_learns_has_not_diverged():
    assert run(0.1).diverged is None


def test_a_loss_far_above_the_first_is_recorded_and_stops_the_run(tmp_path):
    result = run(2.0, tmp_path)
    assert result.diverged is not None
    assert "more than 10 times" in result.diverged
    assert result.steps < 120
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last == {"kind": "diverged", "step": result.steps, "epoch": 1, "reason": result.diverged}
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "diverged"
    weights = Checkpoints(tmp_path / "checkpoints", 2).load()["model"]
    assert all(bool(torch.isfinite(one).all()) for one in weights.values())


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    calls = []

    def loss(output, y):
        calls.append(1)
        return (output[:, 0] - y).square() * (math.nan if len(calls) == 7 else 1.0)

    result = run(0.1, tmp_path, loss=loss)
    assert result.diverged == "the loss of step 7 is nan"
    assert result.steps == 8
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON


@pytest.mark.parametrize("settings", [{"checkpoint_every": 1, "log_every": 50}, {"log_every": 4, "epochs": 2}])
def test_no_checkpoint_has_weights_that_are_not_finite(settings, tmp_path):
    """The loss of step 6 or of the last step is nan, which a record reports later or never."""
    calls, bad = [], 6 if "checkpoint_every" in settings else 8

    def loss(output, y):
        calls.append(1)
        return (output[:, 0] - y).square() * (math.nan if len(calls) == bad else 1.0)

    assert "not finite" in (run(0.1, tmp_path, loss=loss, **settings).diverged or "") or bad == 8
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        weights = torch.load(path, weights_only=True)["model"].values()
        assert all(bool(torch.isfinite(one).all()) for one in weights)


def test_a_gradient_that_is_not_finite_is_noticed_behind_a_finite_loss():
    calls = []

    def loss(output, y):
        calls.append(1)
        # The derivative of sqrt at 0, in the last step of all.
        return (output[:, 0] * 0).sqrt() if len(calls) == 4 else output[:, 0]

    result = run(0.1, loss=loss, epochs=1)
    assert result.diverged == "the gradient of step 4 is not finite"


def test_only_finite_numbers_are_asked_for_without_a_limit():
    result = run(2.0, diverged_above=None)
    assert result.diverged is None or "is inf" in result.diverged or "is nan" in result.diverged
    assert result.steps > run(2.0).steps


def test_what_far_above_means():
    divergence = Divergence(10.0)
    assert divergence.check([2.0, 30.0, 1.0], 3, 1.0) is None  # in the mean
    assert divergence.check([19.0, 20.0], 5, 1.0) is None
    assert divergence.check([20.0, 20.2], 7, 1.0) is not None
    near_zero = Divergence(10.0)
    assert near_zero.check([1e-4], 1, 1.0) is None
    assert near_zero.check([5.0], 2, 1.0) is None  # below 10 times the floor of 1
    assert near_zero.check([10.5], 3, None) is not None
