"""The stationary law near a minimum, against dense linear algebra, autograd and the chain's own transfer operator."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from backpass import BackpassError
from backpass.sde import AdversarialSDE, stationary
from backpass.sde.lyapunov import relaxation_rate, solve_discrete_lyapunov, solve_lyapunov

F64 = torch.float64
NODES = 20


def random_matrix(n, seed):
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)


def regression(theta, x, y):
    return (torch.tanh(x @ theta) - y).square() / 2


def quadratic(theta, x, y):
    """g = A theta - x: linear, with constant noise."""
    return (theta * (A.to(theta) @ theta)).sum() / 2 - x @ theta


A = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.6, 0.1], [0.0, 0.1, 0.4]], dtype=F64)


def linear_sde(eta=0.1, batch_size=2):
    x = random_matrix(8, 0)[:, :3]
    return AdversarialSDE(quadratic, (x, torch.zeros(8, dtype=F64)), eta_outer=eta, batch_size=batch_size)


def tanh_sde(**settings):
    x, y = random_matrix(12, 1)[:, :3], random_matrix(12, 2)[:, 0].tanh()
    return AdversarialSDE(regression, (x, y), **({"eta_outer": 0.05} | settings))


def four_points(eta, **settings):
    """Adversarial regression in one dimension, K = 2, as eta_inner = eta_outer."""
    x = torch.tensor([[-1.0], [-0.4], [0.5], [1.1]], dtype=F64)
    y = torch.tensor([-0.9, -0.1, 0.2, 0.9], dtype=F64)
    return AdversarialSDE(
        lambda theta, x, y: (x @ theta - y).square() / 2,
        (x, y),
        eta_outer=eta,
        **({"steps": 2, "eta_inner": eta} | settings),
    )


@pytest.mark.parametrize("n", [1, 4, 12])
def test_the_lyapunov_equation_is_that_of_a_dense_solve(n):
    H = random_matrix(n, n) / n**0.5 + 1.5 * torch.eye(n, dtype=F64)
    Q = random_matrix(n, n + 50)
    Q = Q @ Q.mT
    eye = torch.eye(n, dtype=F64)
    dense = torch.linalg.solve(torch.kron(H, eye) + torch.kron(eye, H), Q.flatten()).view(n, n)
    torch.testing.assert_close(solve_lyapunov(H, Q), dense, rtol=1e-9, atol=1e-10)
    step = eye - 0.2 * H
    dense = torch.linalg.solve(torch.eye(n * n, dtype=F64) - torch.kron(step, step), Q.flatten()).view(n, n)
    torch.testing.assert_close(solve_discrete_lyapunov(step, Q), dense, rtol=1e-9, atol=1e-10)


def test_the_lyapunov_equation_of_a_matrix_that_cannot_be_diagonalized():
    H = torch.tensor([[1e-3, 5.0], [0.0, 1e-3]], dtype=F64)
    C = solve_lyapunov(H, torch.eye(2, dtype=F64))
    torch.testing.assert_close(H @ C + C @ H.mT, torch.eye(2, dtype=F64), rtol=0, atol=1e-6)


def test_a_drift_that_does_not_pull_back_has_no_stationary_law():
    saddle = torch.diag(torch.tensor([1.0, -0.1], dtype=F64))
    with pytest.raises(BackpassError, match="positive real part"):
        solve_lyapunov(saddle, torch.eye(2, dtype=F64))
    with pytest.raises(BackpassError, match="unit circle"):
        solve_discrete_lyapunov(torch.eye(2, dtype=F64) - saddle, torch.eye(2, dtype=F64))
    with pytest.raises(BackpassError, match="two square matrices"):
        solve_lyapunov(saddle, torch.eye(3, dtype=F64))


def test_the_linear_case_is_what_linear_algebra_says():
    sde = linear_sde()
    law = stationary(sde, torch.ones(3, dtype=F64))
    S = torch.cov(sde.data[0].mT, correction=0) / 2
    torch.testing.assert_close(law.theta, torch.linalg.solve(A, sde.data[0].mean(0)))
    torch.testing.assert_close(law.mean, law.theta)
    torch.testing.assert_close(law.noise, S)
    torch.testing.assert_close(law.jacobian, A + 0.05 * A @ A)
    torch.testing.assert_close(law.jacobian @ law.covariance + law.covariance @ law.jacobian.mT, 0.1 * S)
    step = torch.eye(3, dtype=F64) - 0.1 * A
    torch.testing.assert_close(law.chain_covariance, step @ law.chain_covariance @ step.mT + 0.01 * S)
    assert law.rate == pytest.approx(float(torch.linalg.eigvalsh(A + 0.05 * A @ A)[0]))


def test_both_covariances_agree_to_first_order():
    gaps = []
    for eta in (0.1, 0.05):
        law = stationary(linear_sde(eta), torch.zeros(3, dtype=F64))
        gaps.append(float((law.covariance - law.chain_covariance).norm() / law.covariance.norm()))
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.05)


def test_means_come_closer_at_the_rate():
    sde = linear_sde()
    law = stationary(sde, torch.zeros(3, dtype=F64))
    ahead = torch.linalg.matrix_exp(-law.jacobian * 30) @ torch.ones(3, dtype=F64)
    later = torch.linalg.matrix_exp(-law.jacobian * 31) @ torch.ones(3, dtype=F64)
    assert float(-(later.norm() / ahead.norm()).log()) == pytest.approx(law.rate, rel=1e-3)
    assert relaxation_rate(law.jacobian) == law.rate


@pytest.mark.parametrize("steps", [1, 3])
def test_the_shift_of_the_minimum_is_the_gradient_of_the_penalty_through_the_hessian(steps):
    errors = []
    for eta_inner in (0.02, 0.01):
        sde = tanh_sde(steps=steps, eta_inner=eta_inner)
        law = stationary(sde, torch.zeros(3, dtype=F64))
        x, y = sde.data

        def clean(theta, x=x, y=y):
            return regression(theta, x, y).mean()

        def penalty(theta, x=x, y=y):
            at = x.clone().requires_grad_()
            g = torch.autograd.grad(regression(theta, at, y).sum(), at, create_graph=True)[0]
            return g.square().sum() / (2 * len(x))

        hessian = torch.autograd.functional.hessian(clean, law.clean)
        slope = torch.autograd.functional.jacobian(penalty, law.clean)
        torch.testing.assert_close(law.shift, -steps * eta_inner * torch.linalg.solve(hessian, slope))
        assert penalty(law.theta) < penalty(law.clean)  # the robustness
        errors.append(float((law.theta - law.clean - law.shift).norm()))
    assert 3.5 < errors[0] / errors[1] < 4.6


def test_plain_training_has_no_shift():
    law = stationary(tanh_sde(), torch.zeros(3, dtype=F64))
    torch.testing.assert_close(law.theta, law.clean)
    torch.testing.assert_close(law.shift, torch.zeros(3, dtype=F64), rtol=0, atol=1e-8)


def chebyshev(low=-0.6, high=2.0):
    """Nodes, and the matrix from values there to the derivative there (Trefethen, Spectral methods, chapter 6)."""
    k = torch.arange(NODES, dtype=F64)
    x = torch.cos(torch.pi * k / (NODES - 1))
    c = (-1) ** k * torch.where((k == 0) | (k == NODES - 1), 2.0, 1.0)
    gaps = x[:, None] - x[None] + torch.eye(NODES, dtype=F64)
    D = c[:, None] / c[None] / gaps
    D -= torch.diag(D.sum(1))
    return (x + 1) / 2 * (high - low) + low, D * 2 / (high - low)


def transfer_operator(sde, nodes):
    """The matrix from f at the nodes to E f(theta') there, f interpolated by its polynomial."""
    ends = torch.stack([sde.chain_step(nodes[:, None], index=torch.full((NODES, 1), j))[:, 0] for j in range(4)])
    vander = torch.special.chebyshev_polynomial_t
    scale = (nodes.max() - nodes.min()) / 2

    def basis(at):
        return torch.stack([vander((at - nodes.min()) / scale - 1, n) for n in range(NODES)], -1)

    return basis(ends).mean(0) @ torch.linalg.inv(basis(nodes))


def chain_expectations(sde, nodes, f, steps):
    operator, values, history = transfer_operator(sde, nodes), f(nodes), []
    for _ in range(steps):
        values = operator @ values
        history.append(values)
    return torch.stack(history)


def slopes(errors):
    return [float(torch.tensor(a / b).log2()) for a, b in pairwise(errors)]


def test_the_mean_of_the_stationary_law_is_of_order_two_at_any_inner_step_size():
    nodes, _ = chebyshev()
    errors, naive = [], []
    for eta in (0.1, 0.05, 0.025):
        sde = four_points(eta, eta_inner=0.2)
        exact = chain_expectations(sde, nodes, lambda x: x, int(80 / eta))[-1]
        assert exact.max() - exact.min() < 1e-8  # the start is forgotten
        law = stationary(sde, torch.ones(1, dtype=F64))
        errors.append(abs(float(law.mean - exact.mean())))
        naive.append(abs(float(law.theta - exact.mean())))
    assert all(slope > 1.7 for slope in slopes(errors)), errors
    assert all(slope < 1.3 for slope in slopes(naive)), naive  # the minimum itself is of order one


def test_the_expanded_mean_is_of_order_two_where_both_rates_shrink():
    nodes, _ = chebyshev()
    errors = []
    for eta in (0.1, 0.05, 0.025, 0.0125):
        exact = chain_expectations(four_points(eta), nodes, lambda x: x, int(80 / eta))[-1].mean()
        law = stationary(four_points(eta, mode="expanded"), torch.ones(1, dtype=F64))
        errors.append(abs(float(law.mean - exact)))
    assert all(1.8 < slope < 2.2 for slope in slopes(errors)), errors


@pytest.mark.parametrize("mode", ["exact", "expanded"])
def test_the_weak_error_is_of_order_two_uniformly_in_time(mode):
    nodes, D = chebyshev()
    start = int((nodes - 1.4).abs().argmin())
    worst, late = [], []
    for eta in (0.1, 0.05, 0.025):
        sde = four_points(eta, mode=mode)
        steps = int(40 / eta)
        chain = chain_expectations(sde, nodes, lambda x: torch.sin(2 * x), steps)[:, start]
        half_a = eta * sde.covariance(nodes[:, None])[:, 0] / 2
        flow = torch.linalg.matrix_exp(eta * (sde.drift(nodes[:, None]) * D + half_a * (D @ D)))
        values, errors = torch.sin(2 * nodes), []
        for k in range(steps):
            values = flow @ values
            errors.append(abs(float(values[start] - chain[k])))
        worst.append(max(errors))
        late.append(errors[-1])
    assert all(slope > 1.8 for slope in slopes(worst)), worst
    assert all(slope > 1.8 for slope in slopes(late)), late


def test_noise_of_too_low_a_rank_is_refused_or_accepted_on_purpose():
    x = random_matrix(3, 4)
    sde = AdversarialSDE(quadratic, (x, torch.zeros(3, dtype=F64)), eta_outer=0.1)
    with pytest.raises(BackpassError, match=r"rank 2 of 3.*degenerate=True"):
        stationary(sde, torch.zeros(3, dtype=F64))
    law = stationary(sde, torch.zeros(3, dtype=F64), degenerate=True)
    torch.testing.assert_close(law.jacobian @ law.covariance + law.covariance @ law.jacobian.mT, 0.1 * law.noise)


def test_a_maximum_and_a_flat_direction_are_refused():
    x = random_matrix(6, 5)[:, :3]
    data = (x, torch.zeros(6, dtype=F64))
    upside_down = AdversarialSDE(lambda theta, x, y: -quadratic(theta, x, y), data, eta_outer=0.1)
    with pytest.raises(BackpassError, match="positive real part"):
        stationary(upside_down, torch.zeros(3, dtype=F64))
    flat = AdversarialSDE(lambda theta, x, y: (theta[0] - x[:, 0]).square() / 2, data, eta_outer=0.1)
    with pytest.raises(BackpassError, match="positive real part"):
        stationary(flat, torch.zeros(3, dtype=F64), degenerate=True)


def test_a_flat_direction_is_found_whatever_was_in_memory_before():
    data = (random_matrix(6, 5)[:, :3], torch.zeros(6, dtype=F64))
    flat = AdversarialSDE(lambda theta, x, y: (theta[0] - x[:, 0]).square() / 2, data, eta_outer=0.1)
    for _ in range(50):
        left = [torch.full((size,), 7, dtype=torch.int32) for size in (3, 3, 3, 4)]
        del left
        with pytest.raises(BackpassError, match="positive real part"):
            stationary(flat, torch.zeros(3, dtype=F64), degenerate=True)


def test_where_there_is_no_minimum_it_says_so():
    x = random_matrix(6, 5)[:, :3]
    slope = AdversarialSDE(lambda theta, x, y: (theta * x + theta).sum(1), (x, x[:, 0]), eta_outer=0.1)
    with pytest.raises(BackpassError, match="no zero of the drift"):
        stationary(slope, torch.zeros(3, dtype=F64))
    with pytest.raises(BackpassError, match="one start"):
        stationary(linear_sde(), torch.zeros(2, 3, dtype=F64))


def test_the_law_of_a_path_in_the_exact_mode_predicts_better_than_the_expanded():
    sde = tanh_sde(steps=3, eta_inner=0.1)
    exact = stationary(sde, torch.zeros(3, dtype=F64)).theta
    expanded = stationary(replace(sde, mode="expanded"), torch.zeros(3, dtype=F64)).theta
    assert sde.mean_field(exact).norm() < 1e-6 < sde.mean_field(expanded).norm()
