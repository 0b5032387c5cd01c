"""ControlledLR in a training loop: checkpoints, rules, processes, odd weights, mistakes."""

import copy
import io
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from backpass import BackpassError, LinBP, ProxProp
from backpass.attacks import PGD
from backpass.training.half_batches import half_losses
from backpass.training.learning_rate import ControlledLR
from support.quadratics import normal, quadratic, symmetric


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def train(model, optimizer, scheduler, steps, first=0):
    rates = []
    for k in range(first, first + steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(k))
        y = torch.randint(3, (16,), generator=torch.Generator().manual_seed(k))
        torch.manual_seed(k)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if scheduler.due:
            scheduler.measure(half_losses(model, F.cross_entropy, x, y))
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.5), lambda p: torch.optim.Adam(p, lr=0.05)]
)
def test_a_checkpoint_goes_on_to_the_bit(make):
    model = network()
    optimizer = make(model.parameters())
    scheduler = ControlledLR(optimizer, every=2)
    train(model, optimizer, scheduler, 41)
    file = io.BytesIO()
    torch.save({"m": model.state_dict(), "o": optimizer.state_dict(), "s": scheduler.state_dict()}, file)
    ahead = train(model, optimizer, scheduler, 40, first=41)
    assert scheduler.measurements > 35

    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = network(seed=1)
    optimizer = make(again.parameters())
    scheduler = ControlledLR(optimizer)
    again.load_state_dict(state["m"])
    optimizer.load_state_dict(state["o"])
    scheduler.load_state_dict(state["s"])
    assert train(again, optimizer, scheduler, 40, first=41) == ahead
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_measuring_leaves_no_trace():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ControlledLR(optimizer)
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    F.cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    scheduler.measure(half_losses(model, F.cross_entropy, x, y))
    assert scheduler.measurements == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("rule", [ProxProp(tau=1.0, solve="step"), ProxProp(tau=1.0), LinBP(start=-1)], ids=str)
def test_rules_in_force_neither_change_a_measurement_nor_are_changed_by_it(rule):
    x, y = normal(8, 3), normal(8, 2, seed=1)

    def one_step(*, ruled, measured):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = ControlledLR(optimizer)
        optimizers = {"optimizer": optimizer} if getattr(rule, "solve", "") == "step" else {}
        with rule.attach(model, **optimizers) if ruled else nullcontext():
            F.mse_loss(model(x), y).backward()
            if measured:
                scheduler.measure(half_losses(model, F.mse_loss, x, y))
            optimizer.step()
        return scheduler.measured, model.state_dict()

    measurement, weights = one_step(ruled=True, measured=True)
    assert measurement == one_step(ruled=False, measured=True)[0]
    unmeasured = one_step(ruled=True, measured=False)[1]
    assert all(torch.equal(weights[name], unmeasured[name]) for name in weights)


def test_it_measures_under_no_grad_and_with_frozen_and_unused_weights():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model.append(nn.Identity())
    unused = nn.Linear(2, 2).double()
    model[0].weight.requires_grad_(False)
    x, y = normal(8, 3), normal(8, 2, seed=1)
    scheduler = ControlledLR(torch.optim.SGD([*model.parameters(), *unused.parameters()], lr=0.1))
    fewer = ControlledLR(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    for one in (scheduler, fewer):
        with torch.no_grad():
            one.measure(half_losses(model, F.mse_loss, x, y))
    assert scheduler.measured == pytest.approx(fewer.measured)


def test_a_measurement_that_is_not_finite_changes_nothing():
    theta, losses = quadratic([symmetric(3, 1)] * 2, [normal(3, seed=2)] * 2)
    scheduler = ControlledLR(torch.optim.SGD([theta], lr=0.1))
    scheduler.measure(losses)
    before = scheduler.measured
    scheduler.measure([losses[0], lambda: losses[1]() * float("nan")])
    assert scheduler.measured == before
    assert scheduler.measurements == 1


def test_it_starts_at_the_largest_rate_and_measures_when_due():
    theta = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([theta], lr=0.1)
    scheduler = ControlledLR(optimizer, lr_max=0.7, every=3)
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] == 0.7
    assert math.isnan(scheduler.measured.balance)
    due = []
    for _ in range(7):
        due.append(scheduler.due)
        optimizer.step()
        scheduler.step()
    assert due == [True, False, False, True, False, False, True]


def linear(*devices):
    return SGD([nn.Parameter(torch.ones(2, device=device)) for device in devices], lr=0.1)


ONE, TWO = torch.ones(1, 2), torch.ones(2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ControlledLR("sgd"), "optimizer is one of torch's"),
        (lambda: ControlledLR(linear("cpu", "meta")), "one device"),
        *(
            (lambda name=name, value=value: ControlledLR(linear("cpu"), **{name: value}), name)
            for name, values in (("every", (0, "x")), ("window", (0.0, math.nan)), ("slope", (-1.0, [])))
            for value in values
        ),
        (lambda: ControlledLR(linear("cpu"), lr_max=math.inf), "lr_max"),
        (lambda: ControlledLR(linear("cpu"), frozen_curvature=1), "frozen_curvature must be True or False"),
        (lambda: half_losses(nn.Identity(), F.mse_loss, ONE, ONE), "at least 2 samples"),
        (lambda: half_losses(nn.Identity(), F.mse_loss, None, None), "NoneType"),
        (lambda: half_losses(nn.Identity(), F.mse_loss, TWO, TWO, adversary=PGD(eps=0.1)), "must be an InnerLoop"),
    ],
)
def test_invalid_settings(make, message):
    with pytest.raises(BackpassError, match=message):
        make()


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (None, "two halves of a batch"),
        ([lambda: torch.ones(())], "two halves of a batch.*got 1 losses"),
        ([torch.ones(())] * 2, "two halves of a batch"),
        ([lambda: 1.0] * 2, "must be a scalar.*got float"),
        ([lambda: torch.ones(2)] * 2, "must be a scalar"),
        ([lambda: torch.ones(())] * 2, "has no graph"),
    ],
)
def test_measure_takes_two_functions_with_graph(losses, message):
    with pytest.raises(BackpassError, match=message):
        ControlledLR(linear("cpu")).measure(losses)
