"""Momentum in phase space: the chain is torch's SGD, and the SDE has order 2 in the root of the learning rate."""

import pytest
import torch

from backpass import BackpassError
from backpass.sde import AdversarialSDE, MomentumSDE, fit_slope, integrate, run_chain
from support.sde import D, smooth_data, smooth_loss, smooth_theta, squared_loss


def test_the_chain_is_torchs_sgd_with_momentum():
    theta = smooth_theta(1)[0]
    sde = MomentumSDE(AdversarialSDE(smooth_loss, smooth_data(), eta_outer=0.2, steps=2, eta_inner=0.1), 0.8)
    state, weight = sde.start(theta), torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.SGD([weight], lr=0.2, momentum=0.8)
    for rows in torch.tensor([[0, 3], [4, 4], [2, 1]]):
        state = sde.chain_step(state, index=rows)
        weight.grad = sde.sde.gradient_at(weight.detach(), *(part[rows] for part in smooth_data()))
        optimizer.step()
    torch.testing.assert_close(sde.position(state), weight.detach())


def moments(sde, at):
    """Drift matrix and noise of the state where both are linear and constant, by probing."""
    size = 2 * at
    A = torch.stack([sde.drift(e) for e in torch.eye(size, dtype=D)], 1)
    columns = torch.stack([sde.noise(torch.zeros(size, dtype=D), xi) for xi in torch.eye(sde.noise_dim, dtype=D)], 1)
    return A, columns @ columns.T


@pytest.mark.parametrize(("order", "slope"), [(1, 1.0), (2, 2.0)])
def test_weak_order_in_the_root_of_the_learning_rate(order, slope):
    """L = (theta - x)^2 / 2 with x = -1, 1: E Theta^2 of chain and SDE solve linear equations."""
    data = torch.tensor([[-1.0], [1.0]], dtype=D), torch.zeros(2, dtype=D)
    taus, errors = [0.1, 0.05, 0.025], []
    for tau in taus:
        base = AdversarialSDE(lambda p, x, y: (p - x)[:, 0].square() / 2, data, eta_outer=tau**2)
        sde = MomentumSDE(base, 1 - 1.5 * tau, order=order)
        A, Q = moments(sde, 1)
        step = torch.stack([sde.chain_step(e, index=torch.tensor([0, 1])) for e in torch.eye(2, dtype=D)], 1)
        kick = sde.chain_step(torch.zeros(2, dtype=D), index=torch.tensor([1]))
        mean, second = torch.tensor([1.0, 0.0], dtype=D), torch.diag(torch.tensor([1.0, 0.0], dtype=D))
        ours = torch.cat([second.reshape(-1), torch.ones(1, dtype=D)])
        generator = torch.zeros(5, 5, dtype=D)
        eye = torch.eye(2, dtype=D)
        generator[:4, :4], generator[:4, 4] = torch.kron(A, eye) + torch.kron(eye, A), Q.reshape(-1)
        flow, worst = torch.linalg.matrix_exp(tau * generator), 0.0
        for _ in range(round(2 / tau)):
            second, ours, mean = step @ second @ step.T + kick.outer(kick), flow @ ours, step @ mean
            worst = max(worst, float((second - ours[:4].view(2, 2))[0, 0].abs()))
        errors.append(worst)
    assert fit_slope(taus, errors) == pytest.approx(slope, abs=0.15)


def test_paths_of_the_sde_have_the_means_of_the_chain():
    data = torch.tensor([[0.7], [1.2]], dtype=D), torch.tensor([0.3, 0.9], dtype=D)
    sde = MomentumSDE(AdversarialSDE(squared_loss, data, eta_outer=0.0025, steps=2, eta_inner=0.05, batch_size=2), 0.9)
    start, draws = sde.start(torch.tensor([2.0], dtype=D)), torch.Generator().manual_seed(0)
    ours = integrate(sde, start, 1.0, paths=2000, generator=draws).theta
    chain = run_chain(sde, start, 20, paths=2000, generator=draws).theta
    error = ((ours.var(0) + chain.var(0)) / 2000).sqrt()
    assert ((ours.mean(0) - chain.mean(0)).abs() < 4 * error + 0.01).all()
    torch.testing.assert_close(ours.var(0), chain.var(0), rtol=0.25, atol=0)  # of relative order tau


def test_settings_out_of_range():
    base = AdversarialSDE(smooth_loss, smooth_data(), eta_outer=0.1)
    for momentum in (0.0, 1.0, True):
        with pytest.raises(BackpassError, match="momentum"):
            MomentumSDE(base, momentum)
    with pytest.raises(BackpassError, match="exact"):
        MomentumSDE(AdversarialSDE(smooth_loss, smooth_data(), eta_outer=0.1, mode="expanded"), 0.9)
