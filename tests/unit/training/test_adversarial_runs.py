"""Adversarial training through the trainer: it makes networks robust, by every strategy."""

import json

import pytest
import torch
from torch import nn

from backpass import LinBP
from backpass.attacks import FGSM, PGD, evaluate
from backpass.data import load_digits
from backpass.rules import attachments
from backpass.training import AdversarialTraining, CrossEntropy, RobustEvaluation, Trainer

EPS = 0.15
INNER = PGD(eps=EPS, step=0.05, steps=7)
JUDGE = PGD(eps=EPS, step=0.03, steps=20, restarts=2)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)
    )


def digits():
    data = load_digits()
    return (data.train.x, data.train.y), (data.test.x[:200], data.test.y[:200])


def train(objective, model=None, *, epochs=8, rules=(), **settings):
    model = model or network()
    data, evaluation = digits()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    trainer = Trainer(
        model,
        optimizer,
        data,
        epochs=epochs,
        batch_size=64,
        objective=objective,
        rules=rules,
        evaluation=evaluation,
        **settings,
    )
    return model, trainer


def robust_accuracy(model):
    return evaluate(model.eval(), digits()[1], JUDGE).robust_accuracy


@pytest.fixture(scope="module")
def plainly_trained():
    model, trainer = train(CrossEntropy())
    trainer.fit()
    return robust_accuracy(model)


LIN = LinBP(start=-1)


@pytest.mark.parametrize(
    ("settings", "rules"),
    [({}, ()), ({"trades": 4.0}, ()), ({}, (LIN,)), ({"rule": LIN}, ()), ({"rule": LIN}, (LIN,)), ({"warmup": 2}, ())],
    ids=["pgd", "trades", "strategy 1", "strategy 2", "both strategies", "warmup"],
)
def test_it_makes_a_network_robust(plainly_trained, settings, rules):
    model, trainer = train(AdversarialTraining(INNER, **settings), rules=rules)
    result = trainer.fit()
    assert result.diverged is None
    assert robust_accuracy(model) > plainly_trained + 0.2
    assert result.history[-1]["evaluation"]["accuracy"] > 0.85
    assert 0 < result.history[-1]["adversarial_accuracy"] < 1
    assert attachments(model) == []
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_robust_accuracy_is_recorded_and_the_rules_rest_meanwhile():
    judge = RobustEvaluation(PGD(eps=0.1, step=0.04, steps=4), images=200)
    model, trainer = train(CrossEntropy(), epochs=2, rules=(LinBP(start=0),), robust=judge, robust_every=2)
    history = trainer.fit().history
    assert "robust" not in history[0]
    x, y = digits()[1]
    assert history[1]["robust"] == judge(model.eval(), x, y)
    with LinBP(start=0).attach(model):
        assert history[1]["robust"] != judge(model.eval(), x, y)


def test_catastrophic_overfitting_ends_the_run(tmp_path):
    class Masked(nn.Module):
        """Right on images of the grid and their first steps, at the mercy of every further one."""

        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            on_grid = (x * 16 == (x * 16).round()).flatten(1).all(1)[:, None, None, None]
            return self.inner(torch.where(on_grid, x.detach() - 1e-3 * (x - x.detach()), x))

    judge = RobustEvaluation(JUDGE, images=100, training_attack=FGSM(eps=0.1), stop=True)
    _, trainer = train(CrossEntropy(), Masked(), epochs=6, robust=judge, folder=tmp_path)
    result = trainer.fit()
    assert "catastrophic overfitting" in result.diverged
    assert len(result.history) < 6
    assert result.history[-1]["robust"]["catastrophic_overfitting"] == 1
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "diverged"


@pytest.mark.parametrize("trades", [None, 2.0])
def test_a_run_whose_network_is_no_longer_finite_has_diverged(trades):
    model = network()
    data, evaluation = digits()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), 1e30),
        data,
        epochs=3,
        batch_size=64,
        evaluation=evaluation,
        objective=AdversarialTraining(INNER, trades=trades),
        robust=RobustEvaluation(JUDGE, images=20),
        log_every=500,
    )
    assert "is nan" in trainer.fit().diverged
    assert trainer.robust(model, *evaluation) == {"robust_accuracy": 0.0}
