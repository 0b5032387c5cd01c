"""Fluctuation and dissipation, and the test of stationarity, on laws and trajectories that are known."""

import pytest
import torch

from backpass import BackpassError
from backpass.sde import AdversarialSDE, integrate, run_chain
from backpass.sde.long_run import stationary
from backpass.sde.stationarity import fluctuation_dissipation, stationarity_test

F64 = torch.float64
A = torch.tensor([[1.0, 0.3], [0.3, 0.6]], dtype=F64)


def linear_sde(eta=0.1):
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    return AdversarialSDE(
        lambda theta, x, y: (theta * (A @ theta)).sum() / 2 - x @ theta, (x, x[:, 0]), eta_outer=eta, batch_size=2
    )


def tanh_sde():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 2, generator=generator, dtype=F64), torch.rand(12, generator=generator, dtype=F64)
    return AdversarialSDE(
        lambda theta, x, y: (torch.tanh(x @ theta) - y).square() / 2, (x, y), eta_outer=0.1, steps=2, eta_inner=0.1
    )


def sigma_points(mean, covariance):
    """Points whose mean and covariance are exactly these."""
    root = torch.linalg.cholesky(covariance * len(mean)).mT
    return torch.cat([mean + root, mean - root])


@pytest.mark.parametrize("law", ["chain", "sde"])
def test_the_linear_case_balances_to_six_digits(law):
    sde = linear_sde()
    found = stationary(sde, torch.zeros(2, dtype=F64))
    points = sigma_points(found.mean, found.chain_covariance if law == "chain" else found.covariance)
    assert abs(fluctuation_dissipation(sde, points, law=law).gap) < 1e-6
    assert abs(fluctuation_dissipation(sde, points, law=law, centre=torch.zeros(2, dtype=F64)).gap) < 1e-6
    wrong = sigma_points(found.mean, 1.2 * found.covariance)
    assert fluctuation_dissipation(sde, wrong, law=law).gap > 0.05


def test_the_chain_balances_on_a_trajectory():
    sde = tanh_sde()
    theta = stationary(sde, torch.zeros(2, dtype=F64)).theta
    generator = torch.Generator().manual_seed(2)
    settled = run_chain(sde, theta, 500, paths=400, generator=generator).theta
    records = run_chain(sde, settled, 400, record=40, generator=generator).values
    balance = fluctuation_dissipation(sde, records)
    assert balance.error < 0.03
    assert abs(balance.gap) < 4 * balance.error


def test_the_sde_balances_on_a_trajectory():
    sde = tanh_sde()
    law = stationary(sde, torch.zeros(2, dtype=F64))
    generator = torch.Generator().manual_seed(3)
    xi = torch.randn(300, 2, generator=generator, dtype=F64)
    near = law.mean + xi @ torch.linalg.cholesky(law.covariance).mT
    records = integrate(sde, near, 6.0, record=3, generator=generator).values[1:]
    balance = fluctuation_dissipation(sde, records, law="sde")
    assert balance.error < 0.1
    assert abs(balance.gap) < 4 * balance.error


def test_a_trajectory_on_its_way_does_not_balance():
    sde = linear_sde()
    far = torch.full((2,), 3.0, dtype=F64)
    records = run_chain(sde, far, 40, paths=50, record=40, generator=torch.Generator().manual_seed(4)).values
    theta = stationary(sde, far).theta
    balance = fluctuation_dissipation(sde, records, centre=theta)
    assert balance.gap > 10 * balance.error
    drifting = stationarity_test((records - theta).norm(dim=-1))
    assert drifting.difference < 0
    assert drifting.p_value < 1e-6


def autoregression(seed, paths=None):
    noise = torch.randn(4096, *([paths] if paths else []), generator=torch.Generator().manual_seed(seed), dtype=F64)
    values = [noise[0] / (1 - 0.9**2) ** 0.5]
    for step in noise[1:]:
        values.append(0.9 * values[-1] + step)
    return torch.stack(values)


@pytest.mark.parametrize("paths", [None, 16])
def test_stationary_trajectories_are_refused_as_often_as_the_level_says(paths):
    refused = sum(stationarity_test(autoregression(seed, paths)).p_value < 0.05 for seed in range(100))
    assert 0 <= refused <= 15  # 5 expected, 16 or more with a probability of 1e-5 at a true level of .05


@pytest.mark.parametrize("paths", [None, 16])
def test_a_trend_is_found(paths):
    values = autoregression(0, paths)
    trend = torch.linspace(0, 6, len(values), dtype=F64).view(-1, *[1] * (values.ndim - 1))
    found = stationarity_test(values + trend)
    assert found.p_value < 1e-4
    assert found.difference == pytest.approx(3, abs=1)


def test_mistakes_are_named():
    sde = linear_sde()
    with pytest.raises(BackpassError, match="Did you mean 'chain'"):
        fluctuation_dissipation(sde, torch.zeros(3, 2, dtype=F64), law="chian")
    with pytest.raises(BackpassError, match="records"):
        fluctuation_dissipation(sde, torch.zeros(2, dtype=F64))
    with pytest.raises(BackpassError, match="at least 64 records"):
        stationarity_test(torch.zeros(10))
    with pytest.raises(BackpassError, match="diverged"):
        stationarity_test(torch.full((100,), float("nan")))
    still = AdversarialSDE(sde.loss, (torch.ones(4, 2, dtype=F64), torch.ones(4, dtype=F64)), eta_outer=0.1)
    with pytest.raises(BackpassError, match="no noise"):
        fluctuation_dissipation(still, torch.ones(3, 2, dtype=F64), law="sde")
