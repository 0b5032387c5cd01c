"""The table of inner loops: the one term that each puts into the drift, in closed form, and what the term leaves out.

Along K steps eta_I -> 0, so the term is of order eta_I and its remainder of order eta_I^2.
"""

import pytest
import torch

from backpass.sde import AdversarialSDE
from backpass.sde.weak_error import fit_slope
from support.sde import D, smooth_data, smooth_loss, smooth_theta

K = 3
DIRECTION = torch.tensor([0.3, -0.2, 0.4], dtype=D)


def linear(delta):
    """R(delta) = <r0, delta>, with a gradient at 0."""
    return delta @ DIRECTION


def curved(delta):
    """The same gradient at 0, and a curvature that the closed form leaves out."""
    return delta @ DIRECTION + delta.square().sum(1) / 2


def huber(length, eta, eps):
    return torch.where(K * eta * length <= eps, K * eta * length.square() / 2, eps * length - eps**2 / (2 * K * eta))


# By name: the settings at eta_I, and the closed form of the term as a function of L_x (N, 3).
TABLE = {
    "gradient": (lambda eta: {}, lambda g, eta: K * eta / 2 * g.square().sum(1)),
    "penalty": (
        lambda eta: {"lam": 0.5, "regulariser": linear},
        lambda g, eta: K * eta / 2 * (g - 0.5 * DIRECTION).square().sum(1),
    ),
    "stiff penalty": (
        lambda eta: {"lam": 0.6 / eta},
        lambda g, eta: (1 - (1 - 0.6) ** K) / (0.6 / eta) / 2 * g.square().sum(1),
    ),
    "sign": (lambda eta: {"inner": "sign"}, lambda g, eta: K * eta * g.abs().sum(1)),
    "sign in a ball": (
        lambda eta: {"inner": "sign", "eps": 2.5 * eta},
        lambda g, eta: min(K * eta, 2.5 * eta) * g.abs().sum(1),
    ),
    "l2 projection": (lambda eta: {"eps": eta}, lambda g, eta: huber(g.norm(dim=1), eta, eta)),
    "unrolled": (lambda eta: {"unrolled": True}, lambda g, eta: K * eta * g.square().sum(1)),
}


def make(eta, settings, mode):
    # The tiny eta_outer leaves the term alone: without it, drift and -grad G differ by 1e-12.
    settings = {"eta_outer": 1e-12, "steps": K, "eta_inner": eta, "mode": mode, **settings}
    return AdversarialSDE(smooth_loss, smooth_data(), **settings)


@pytest.mark.parametrize("name", TABLE)
def test_the_term_is_the_gradient_of_its_closed_form(name):
    settings, potential = TABLE[name]
    theta = smooth_theta(1)[0].requires_grad_()
    x, y = smooth_data()
    x.requires_grad_()
    losses = smooth_loss(theta, x, y)
    (g,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    (clean,) = torch.autograd.grad(losses.mean(), theta, retain_graph=True)
    (term,) = torch.autograd.grad(potential(g, 0.01).mean(), theta)
    drift = make(0.01, settings(0.01), "expanded").drift(theta.detach())
    torch.testing.assert_close(drift, -clean - term, rtol=1e-9, atol=1e-11)


def remainder(name, eta):
    settings, _ = TABLE[name]
    theta = smooth_theta(1)[0]
    exact, expanded = (make(eta, settings(eta), mode).drift(theta) for mode in ("exact", "expanded"))
    return (exact - expanded).norm().item()


@pytest.mark.parametrize("name", TABLE)
def test_what_the_term_leaves_out_is_of_second_order(name):
    etas = [1e-2 / 2**k for k in range(5)]
    errors = [remainder(name, eta) for eta in etas]
    assert fit_slope(etas, errors) == pytest.approx(2.0, abs=0.1), errors


def test_the_penaltys_gradient_at_zero_is_all_that_counts_to_first_order():
    """For R with a curvature the term K eta_I / 2 E|L_x - lam r0|^2 is still right up to eta_I^2."""
    theta = smooth_theta(1)[0]
    etas = [1e-2 / 2**k for k in range(5)]
    errors = []
    for eta in etas:
        exact = make(eta, {"lam": 0.5, "regulariser": curved}, "exact").drift(theta)
        term = make(eta, {"lam": 0.5, "regulariser": linear}, "expanded").drift(theta)
        errors.append((exact - term).norm().item())
    assert fit_slope(etas, errors) == pytest.approx(2.0, abs=0.1), errors


def test_huber_in_both_of_its_branches():
    """The samples of the table's ball must lie on both sides of the kink, or it tests one branch alone."""
    x, y = smooth_data()
    x.requires_grad_()
    (g,) = torch.autograd.grad(smooth_loss(smooth_theta(1)[0], x, y).sum(), x)
    inside = K * g.norm(dim=1) <= 1
    assert inside.any()
    assert not inside.all()


def test_differentiating_through_the_perturbation_doubles_the_term():
    theta = smooth_theta(1)[0]
    clean = make(0.01, {"steps": 0}, "expanded").drift(theta)
    once = make(0.01, {}, "expanded").drift(theta) - clean
    twice = make(0.01, {"unrolled": True}, "expanded").drift(theta) - clean
    torch.testing.assert_close(twice, 2 * once)
