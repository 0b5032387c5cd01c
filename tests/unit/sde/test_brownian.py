"""Brownian paths: refinement keeps them, their law is right, and integrations share them."""

from itertools import pairwise

import pytest
import torch

from backpass import BackpassError
from backpass.sde import AdversarialSDE, BrownianPath, ItoSDE, integrate
from support.sde import D, smooth_data, smooth_loss, smooth_theta

GEOMETRIC = ItoSDE(lambda x: 0.3 * x, lambda x, xi: 0.5 * x * xi, noise_dim=1)


def test_halved_steps_sum_to_the_path():
    path = BrownianPath(2.0, steps=3, shape=(5, 2), seed=4, dtype=D)
    grids = [torch.stack(list(path.increments(3 * 2**k))) for k in range(5)]
    for coarse, fine in pairwise(grids):
        torch.testing.assert_close(coarse, fine[0::2] + fine[1::2])
    assert torch.equal(grids[2], torch.stack(list(path.increments(12))))


@pytest.mark.parametrize("steps", [2, 16])
def test_increments_are_independent_normals_of_variance_dt(steps):
    path = BrownianPath(2.0, steps=2, shape=(40_000, 1), dtype=D)
    increments = torch.stack(list(path.increments(steps)))[..., 0]
    torch.testing.assert_close(increments.cov(), torch.eye(steps, dtype=D) * 2 / steps, rtol=0.05, atol=0.08 / steps)


def test_halving_dt_follows_the_same_path():
    """Geometric Brownian motion has x exp((a - b^2/2) t + b W) for every path."""
    path = BrownianPath(1.0, steps=1, shape=(200, 1), dtype=D)
    start = torch.ones(200, 1, dtype=D)
    (whole,) = path.increments(1)
    exact = ((0.3 - 0.125) + 0.5 * whole).exp()
    errors = [
        (integrate(GEOMETRIC, start, 1.0, dt, "euler_maruyama", brownian=path).theta - exact).square().mean().sqrt()
        for dt in (2**-4, 2**-6, 2**-8)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.3)  # strong order 1/2
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.3)


def test_two_sdes_share_a_path():
    theta = smooth_theta()
    sdes = [
        AdversarialSDE(smooth_loss, smooth_data(), eta_outer=0.1, steps=2, eta_inner=eta) for eta in (0.05, 0.050001)
    ]
    path = BrownianPath(0.4, steps=1, shape=(4, 6), dtype=D)
    ends = [integrate(sde, theta, 0.4, brownian=path).theta for sde in sdes]
    assert (ends[0] - ends[1]).abs().max() < 1e-4
    other = BrownianPath(0.4, steps=1, shape=(4, 6), dtype=D, seed=1)
    assert (integrate(sdes[0], theta, 0.4, brownian=other).theta - ends[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BrownianPath(0.0, steps=1, shape=(1,)), "finite number > 0"),
        (lambda: BrownianPath(1.0, steps=0, shape=(1,)), "integer >= 1"),
        (lambda: BrownianPath(1.0, steps=1, shape=(1, 2, 3)), "noise_dim"),
        (lambda: list(BrownianPath(1.0, steps=3, shape=(1,)).increments(9)), "power of 2"),
        (
            lambda: integrate(GEOMETRIC, torch.ones(1), 1.0, 0.1, brownian=BrownianPath(1.0, steps=1, shape=(2,))),
            "shap",
        ),
        (
            lambda: integrate(GEOMETRIC, torch.ones(1), 1.0, 0.1, brownian=BrownianPath(2.0, steps=1, shape=(1,))),
            "ends",
        ),
    ],
)
def test_bad_input_is_refused_with_a_reason(call, message):
    with pytest.raises(BackpassError, match=message):
        call()
