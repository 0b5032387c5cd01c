"""Evaluation sees the model in eval mode, counts right, and leaves it as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import LinBP
from backpass.training import CrossEntropy, Evaluated, Trainer

X, Y = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def train(model: nn.Module, data=(X, Y), **settings):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return Trainer(model, optimizer, data, **{"epochs": 3, "batch_size": 8, **settings}).fit()


def test_loss_and_accuracy_are_those_of_the_model_in_eval_mode():
    model = network()
    record = train(model, evaluation=(X[:21], Y[:21])).history[-1]["evaluation"]
    model.eval()
    output = model(X[:21]).detach()
    assert record["loss"] == pytest.approx(float(F.cross_entropy(output, Y[:21])), abs=1e-6)
    assert record["accuracy"] == float((output.argmax(1) == Y[:21]).double().mean())


def test_evaluation_leaves_no_trace():
    a, b = network(), network()
    train(a, evaluation=(X, Y), robust=lambda model, x, y: {"loss": float(model(x).detach().sum())})
    train(b)
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert a.training
    assert a[1].training


def test_the_record_of_an_epoch_is_the_mean_of_what_was_met():
    seen = []
    model = nn.Linear(6, 3)

    class Recording:
        def __call__(self, model, batch, plain):
            output = model(batch.x)
            losses, right = CrossEntropy().losses(output, batch.y), output.argmax(1) == batch.y
            seen.append((losses.tolist(), right.tolist()))
            return Evaluated(loss=losses.mean(), correct=right)

    result = train(model, objective=Recording(), epochs=2, drop_last=False, log_every=2)
    for epoch, record in enumerate(result.history):
        losses, right = zip(*seen[7 * epoch : 7 * epoch + 7], strict=True)
        assert record["loss"] == pytest.approx(sum(map(sum, losses)) / 50, abs=1e-6)
        assert record["accuracy"] == sum(map(sum, right)) / 50


def test_rules_are_suspended():
    def gradient(model: nn.Module, x) -> torch.Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(model(x).sum(), x)[0]

    def robust(model, x, y):
        plain = network().eval()
        plain.load_state_dict(model.state_dict())
        return {"images": len(x), "plain": torch.equal(gradient(model, x), gradient(plain, x))}

    result = train(network(), rules=(LinBP(start=-1),), evaluation=(X, Y), robust=robust)
    assert [record["robust"] for record in result.history] == [{"images": 50.0, "plain": 1.0}] * 3


def test_how_often():
    model = network()
    history = train(model, evaluation=(X, Y), epochs=5, evaluate_every=2, robust=lambda *_: {}, robust_every=3).history
    assert [record["epoch"] for record in history if "evaluation" in record] == [2, 4, 5]
    assert [record["epoch"] for record in history if "robust" in record] == [3, 5]


def test_averaged_weights_are_evaluated_beside_the_models_own():
    model = network()
    result = train(model, evaluation=(X, Y), average="polyak:0.5", epochs=4)
    own = copy.deepcopy(model).eval()
    assert [("averaged" in record) for record in result.history] == [False, False, True, True]
    own.load_state_dict(result.averaged)
    expected = float(F.cross_entropy(own(X), Y).detach())
    assert result.history[-1]["averaged"]["loss"] == pytest.approx(expected, abs=1e-6)
    assert result.history[-1]["evaluation"]["loss"] != result.history[-1]["averaged"]["loss"]


def test_uint8_images_and_a_preparation_of_ones_own():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.randint(0, 256, (12, 1, 2, 2), dtype=torch.uint8), torch.arange(12) % 3
    record = train(model, (x, y), evaluation=(x, y)).history[-1]["evaluation"]
    assert record["loss"] == pytest.approx(float(F.cross_entropy(model(x / 255), y).detach()), abs=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)
    settings = {"epochs": 1, "batch_size": 4, "evaluation": (x, y)}
    trainer = Trainer(
        model, optimizer, (x, y), prepare_evaluation=lambda x: x.float(), prepare=lambda x, batch: x.float(), **settings
    )
    record = trainer.fit().history[-1]["evaluation"]
    assert record["loss"] == pytest.approx(float(F.cross_entropy(model(x.float()), y).detach()), rel=1e-4)
