"""The slope of an expectation along the SDE."""

import torch

from backpass.sde import AdversarialSDE
from backpass.sde.generator import generator
from support.sde import D, smooth_data, smooth_loss, smooth_theta

LINEAR = torch.tensor([0.4, -1.0, 0.3], dtype=D)


def make(**settings):
    return AdversarialSDE(smooth_loss, smooth_data(), eta_outer=0.3, steps=2, eta_inner=0.1, **settings)


def test_of_a_linear_function_it_is_the_drift_and_of_a_square_the_noise_too():
    sde, theta = make(), smooth_theta()
    torch.testing.assert_close(generator(sde, lambda p: p @ LINEAR, theta), sde.drift(theta) @ LINEAR)
    square = generator(sde, lambda p: p @ p, theta)
    noise = 0.3 * sde.covariance(theta).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(square, 2 * (theta * sde.drift(theta)).sum(1) + noise)


def test_over_a_short_time_expectations_move_by_it():
    """E f after a short Euler step, over directions that stand for the normal noise: f(0) + t A f + O(t^2)."""
    sde, theta, t = make(), smooth_theta(1)[0], 1e-4

    def f(p):
        return (p @ LINEAR).sin() + p.square().sum(-1)

    # All 2 N signed directions sqrt(N) e_i have the mean and the covariance of the normal xi.
    xi = torch.eye(sde.noise_dim, dtype=D) * sde.noise_dim**0.5
    xi = torch.cat([xi, -xi])
    ends = theta + t * sde.drift(theta) + t**0.5 * sde.noise(theta.expand(len(xi), -1), xi)
    slope = (f(ends).mean() - f(theta)) / t
    torch.testing.assert_close(generator(sde, f, theta), slope, rtol=2e-3, atol=2e-3)


def test_a_single_point_and_many_agree():
    sde, theta = make(), smooth_theta()
    together = generator(sde, lambda p: p.square().sum(), theta)

    torch.testing.assert_close(together[1], generator(sde, lambda p: p.square().sum(), theta[1]))
