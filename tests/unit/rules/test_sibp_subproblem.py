"""How well one step solves the sub-problem |s(z + A d) - T|^2 + lam |d|^2, T = s(z) - eta g."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass import SIBP
from support.semi_implicit import by_unit, rows

Objective = Callable[[Tensor], Tensor]


def random_layer(seed: int, conv: bool, s: nn.Module, eta: float, **settings: int) -> tuple[Objective, Tensor]:
    """The sub-problem's objective of d (units, columns), and SIBP's d, for a random layer below a random classifier."""
    torch.manual_seed(seed)
    n, units, width = (int(torch.randint(low, high, ())) for low, high in ((4, 40), (2, 20), (4, 40)))
    module = nn.Conv2d(2, units, 3, padding=1) if conv else nn.Linear(width, units)
    model = nn.Sequential(module, s).double()
    x = torch.randn(min(n, 6), 2, 5, 5).double() if conv else torch.randn(n, width).double()
    y = model(x).detach().requires_grad_()
    head = nn.Linear(y[0].numel(), 10).double()
    loss = F.cross_entropy(head(y.flatten(1)), torch.randint(10, (len(x),)), reduction="sum")
    (g,) = torch.autograd.grad(loss, y)
    with SIBP(eta=eta, reduction="sum", **settings).attach(model):
        (model(x) * g).sum().backward()
    A = rows(module, x, 1.0)
    z, target = (by_unit(module, t) for t in (module(x).detach(), y.detach() - eta * g))

    def objective(d: Tensor) -> Tensor:
        return (s(z + A @ d.T) - target).square().sum() + d.square().sum()

    return objective, -torch.cat([module.weight.grad.flatten(1), module.bias.grad[:, None]], 1)


def fletcher_reeves(objective: Objective, d: Tensor, iterations: int) -> Tensor:
    """Nonlinear conjugate gradients with an Armijo line search that halves from 1."""

    def gradient(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(objective(at), at)[0]

    slope = gradient(d)
    direction = -slope
    for _ in range(iterations):
        if (direction * slope).sum() >= 0:
            direction = -slope
        length, descent, now = 1.0, (direction * slope).sum(), objective(d)
        while objective(d + length * direction) > now + 1e-4 * length * descent and length > 1e-12:
            length /= 2
        d = d + length * direction
        before, slope = slope, gradient(d)
        direction = -slope + slope.square().sum() / before.square().sum() * direction
    return d


RELU_AND_TANH = pytest.mark.parametrize("s", [nn.ReLU(), nn.Tanh()], ids=["relu", "tanh"])
LINEAR_AND_CONV = pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])


def against_fletcher_reeves(s: nn.Module, conv: bool, **settings: int) -> Tensor:
    """The objective after SIBP's step over that after five nonlinear iterations, on 50 layers."""
    ratios = []
    for seed in range(50):
        objective, ours = random_layer(seed, conv, s, 0.1, **settings)
        ratios.append(objective(ours) / objective(fletcher_reeves(objective, torch.zeros_like(ours), 5)))
    return torch.stack(ratios)


@LINEAR_AND_CONV
@RELU_AND_TANH
@pytest.mark.parametrize("newton_steps", [1, 2])
def test_the_step_is_never_worse_than_five_nonlinear_iterations(s: nn.Module, conv: bool, newton_steps: int) -> None:
    assert against_fletcher_reeves(s, conv, newton_steps=newton_steps).max() <= 1


@LINEAR_AND_CONV
def test_without_a_correction_kinks_make_a_few_layers_worse(conv: bool) -> None:
    ratios = against_fletcher_reeves(nn.ReLU(), conv, descent_steps=0)
    assert (ratios > 1).any()
    assert (ratios <= 1).double().mean() >= 0.9


@LINEAR_AND_CONV
@pytest.mark.parametrize("eta", [0.1, 10.0])
def test_a_correction_never_raises_a_units_objective(conv: bool, eta: float) -> None:
    moved = 0
    for seed in range(10):
        # The model's first four iterations, then one to four on the sub-problem itself.
        found = []
        for k in range(1, 5):
            objective, ours = random_layer(seed, conv, nn.ReLU(), eta, cg_steps=4 + k, descent_steps=k)
            zero = torch.zeros_like(ours)
            alone = [torch.where(torch.arange(len(ours))[:, None] == j, ours, zero) for j in range(len(ours))]
            found.append(torch.stack([objective(one) for one in alone]))
        for before, after in pairwise(found):
            assert (after <= before * (1 + 1e-12)).all()
            moved += int((after < before * (1 - 1e-9)).sum())
    assert moved


@pytest.mark.parametrize("s", [nn.ReLU(), nn.Tanh(), nn.LeakyReLU()], ids=["relu", "tanh", "leaky"])
@pytest.mark.parametrize("newton_steps", [1, 2])
def test_the_step_lowers_the_objective(s: nn.Module, newton_steps: int) -> None:
    for seed in range(10):
        for conv, eta in ((False, 0.03), (True, 0.3), (False, 1.0)):
            objective, ours = random_layer(seed, conv, s, eta, newton_steps=newton_steps)
            assert objective(ours) < objective(torch.zeros_like(ours)), (seed, conv, eta)


@LINEAR_AND_CONV
@pytest.mark.parametrize("newton_steps", [1, 2])
def test_no_units_objective_rises_however_far_the_targets_lie(conv: bool, newton_steps: int) -> None:
    rises_without = 0
    for seed in range(10):
        for descent_steps in (0, 1):
            settings = {"newton_steps": newton_steps, "descent_steps": descent_steps}
            objective, ours = random_layer(seed, conv, nn.ReLU(), 100.0, **settings)
            zero = torch.zeros_like(ours)
            alone = [torch.where(torch.arange(len(ours))[:, None] == j, ours, zero) for j in range(len(ours))]
            rises = sum(bool(objective(one) > objective(zero) * (1 + 1e-12)) for one in alone)
            assert not (descent_steps and rises), seed
            rises_without += rises
    assert newton_steps > 1 or rises_without


def test_two_newton_steps_lower_the_objective_however_far_the_targets_lie() -> None:
    for seed in range(10):
        objective, ours = random_layer(seed, False, nn.ReLU(), 100.0, newton_steps=2)
        assert objective(ours) < objective(torch.zeros_like(ours)), seed
