"""The trainer takes the steps of a loop written by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import LinBP, ProxProp
from backpass.rules import attachments
from backpass.training import CrossEntropy, Trainer
from backpass.training.batches import epoch_order

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(50) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def by_hand(model: nn.Module, optimizer, change=lambda: None, after=lambda: None, loss=F.cross_entropy) -> nn.Module:
    """Two epochs of batches of 10."""
    for epoch in range(2):
        for rows in epoch_order(50, 0, epoch).split(10):
            optimizer.zero_grad()
            loss(model(X[rows]), Y[rows]).backward()
            change()
            optimizer.step()
            after()
    return model


def by_trainer(model: nn.Module, optimizer, **settings) -> nn.Module:
    Trainer(model, optimizer, (X, Y), **{"epochs": 2, "batch_size": 10, **settings}).fit()
    return model


def assert_equal(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, **{"rtol": 0, "atol": 0, **tolerance}, msg=name)


def pair(make=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)):
    a, b = network(), network()
    return a, make(a.parameters()), b, make(b.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer(optimizer):
    a, of_a, b, of_b = pair(lambda p: optimizer(p, 0.01))
    assert_equal(by_trainer(a, of_a), by_hand(b, of_b))


def test_rules_act_and_are_gone_afterwards():
    a, of_a, b, of_b = pair()
    with LinBP(start=-1).attach(b), ProxProp(tau=0.1).attach(b):
        by_hand(b, of_b)
    by_trainer(a, of_a, rules=(LinBP(start=-1), ProxProp(tau=0.1)))
    assert_equal(a, b)
    assert not attachments(a)
    plain, of_plain, *_ = pair()
    assert not torch.equal(by_trainer(plain, of_plain)[0].weight, a[0].weight)


def test_rules_are_gone_after_an_error_too():
    a, of_a, *_ = pair()
    with pytest.raises(ZeroDivisionError):
        by_trainer(a, of_a, rules=(LinBP(start=-1),), on_progress=lambda progress: 1 / 0)
    assert not attachments(a)


@pytest.mark.parametrize("parts", [2, 3, 10])
@pytest.mark.parametrize("rules", [(), (LinBP(start=-1),), (ProxProp(tau=0.1, solve="step"),)], ids=str)
def test_accumulated_parts_are_the_batch(parts, rules):
    a, of_a, b, of_b = pair()
    by_trainer(a, of_a, accumulate=parts, rules=rules)
    assert_equal(a, by_trainer(b, of_b, rules=rules), atol=1e-12)


def test_clipping():
    a, of_a, b, of_b = pair()
    by_hand(b, of_b, change=lambda: nn.utils.clip_grad_norm_(b.parameters(), 0.1))
    assert_equal(by_trainer(a, of_a, clip_norm=0.1), b)


def test_normalized_gradients():
    a, of_a, b, of_b = pair(lambda p: torch.optim.SGD(p, 0.1))
    lengths = []

    def normalize():
        norm = torch.cat([p.grad.flatten() for p in b.parameters()]).norm()
        for p in b.parameters():
            p.grad /= norm
        lengths.append(float(torch.cat([p.grad.flatten() for p in b.parameters()]).norm()))

    by_hand(b, of_b, change=normalize)
    assert lengths == pytest.approx([1.0] * 10)
    assert_equal(by_trainer(a, of_a, normalize_gradient="model"), b, atol=1e-12)


@pytest.mark.parametrize("when", ["step", "epoch"])
def test_schedulers(when):
    a, of_a, b, of_b = pair(lambda p: torch.optim.SGD(p, 0.1))
    to_a, to_b = (torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (of_a, of_b))
    steps = []

    def after():
        steps.append(1)
        if when == "step" or len(steps) % 5 == 0:
            to_b.step()

    by_hand(b, of_b, after=after)
    assert_equal(by_trainer(a, of_a, scheduler=to_a, step_scheduler=when), b)


def test_averages_are_their_definitions():
    def weights(average: str) -> tuple[list[torch.Tensor], torch.Tensor]:
        model, path = network(), []
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        optimizer.register_step_post_hook(lambda *_: path.append(model[0].weight.detach().clone()))
        trainer = Trainer(model, optimizer, (X, Y), epochs=2, batch_size=10, average=average)
        averaged = trainer.fit().averaged
        assert averaged is not None
        assert torch.equal(model[0].weight, path[-1])
        return path, averaged["0.weight"]

    path, found = weights("ema:0.8")
    expected = path[0]
    for one in path[1:]:
        expected = 0.8 * expected + 0.2 * one
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    path, found = weights("polyak:0.3")
    torch.testing.assert_close(found, torch.stack(path[-3:]).mean(0), rtol=0, atol=1e-12)


def test_label_smoothing_is_that_of_torch():
    a, of_a, b, of_b = pair()
    by_hand(b, of_b, loss=lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1))
    assert_equal(by_trainer(a, of_a, objective=CrossEntropy(label_smoothing=0.1)), b, atol=1e-12)


def test_bf16_autocast_computes_in_bf16():
    seen = []
    model = network().float()
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    result = Trainer(model, optimizer, (X.float(), Y), epochs=3, batch_size=10, dtype=torch.bfloat16).fit()
    assert set(seen[1:]) == {torch.bfloat16}
    assert model[0].weight.dtype == torch.float32
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize("rules", [(), (LinBP(start=-1),), (ProxProp(tau=0.1, solve="step"),)], ids=str)
def test_a_compiled_model_takes_the_same_steps(rules):
    a, of_a, b, of_b = pair()
    by_trainer(a, of_a, compile={"backend": "aot_eager"}, rules=rules, evaluation=(X, Y))
    assert_equal(a, by_trainer(b, of_b, rules=rules), atol=1e-10)


def test_frozen_batch_norm_stays_frozen_and_a_model_in_eval_mode_learns():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    model[1].eval()
    before = copy.deepcopy(model[1].running_mean)
    by_trainer(model, torch.optim.SGD(model.parameters(), 0.1), evaluation=(X, Y))
    assert torch.equal(model[1].running_mean, before)
    assert not model[1].training
    assert model[2].training
    model.eval()
    by_trainer(model, torch.optim.SGD(model.parameters(), 0.1))
    assert not torch.equal(model[1].running_mean, before)


class Measuring(torch.optim.lr_scheduler.ConstantLR):
    """Asks for the objective on halves before every second step."""

    def __init__(self, optimizer, model: nn.Module) -> None:
        super().__init__(optimizer, factor=1.0)
        self.model, self.gaps = model, []

    @property
    def due(self) -> bool:
        return self.last_epoch % 2 == 0

    def measure(self, losses) -> None:
        first, second = losses
        gradients = [torch.autograd.grad(loss(), list(self.model.parameters())) for loss in (first, second, first)]
        halves = [(a + b) / 2 for a, b in zip(*gradients[:2], strict=True)]
        whole = [p.grad for p in self.model.parameters()]
        self.gaps.append(max(float((a - b).abs().max()) for a, b in zip(halves, whole, strict=True)))


def test_a_measuring_scheduler_sees_plain_gradients_of_both_halves():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = Measuring(optimizer, model)
    by_trainer(model, optimizer, scheduler=scheduler, step_scheduler="step")
    assert len(scheduler.gaps) == 5
    assert max(scheduler.gaps) < 1e-12
    by_trainer(model, optimizer, scheduler=scheduler, step_scheduler="step", rules=(LinBP(start=-1),))
    assert max(scheduler.gaps[5:]) > 1e-3  # the step's own gradient is not plain


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_no_trace(training):
    def run(measuring: bool) -> nn.Module:
        model = nn.Sequential(network(), nn.Dropout(0.5), nn.BatchNorm1d(3).double(), nn.Linear(3, 3).double())
        model[2].train(training)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scheduler = Measuring(optimizer, model) if measuring else None
        return by_trainer(model, optimizer, scheduler=scheduler, step_scheduler="step")

    a, b = run(True), run(False)
    assert_equal(a, b)
    assert all(torch.equal(p, q) for p, q in zip(a.buffers(), b.buffers(), strict=True))
