"""Moments of Gaussian regression: against quadrature, the plain recursion, and each other's order."""

import itertools

import numpy as np
import pytest
import torch

from backpass import BackpassError
from backpass.sde import AdversarialSDE
from backpass.sde.moments import GaussianRegression, Moments
from backpass.sde.weak_error import VARIANTS, fit_slope
from support.sde import D


def covariance(d):
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(5), dtype=D)
    return root @ root.T / d + 0.3 * torch.eye(d, dtype=D)


def start(d):
    return Moments.at(torch.linspace(1.0, -0.6, d, dtype=D))


def make(d, **settings):
    return GaussianRegression(covariance=covariance(d), noise=0.4, **{"eta_outer": 0.05, **settings})


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_step_of_the_chain_by_gauss_hermite_quadrature(batch_size):
    """E v' and E v' v'^T over z and the noise, with the adversary run on the target by hand."""
    problem = make(2, batch_size=batch_size, steps=2, eta_inner=0.1)
    points, weights = np.polynomial.hermite_e.hermegauss(8)
    weights = weights / weights.sum()
    root, (v, _) = torch.linalg.cholesky(problem.covariance), start(2)
    mean, square = torch.zeros(2, dtype=D), torch.zeros(2, 2, dtype=D)
    for i, j, k in itertools.product(range(8), repeat=3):
        z = root @ torch.tensor([points[i], points[j]], dtype=D)
        target, delta = 0.4 * points[k], 0.0  # theta* = 0
        for _ in range(2):
            delta += 0.1 * -(v @ z - target - delta)  # d/d delta of the loss at the target + delta
        g = (v @ z - target - delta) * z
        mean += weights[i] * weights[j] * weights[k] * g
        square += weights[i] * weights[j] * weights[k] * g.outer(g)
    spread = (square - mean.outer(mean)) / batch_size
    step = v - 0.05 * mean
    expected = Moments(step, step.outer(step) + 0.05**2 * spread)
    for ours, theirs in zip(problem.chain(start(2), 1), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_many_steps_are_one_step_many_times():
    problem, moments = make(5, steps=2, eta_inner=0.1), start(5)
    for _ in range(12):
        moments = problem.chain(moments, 1)
    for ours, theirs in zip(problem.chain(start(5), 12), moments, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_ode_is_that_of_its_drift_and_noise(variant):
    """Runge-Kutta on dM/dt in matrices, with H from `AdversarialSDE` on data whose second moments are S exactly."""
    d, eta, rho, K = 3, 0.05, 2.0, 2
    problem = make(d, steps=K, eta_inner=rho * eta, batch_size=2)
    S = problem.covariance
    # (theta . z - y)^2 / 2 at the rows of a square root of d S, the targets 0: E z z^T = S.
    rows = torch.linalg.cholesky(d * S).T
    sde = AdversarialSDE(
        lambda theta, y, z: (z @ theta - y).square() / 2,
        (torch.zeros(d, dtype=D), rows),
        eta_outer=eta,
        steps=K,
        eta_inner=rho * eta,
        mode=variant.mode,
        order=variant.order,
    )
    H = -torch.func.jacrev(sde.drift)(torch.zeros(d, dtype=D))
    scale = (1 + rho * eta) ** (2 * K) if variant.mode == "exact" else 1.0
    scale *= eta / 2 if variant.noise else 0.0

    def slope(M):
        return -H @ M - M @ H.T + scale * (S @ M @ S + (S @ M).trace() * S + 0.16 * S)

    M, h = start(d).second, 0.01
    for _ in range(100):
        a = slope(M)
        b = slope(M + h / 2 * a)
        c = slope(M + h / 2 * b)
        M = M + h / 6 * (a + 2 * b + 2 * c + slope(M + h * c))
    ours = problem.sde(start(d), 1.0, mode=variant.mode, order=variant.order, noise=variant.noise)
    torch.testing.assert_close(ours.second, M, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ours.mean, torch.linalg.matrix_exp(-H) @ start(d).mean)


ETAS = [0.005 / 2**k for k in range(4)]


@pytest.mark.parametrize("rho", [1, 3])
@pytest.mark.parametrize("steps", [0, 2, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_weak_orders_in_five_dimensions(name, steps, rho):
    """1 without the terms of order eta, 2 with them, for a linear and two quadratic test functions."""
    variant, weight = VARIANTS[name], torch.diag(torch.arange(1.0, 6, dtype=D))
    errors = []
    for eta in ETAS:
        problem = make(5, batch_size=8, eta_outer=eta, steps=steps, eta_inner=rho * eta)
        chain = problem.chain(start(5), round(1 / eta))
        ours = problem.sde(start(5), 1.0, mode=variant.mode, order=variant.order, noise=variant.noise)
        errors.append(
            [
                (chain.mean - ours.mean).sum().abs().item(),
                (problem.risk(chain) - problem.risk(ours)).abs().item(),
                (weight * (chain.second - ours.second)).sum().abs().item(),
            ]
        )
    for values in zip(*errors, strict=True):
        assert fit_slope(ETAS, values) == pytest.approx(variant.order, abs=0.15), values


def test_bad_settings_are_refused():
    with pytest.raises(BackpassError, match="symmetric, positive definite"):
        GaussianRegression(covariance=-torch.eye(2), noise=0.0, eta_outer=0.1)
    with pytest.raises(BackpassError, match="learning rate, > 0"):
        make(2, eta_outer=0.0)
    with pytest.raises(BackpassError, match="batch_size >= 1"):
        make(2, batch_size=0)
    with pytest.raises(BackpassError, match="unknown mode"):
        make(2).sde(start(2), 1.0, mode="exactly")
