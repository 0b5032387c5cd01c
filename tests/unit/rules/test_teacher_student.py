"""The expected gradients of the Gaussian teacher-student model, by Monte Carlo with the rule on a torch module.

With Theta the angle between x and x*: E[g_BP] = d2 d3 / (2 pi) [pi (x - x*) + Theta x* - |x*|/|x| sin(Theta) x] and
E[g_LinBP] = d2 d3 / 2 (x - x*); for one layer the same with d2 d3 = 1 and w in the place of x.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from backpass import LinBP
from backpass.rules import BP

DRAWS = 100_000


class TwoLayers(nn.Module):
    """n independent networks y = V ReLU(W x), one per row of x."""

    def __init__(self, n, d1, d2, d3, generator) -> None:
        super().__init__()
        self.W = torch.randn(n, d2, d1, generator=generator, dtype=torch.float64)
        self.V = torch.randn(n, d3, d2, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.V, torch.relu(torch.bmm(self.W, x.unsqueeze(-1)))).squeeze(-1)


class OneLayer(nn.Module):
    """n independent samples y = ReLU(X w), one row of X and one copy of w each."""

    def __init__(self, n, d, generator) -> None:
        super().__init__()
        self.X = torch.randn(n, d, generator=generator, dtype=torch.float64)

    def forward(self, w: Tensor) -> Tensor:
        return torch.relu((self.X * w).sum(-1, keepdim=True))


def per_draw_gradients(rule, network, x: Tensor, goal: Tensor) -> Tensor:
    """d/dx 1/2 |f(x) - f(goal)|^2 for each draw."""
    x, goal = x.expand(DRAWS, -1).clone().requires_grad_(), goal.expand(DRAWS, -1)
    with rule.attach(network):
        return torch.autograd.grad(0.5 * (network(x) - network(goal).detach()).square().sum(), x)[0]


def expected(rule, x: Tensor, goal: Tensor, factor: float) -> Tensor:
    if isinstance(rule, LinBP):
        return factor / 2 * (x - goal)
    theta = torch.arccos((x @ goal) / (x.norm() * goal.norm()))
    return factor / (2 * math.pi) * (math.pi * (x - goal) + theta * goal - goal.norm() / x.norm() * theta.sin() * x)


def assert_within_four_standard_errors(draws: Tensor, value: Tensor) -> None:
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - value).abs() <= 4 * error).all()
    assert (error < 0.05 * value.norm()).all()  # sharp enough to tell the two rules apart


@pytest.mark.parametrize("rule", [BP(), LinBP()], ids=str)
def test_two_layers(rule):
    generator = torch.Generator().manual_seed(0)
    d1, d2, d3 = 6, 4, 3
    network = TwoLayers(DRAWS, d1, d2, d3, generator)
    goal = 1 + 2 * torch.randn(d1, generator=generator, dtype=torch.float64)
    x = torch.randn(d1, generator=generator, dtype=torch.float64)
    assert_within_four_standard_errors(per_draw_gradients(rule, network, x, goal), expected(rule, x, goal, d2 * d3))


@pytest.mark.parametrize("rule", [BP(), LinBP()], ids=str)
def test_one_layer(rule):
    generator = torch.Generator().manual_seed(1)
    network = OneLayer(DRAWS, 8, generator)
    goal = 1 + 3 * torch.randn(8, generator=generator, dtype=torch.float64)
    w = torch.randn(8, generator=generator, dtype=torch.float64)
    assert_within_four_standard_errors(per_draw_gradients(rule, network, w, goal), expected(rule, w, goal, 1))


def test_linear_training_contracts_the_mean_error_by_one_minus_half_the_rate_per_step():
    generator = torch.Generator().manual_seed(2)
    runs, d, rate = 20_000, 5, 0.05
    goal = 1 + 3 * torch.randn(d, generator=generator, dtype=torch.float64)
    start = torch.randn(d, generator=generator, dtype=torch.float64)
    w = start.expand(runs, d).clone()
    for _ in range(10):
        network = OneLayer(runs, d, generator)
        leaf = w.requires_grad_()
        with LinBP().attach(network):
            loss = 0.5 * (network(leaf) - network(goal.expand(runs, d)).detach()).square().sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        w = (leaf - rate * gradient).detach()
    error = w.std(0) / math.sqrt(runs)
    assert ((w.mean(0) - goal - (1 - rate / 2) ** 10 * (start - goal)).abs() <= 4 * error).all()


def test_lemma_1():
    """E[W^T D(We) V^T V ReLU(Wx)] = d2 d3 / (2 pi) [(pi - Theta) x + |x| sin(Theta) e], Theta = angle(e, x)."""
    generator = torch.Generator().manual_seed(3)
    d1, d2, d3 = 6, 4, 3
    network = TwoLayers(DRAWS, d1, d2, d3, generator)
    x = torch.randn(d1, generator=generator, dtype=torch.float64)
    e = torch.nn.functional.normalize(torch.randn(d1, generator=generator, dtype=torch.float64), dim=0)
    at = e.expand(DRAWS, -1).clone().requires_grad_()
    (draws,) = torch.autograd.grad(network(at), at, network(x.expand(DRAWS, -1)).detach())
    theta = torch.arccos(e @ x / x.norm())
    value = d2 * d3 / (2 * math.pi) * ((math.pi - theta) * x + x.norm() * theta.sin() * e)
    assert_within_four_standard_errors(draws, value)
