"""Robust accuracy during training, and robustness that is only against the attack it was trained with."""

import pytest
import torch
from torch import nn

from backpass.attacks import FGSM, PGD, evaluate
from backpass.training.robust_evaluation import RobustEvaluation

PGD10 = PGD(eps=0.1, step=0.025, steps=10, restarts=1)


@pytest.fixture
def trained():
    """A linear model of two classes, by the mean of the pixels, with its images."""
    torch.manual_seed(0)
    x = torch.rand(60, 1, 4, 4)
    y = (x.mean((1, 2, 3)) > 0.5).long()
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([-torch.ones(16), torch.ones(16)]))
        model[1].bias.copy_(torch.tensor([8.0, -8.0]))
    return model, x, y


class Masked(nn.Module):
    """Its gradient at a pixel that is a multiple of 1/8 leads nowhere; one step further on it shows."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        on_grid = (x * 8 == (x * 8).round()).flatten(1).all(1)
        hidden = x.detach() - 1e-3 * (x - x.detach())
        return self.model(torch.where(on_grid[:, None, None, None], hidden, x))


def test_it_is_the_accuracy_under_attack_of_the_first_images(trained):
    model, x, y = trained
    got = RobustEvaluation(PGD10, images=40)(model, x, y)
    # A linear model falls exactly where its margin is below eps |w|_1.
    margin = (model(x[:40]) @ torch.tensor([-1.0, 1.0])).abs()
    pixels = x[:40] * torch.ones(1)
    reach = 0.1 * 32
    inside = ((pixels > 0.1) & (pixels < 0.9)).flatten(1).all(1)
    fallen = (margin < reach)[inside]
    report = evaluate(model, (x[:40], y[:40]), PGD10)
    assert got == {"robust_accuracy": report.robust_accuracy}
    assert torch.equal(~report.success[inside], ~fallen)
    assert 0 < got["robust_accuracy"] < 1


def test_bytes_are_taken_as_pixels(trained):
    model, x, y = trained
    raw = (x * 255).round().to(torch.uint8)
    ours, theirs = RobustEvaluation(PGD10)(model, raw, y), RobustEvaluation(PGD10)(model, raw.float() / 255, y)
    assert ours == theirs


def test_robustness_against_the_training_attack_alone_is_catastrophic_overfitting(trained, caplog):
    model, x, y = trained
    x = (x * 8).round() / 8
    y = model(x).argmax(1)
    masked = Masked(model)
    step = FGSM(eps=0.1)
    metrics = RobustEvaluation(PGD10, training_attack=step)(masked, x, y)
    assert metrics["training_attack_accuracy"] > 0.9
    assert metrics["robust_accuracy"] < 0.5 * metrics["training_attack_accuracy"]
    assert metrics["catastrophic_overfitting"] == 1
    assert "catastrophic overfitting" in caplog.text
    assert RobustEvaluation(PGD10, training_attack=step).reason_to_stop(metrics) is None
    assert "Train with more steps" in RobustEvaluation(PGD10, training_attack=step, stop=True).reason_to_stop(metrics)


def test_a_network_equally_weak_under_both_is_not(trained, caplog):
    model, x, y = trained
    judge = RobustEvaluation(PGD10, training_attack=FGSM(eps=0.1), stop=True)
    metrics = judge(model, x, y)
    assert metrics["catastrophic_overfitting"] == 0
    assert judge.reason_to_stop(metrics) is None
    assert not caplog.records


def test_a_network_that_withstands_nothing_yet_has_not_collapsed(trained):
    model, x, y = trained
    metrics = RobustEvaluation(PGD(eps=0.4, step=0.1, steps=10), training_attack=FGSM(eps=0.15))(model, x, y)
    assert 0 < metrics["training_attack_accuracy"] < 0.2
    assert metrics["robust_accuracy"] == 0
    assert metrics["catastrophic_overfitting"] == 0
