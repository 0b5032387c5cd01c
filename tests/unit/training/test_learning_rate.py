"""ControlledLR against dense matrices, a slow transcription of its rule, and the optimal control."""

import copy
import math

import pytest
import torch
from torch import nn

from backpass.sde import optimal_lr
from backpass.training.learning_rate import ControlledLR
from support.quadratics import F64, normal, quadratic, symmetric


def test_two_measurements_are_what_dense_matrices_give():
    A, B, c, d = symmetric(5, 1), symmetric(5, 2), normal(5, seed=3), normal(5, seed=4)
    theta, losses = quadratic([A, B], [c, d])
    scheduler = ControlledLR(torch.optim.SGD([theta], lr=0.1))
    scheduler.measure(losses)
    start, move = theta.detach().clone(), normal(5, seed=5)
    assert (scheduler.measured.curvature, scheduler.measured.progress) == (
        0.0,
        pytest.approx(float((A @ start + c) @ (B @ start + d))),
    )
    with torch.no_grad():
        theta += move
    scheduler.measure(losses)
    progress = spread = 0.0
    for at, sign in ((start, 0), (start + move, -1)):
        g1, g2 = A @ at + c, B @ at + d
        scale = sign * float(g1.norm() / move.norm())
        product = B @ (g1 + scale * move)
        progress, spread = progress + float(g1 @ g2) / 2, spread + float(g1 @ product) / 2
    curvature = float(move @ product) / scale / float(move @ move)
    loss = (spread + curvature * max(progress, 0)) / 2
    found = scheduler.measured
    assert (found.progress, found.curvature, found.loss) == pytest.approx((progress, curvature, loss))
    assert found.balance == pytest.approx(progress / (0.1 * loss))


def test_in_the_mean_it_measures_the_gradient_and_the_curvature_of_the_population():
    """Linear regression in 40 dimensions with batches of 8: a batch's own curvature would be far too large."""
    size, batch = 40, 8
    theta = nn.Parameter(torch.full((size,), 0.2, dtype=F64))
    scheduler = ControlledLR(torch.optim.SGD([theta], lr=1e-9), window=1.0)
    generator = torch.Generator().manual_seed(0)
    own = []
    for shift in 1e-4 * normal(3000, size, seed=1):  # the targets are noise alone
        theta.data = 0.2 + shift
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
    assert scheduler.measured.loss == pytest.approx(float(g @ W @ A @ W @ g) / 2)  # no curvature yet
    move = normal(4, seed=7)
    with torch.no_grad():
        for part, step in zip(theta, move.split(2), strict=True):
            part += step
    scheduler.measure([loss, loss])
    g = g + A @ move
    scale = float((W @ g).norm() / move.norm())
    along = move @ A @ (move - W @ g / scale)
    assert scheduler.measured.curvature == pytest.approx(float(along / (move @ W.inverse() @ move)))


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
    assert scheduler.measured.loss == pytest.approx(float(g @ W @ A @ W @ g) / 2)  # no curvature yet
    assert torch.equal(theta, before)


def transcribed(streams, lr, *, every, window, slope):
    """The rule, written down for one parameter: loops."""
    N = spread = along = length = average = 0.0
    rates, n, inverse, shortest = [], 0, 1 / lr, max(10, 30 / every)
    for k, (theta, a, b, c) in enumerate(streams):
        if k % every == 0:
            n += 1
            part = 1 / n if n <= max(shortest, n * window) else 1 / max(shortest, n * window)
            average = theta if n == 1 else average
            g1, g2, d = a + c * theta, b + c * theta, theta - average
            scale = (-1) ** (n - 1) * abs(g1 / d) if d else 0.0
            product = c * (g1 + scale * d)
            N += part * (g1 * g2 - N)
            spread += part * (g1 * product - spread)
            if scale:
                along += part * (d * product / scale - along)
                length += part * (d * d - length)
            average += part * (theta - average)
            curvature = along / length if length else 0.0
            D = (spread + curvature * max(N, 0)) / 2
            if n >= shortest and D > 0:
                inverse += every * slope * min(max(2 - N * inverse / D, 0), 2) * max(curvature, 0)
        rates.append(1 / inverse)
    return rates


@pytest.mark.parametrize("every", [1, 3])
def test_the_rule_is_the_one_that_is_written_down(every):
    settings = {"every": every, "window": 0.2, "slope": 0.5}
    theta = nn.Parameter(torch.zeros(1, dtype=F64))
    optimizer = torch.optim.SGD([theta], lr=0.5)
    scheduler = ControlledLR(optimizer, **settings)
    columns = [*(normal(200, seed=seed) for seed in (0, 1, 2)), normal(200, seed=3).abs()]
    streams = torch.stack(columns, 1).tolist()
    rates = []
    for at, *slopes, c in streams:
        theta.data.fill_(at)
        if scheduler.due:
            scheduler.measure([lambda a=a, c=c: (a * theta + c * theta**2 / 2).sum() for a in slopes])
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(transcribed(streams, 0.5, **settings), rel=1e-9)
    assert rates[-1] < 0.5 == rates[0]


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


@pytest.mark.parametrize("slope", [1.0, 0.5])
def test_where_curvatures_are_equal_it_pays_the_price_of_its_slope(slope):
    """The inverse rate grows by c = slope (2 - q) of the curvature with q = 1 / (2 - c): 1 and .63."""
    c = 1 + slope - math.sqrt((1 + slope) ** 2 - 3 * slope)
    risk, error = noisy_descent(slope=slope)
    assert BEST.value - 2 * error < risk < 1.15 / (c * (2 - c)) * BEST.value + 2 * error


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
