"""ControlledLR against dense matrices, a slow transcription of its rule, and the optimal control."""

import copy
import io
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import BackpassError, LinBP, ProxProp
from backpass.sde import optimal_lr
from backpass.training.half_batches import half_losses
from backpass.training.learning_rate import ControlledLR
from support.processes import in_processes

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def quadratic(matrix, gradients):
    """Two losses theta A_i theta / 2 + c_i . theta, i = 1, 2."""
    theta = nn.Parameter(normal(len(matrix[0]), seed=9))
    return theta, [lambda A=A, c=c: theta @ A @ theta / 2 + c @ theta for A, c in zip(matrix, gradients, strict=True)]


def symmetric(n, seed):
    m = normal(n, n, seed=seed)
    return m @ m.mT / n


def test_a_measurement_is_what_dense_matrices_give():
    A, B, c, d = symmetric(5, 1), symmetric(5, 2), normal(5, seed=3), normal(5, seed=4)
    theta, losses = quadratic([A, B], [c, d])
    scheduler = ControlledLR(torch.optim.SGD([theta], lr=0.1))
    scheduler.measure(losses)
    at = theta.detach()
    g1, g2 = A @ at + c, B @ at + d
    g = (g1 + g2) / 2
    found = scheduler.measured
    assert found.progress == pytest.approx(float(g1 @ g2))
    curvature = float(g @ B @ g1 / (g @ g))
    loss = (float(g1 @ B @ g1) + curvature * max(float(g1 @ g2), 0)) / 2
    assert found.curvature == pytest.approx(curvature)
    assert found.loss == pytest.approx(loss)
    assert found.balance == pytest.approx(float(g1 @ g2) / (0.1 * loss))


def test_in_the_mean_it_measures_the_gradient_and_the_curvature_of_the_population():
    """Linear regression in 40 dimensions with batches of 8: a batch's own curvature would be far too large."""
    size, batch = 40, 8
    theta = nn.Parameter(torch.full((size,), 0.2, dtype=F64))
    scheduler = ControlledLR(torch.optim.SGD([theta], lr=1e-9), window=1.0)
    generator = torch.Generator().manual_seed(0)
    own = []
    for _ in range(3000):  # the targets are noise alone
        x = torch.randn(batch, size, generator=generator, dtype=F64)
        y = torch.randn(batch, generator=generator, dtype=F64)
        scheduler.measure(
            [lambda x=u, y=v: (x @ theta - y).square().mean() / 2 for u, v in zip(x.split(4), y.split(4), strict=True)]
        )
        g = (x @ theta.detach() - y) @ x / batch
        own.append(float((x @ g).square().mean()))
    at = theta.detach()
    square = float(at @ at)  # H = I; Cov of one sample's gradient is (|theta|^2 + 1) I + theta theta^T
    loss = square + (size * (square + 1) + square) / batch
    assert scheduler.measured.progress == pytest.approx(square, rel=0.1)
    assert scheduler.measured.loss == pytest.approx(loss, rel=0.05)
    assert scheduler.measured.curvature == pytest.approx(1, rel=0.1)
    assert sum(own) / len(own) > 4 * loss


def test_momentum_counts_as_the_rate_that_it_makes():
    theta, losses = quadratic([symmetric(3, 1)] * 2, [normal(3, seed=2)] * 2)
    balances = []
    for momentum in (0.0, 0.9):
        scheduler = ControlledLR(torch.optim.SGD([theta], lr=0.01, momentum=momentum))
        scheduler.measure(losses)
        balances.append(scheduler.measured.balance)
    assert balances[0] / balances[1] == pytest.approx(10)


def test_groups_with_rates_of_their_own_are_measured_in_the_metric_of_their_steps():
    A, c = symmetric(4, 1), normal(4, seed=2)
    theta = [nn.Parameter(normal(2, seed=5)), nn.Parameter(normal(2, seed=6))]
    optimizer = torch.optim.SGD([{"params": theta[:1], "lr": 0.2}, {"params": theta[1:], "lr": 0.05}])

    def loss():
        at = torch.cat(theta)
        return at @ A @ at / 2 + c @ at

    scheduler = ControlledLR(optimizer)
    scheduler.measure([loss, loss])
    W = torch.diag(torch.tensor([1.0, 1.0, 0.25, 0.25], dtype=F64))
    g = A @ torch.cat(theta).detach() + c
    assert scheduler.measured.progress == pytest.approx(float(g @ W @ g))
    assert scheduler.measured.loss == pytest.approx(float(g @ W @ A @ W @ g))
    assert scheduler.measured.balance == pytest.approx(float(g @ W @ g / (0.2 * g @ W @ A @ W @ g)))
    assert scheduler.measured.curvature == pytest.approx(float(g @ W @ A @ W @ g / (g @ W @ g)))


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_adaptive_optimizers_are_measured_in_the_metric_of_their_steps(make):
    A, c = symmetric(4, 1), normal(4, seed=2)
    theta, losses = quadratic([A, A], [c, c])
    optimizer = make([theta], lr=0.01, **({} if make is torch.optim.RMSprop else {"betas": (0.0, 0.99)}))
    scheduler = ControlledLR(optimizer)
    scheduler.measure(losses)
    assert scheduler.measurements == 0  # the scales come with the first step
    for _ in range(3):
        optimizer.zero_grad()
        losses[0]().backward()
        optimizer.step()
    scheduler.measure(losses)
    before, g = theta.detach().clone(), A @ theta.detach() + c
    metric = copy.deepcopy(optimizer.state_dict()["state"][0])
    decay = optimizer.param_groups[0].get("betas", (0, None))[1]
    squares = metric["square_avg"] if decay is None else metric["exp_avg_sq"] / (1 - decay ** float(metric["step"]))
    W = torch.diag(1 / (squares.sqrt() + 1e-8))
    assert scheduler.measured.progress == pytest.approx(float(g @ W @ g))
    assert scheduler.measured.loss == pytest.approx(float(g @ W @ A @ W @ g))
    assert torch.equal(theta, before)


def transcribed(streams, lr, *, every, window, threshold, slope):
    """The rule, written down for one parameter: lists and loops."""
    N = spread = gradient = product = 0.0
    rates, n, inverse = [], 0, 1 / lr
    for k, (g1, g2, curvature) in enumerate(streams):
        if k % every == 0:
            n += 1
            part = 1 / n if n <= max(10, n * window) else 1 / max(10, n * window)
            g = (g1 + g2) / 2
            N += part * (g1 * g2 - N)
            spread += part * (g1 * curvature * g1 - spread)
            gradient += part * (g - gradient)
            product += part * (curvature * g1 - product)
            a = product / gradient
            if n >= 10 and threshold * (spread + a * max(N, 0)) / 2 / inverse > N:
                inverse += every * slope * max(a, 0)
        rates.append(1 / inverse)
    return rates


@pytest.mark.parametrize("every", [1, 3])
def test_the_rule_is_the_one_that_is_written_down(every):
    settings = {"every": every, "window": 0.2, "threshold": 0.8, "slope": 0.5}
    theta = nn.Parameter(torch.zeros(1, dtype=F64))
    optimizer = torch.optim.SGD([theta], lr=0.5)
    scheduler = ControlledLR(optimizer, **settings)
    g1, g2, curvature = normal(200, seed=1), normal(200, seed=2), normal(200, seed=3).abs()
    rates = []
    for a, b, c in zip(g1, g2, curvature, strict=True):
        if scheduler.due:
            scheduler.measure(
                [
                    lambda a=a, c=c: (a * theta + c * theta**2 / 2).sum(),
                    lambda b=b, c=c: (b * theta + c * theta**2 / 2).sum(),
                ]
            )
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    streams = list(zip(g1.tolist(), g2.tolist(), curvature.tolist(), strict=True))
    assert rates == pytest.approx(transcribed(streams, 0.5, **settings), rel=1e-9)
    assert rates[-1] < 0.1


def noisy_descent(start_rate=0.1, *, steps=2000, size=30, runs=6, **settings):
    """Mean excess risk per parameter where all have curvature 1 and noise 1, and its standard error."""
    generator = torch.Generator().manual_seed(0)
    risks = []
    for _ in range(runs):
        theta = nn.Parameter(torch.ones(size))
        optimizer = torch.optim.SGD([theta], lr=start_rate)
        scheduler = ControlledLR(optimizer, **settings)
        for noise in torch.randn(steps, 2, size, generator=generator) * math.sqrt(2):
            scheduler.measure([lambda e=e, theta=theta: theta @ theta / 2 + e @ theta for e in noise])
            theta.grad = theta.detach() + noise.mean(0)
            optimizer.step()
            scheduler.step()
        risks.append(float(theta.detach().square().mean()) / 2)
    values = torch.tensor(risks)
    return float(values.mean()), float(values.std()) / runs**0.5


BEST = optimal_lr(curvature=1.0, noise=1.0, eta=0.1, start=0.5, horizon=200.0)


def test_with_slope_and_threshold_one_it_comes_near_the_optimal_control_of_equal_curvatures():
    risk, error = noisy_descent(slope=1.0, threshold=1.0)
    assert BEST.value - 2 * error < risk < 1.3 * BEST.value + 2 * error


def test_as_it_is_it_pays_the_price_of_its_caution():
    """Where noise hides N it acts in every other step, so its slope is between 1/4 and 1/2 of the curvature."""
    risk, error = noisy_descent()
    dearest, cheapest = (1 / (c * (2 - c)) for c in (0.25, 0.5))
    assert cheapest * BEST.value - 2 * error < risk < dearest * BEST.value + 2 * error


def test_it_beats_the_best_of_ten_fixed_rates_where_curvatures_differ():
    size, batch, steps = 20, 8, 2000
    scales = torch.arange(1, size + 1).pow(-0.25)  # of the inputs; curvatures fall as k^-1/2
    target = torch.randn(size, generator=torch.Generator().manual_seed(1)) / size**0.5

    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            x = torch.randn(batch, size, generator=generator) * scales
            yield x, x @ target + 0.5 * torch.randn(batch, generator=generator)

    def excess(theta):
        return ((theta - target) * scales).square().sum(-1) / 2

    rates = 0.3 * 0.5 ** torch.arange(10)
    fixed, ours = torch.zeros(10), 0.0
    for seed in range(3):
        grid = torch.zeros(10, size)
        theta = nn.Parameter(torch.zeros(size))
        optimizer = torch.optim.SGD([theta], lr=float(rates[0]))
        scheduler = ControlledLR(optimizer, every=4)
        for x, y in batches(seed):
            grid -= rates[:, None] * ((grid @ x.mT - y) @ x) / batch
            if scheduler.due:
                scheduler.measure(
                    [
                        lambda x=u, y=v, theta=theta: (x @ theta - y).square().mean() / 2
                        for u, v in zip(x.split(batch // 2), y.split(batch // 2), strict=True)
                    ]
                )
            theta.grad = (x @ theta.detach() - y) @ x / batch
            optimizer.step()
            scheduler.step()
        fixed += excess(grid)
        ours += float(excess(theta.detach()))
    assert ours < 0.8 * float(fixed.min())


def test_it_holds_the_rate_while_it_pays():
    A = torch.diag(torch.tensor([1.0, 0.01], dtype=F64))
    theta, losses = quadratic([A, A], [torch.zeros(2, dtype=F64)] * 2)
    optimizer = torch.optim.SGD([theta], lr=0.5)
    scheduler = ControlledLR(optimizer)
    for _ in range(200):  # no noise: it always pays
        scheduler.measure(losses)
        optimizer.zero_grad()
        losses[0]().backward()
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


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


@pytest.mark.parametrize("rule", [ProxProp(tau=1.0, union=True), ProxProp(tau=1.0), LinBP(start=-1)], ids=str)
def test_rules_in_force_neither_change_a_measurement_nor_are_changed_by_it(rule):
    x, y = normal(8, 3), normal(8, 2, seed=1)

    def one_step(*, ruled, measured):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = ControlledLR(optimizer)
        optimizers = {"optimizer": optimizer} if getattr(rule, "union", False) else {}
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


def measured_in_process(rank, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = normal(16, 3), normal(16, 1, seed=1)
    each = 8 // size  # every process has its part of both halves
    rows = torch.cat([torch.arange(rank * each, (rank + 1) * each) + half for half in (0, 8)])
    scheduler = ControlledLR(torch.optim.SGD(model.parameters(), lr=0.5))
    for _ in range(12):
        scheduler.measure(half_losses(model, F.mse_loss, x[rows], y[rows]))
    return [*scheduler.measured, scheduler.inverse]


def test_two_processes_measure_what_one_does():
    alone = measured_in_process(0, 1)
    for found in in_processes(2, measured_in_process, 2):
        assert found == pytest.approx(alone, rel=1e-9)


def test_mistakes_are_named():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    for setting, says in (
        ({"every": 0}, "whole number of steps"),
        ({"window": 0.0}, "part of all measurements"),
        ({"slope": -1.0}, "slope is a finite number above 0"),
        ({"lr_max": math.inf}, "lr_max"),
    ):
        with pytest.raises(BackpassError, match=says):
            ControlledLR(optimizer, **setting)
    scheduler = ControlledLR(optimizer)
    with pytest.raises(BackpassError, match="two halves of a batch.*got 1 losses"):
        scheduler.measure([lambda: torch.ones(())])
    theta = optimizer.param_groups[0]["params"][0]
    with pytest.raises(BackpassError, match="a scalar"):
        scheduler.measure([lambda: theta * 2, lambda: theta * 2])
    with pytest.raises(BackpassError, match="at least 2 samples"):
        half_losses(nn.Identity(), F.mse_loss, torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(BackpassError, match="one device"):
        ControlledLR(torch.optim.SGD([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))], lr=0.1))
