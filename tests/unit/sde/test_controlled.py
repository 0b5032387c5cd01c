"""The SDE under a learning-rate schedule against the chain that takes its rates."""

import math

import pytest
import torch

from backpass import BackpassError
from backpass.sde import AdversarialSDE, ControlledSDE, LinearQuadratic, fit_slope, integrate, optimal_lr, run_chain
from support.sde import D, smooth_data, smooth_loss, smooth_theta, squared_loss

ALONE = (torch.tensor([[1.3]], dtype=D), torch.tensor([0.4], dtype=D))  # one sample: no noise


def falling(t):
    return 1 / (1 + 2 * t)


def test_a_constant_control_is_another_learning_rate():
    theta = smooth_theta()
    sde = AdversarialSDE(smooth_loss, smooth_data(), eta_outer=0.2, steps=2, eta_inner=0.1)
    slower = AdversarialSDE(smooth_loss, smooth_data(), eta_outer=0.1, steps=2, eta_inner=0.1)
    at = ControlledSDE(sde, lambda t: 0.5).at(0.0)
    xi = torch.randn(4, 6, dtype=D)
    torch.testing.assert_close(at.drift(theta), slower.drift(theta) / 2)  # in the time of the larger rate
    torch.testing.assert_close(at.noise(theta, xi), slower.noise(theta, xi) / math.sqrt(2))
    index = torch.zeros(4, 1).long()
    torch.testing.assert_close(at.chain_step(theta, index=index), slower.chain_step(theta, index=index))


def test_the_rates_of_the_chain_are_those_in_the_middle_of_its_steps():
    theta = smooth_theta(1)[0]
    sde = AdversarialSDE(smooth_loss, smooth_data(), eta_outer=0.2, steps=2, eta_inner=0.1, batch_size=3)
    found = run_chain(ControlledSDE(sde, falling), theta, 4, generator=torch.Generator().manual_seed(0)).theta
    draws = torch.Generator().manual_seed(0)
    for k in range(4):
        index = torch.randint(6, (3,), generator=draws)
        theta = theta + falling((k + 0.5) * 0.2) * (sde.chain_step(theta, index=index) - theta)
    torch.testing.assert_close(found, theta)


@pytest.mark.parametrize("method", ["predictor_corrector", "derivative_free"])
def test_the_controlled_sde_is_of_order_two(method):
    def distance(eta):
        sde = ControlledSDE(AdversarialSDE(squared_loss, ALONE, eta_outer=eta, steps=2, eta_inner=0.05), falling)
        start = torch.tensor([1.0], dtype=D)
        ours = integrate(sde, start, 0.8, eta / 2, method, coarse=True).theta
        return (ours - run_chain(sde, start, round(0.8 / eta)).theta).abs().item()

    etas = [0.1, 0.05, 0.025]
    assert fit_slope(etas, [distance(eta) for eta in etas]) == pytest.approx(2.0, abs=0.25)


def test_the_optimal_schedule_ends_where_its_equation_says():
    """L = (theta - x)^2 / 2 with x = -1, 1: curvature and noise are 1."""
    data = torch.tensor([[-1.0], [1.0]], dtype=D), torch.zeros(2, dtype=D)
    sde = AdversarialSDE(lambda p, x, y: (p - x)[:, 0].square() / 2, data, eta_outer=0.1, order=1)
    schedule = optimal_lr(curvature=1.0, noise=1.0, eta=0.1, start=0.5, horizon=4.0)
    found = integrate(
        ControlledSDE(sde, schedule.at),
        torch.ones(1, dtype=D),
        4.0,
        paths=8000,
        generator=torch.Generator().manual_seed(0),
    )
    risks = found.theta.square().sum(-1) / 2
    expected = LinearQuadratic(curvature=1.0, noise=1.0, eta=0.1, start=0.5).optimal(4.0)[1]
    assert risks.mean().item() == pytest.approx(expected, abs=4 * risks.std().item() / 8000**0.5)


def test_a_negative_control_is_refused():
    sde = AdversarialSDE(squared_loss, ALONE, eta_outer=0.1)
    with pytest.raises(BackpassError, match=r"u\(0\) = -1"):
        integrate(ControlledSDE(sde, lambda t: -1.0), torch.zeros(1, dtype=D), 0.1)
