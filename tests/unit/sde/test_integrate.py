"""Integration: its orders, its law, and the trap that it refuses to fall into."""

import math
import warnings

import pytest
import torch

from backpass import BackpassError, UnknownNameError
from backpass.sde import AdversarialSDE, ItoSDE, integrate, run_chain
from backpass.sde.weak_error import fit_slope
from support.sde import D, smooth_data, smooth_loss, smooth_theta, squared_loss


def make(**settings):
    settings = {"eta_outer": 0.2, "steps": 2, "eta_inner": 0.1, "batch_size": 2, **settings}
    return AdversarialSDE(smooth_loss, smooth_data(), **settings)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pendulum(theta):
    return torch.stack([theta[..., 1], -theta[..., 0].sin()], -1)


QUIET = ItoSDE(pendulum, lambda theta, xi: 0 * theta, noise_dim=2)
DECAY = ItoSDE(lambda theta: -1.5 * theta, lambda theta, xi: 0.8 * xi, noise_dim=1)


@pytest.mark.parametrize(("method", "order"), [("euler_maruyama", 1), ("predictor_corrector", 2)])
def test_without_noise_each_method_has_its_order(method, order):
    theta0 = torch.tensor([1.0, 0.5], dtype=D)
    fine = integrate(QUIET, theta0, 1.0, 1e-3).theta
    steps = [0.1, 0.05, 0.025, 0.0125]
    errors = [(integrate(QUIET, theta0, 1.0, dt, method).theta - fine).norm().item() for dt in steps]
    assert fit_slope(steps, errors) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("method", ["euler_maruyama", "predictor_corrector"])
def test_the_law_of_an_ornstein_uhlenbeck_process(method):
    """Mean and variance within five standard errors, at each record; dt makes the methods' own error far smaller."""
    found = integrate(
        DECAY, torch.tensor([2.0], dtype=D), 1.0, 1e-3, method, paths=20_000, generator=seeded(), record=4
    )
    for t, values in zip(found.times.tolist()[1:], found.values[1:], strict=True):
        mean, variance = 2 * math.exp(-1.5 * t), 0.8**2 / 3 * (1 - math.exp(-3 * t))
        assert values.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / 20_000) + 2e-3)
        assert values.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / 20_000) + 2e-3)


# One sample: there is no noise, the chain is a number, and what the integrator gets wrong is seen without statistics.
ALONE = (torch.tensor([[1.3]], dtype=D), torch.tensor([0.4], dtype=D))


def distance(eta, **settings):
    sde = AdversarialSDE(squared_loss, ALONE, eta_outer=eta, steps=2, eta_inner=0.05)
    chain = run_chain(sde, torch.tensor([1.0], dtype=D), round(0.5 / eta)).theta
    return (integrate(sde, torch.tensor([1.0], dtype=D), 0.5, **settings).theta - chain).abs().item()


def test_order_two_is_kept_where_euler_at_dt_eta_falls_back_to_one():
    etas = [0.1, 0.05, 0.025]
    for method in (None, "predictor_corrector"):
        assert fit_slope(etas, [distance(eta, method=method) for eta in etas]) == pytest.approx(2.0, abs=0.25)
    trapped = [distance(eta, dt=eta, method="euler_maruyama", coarse=True) for eta in etas]
    assert fit_slope(etas, trapped) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("part", [2, 3])
def test_the_derivative_free_method_has_order_two_against_the_chain(part):
    etas = [0.1, 0.05, 0.025]
    errors = [distance(eta, dt=eta / part, method="derivative_free") for eta in etas]
    assert fit_slope(etas, errors) == pytest.approx(2.0, abs=0.25)
    assert distance(0.1, dt=0.1) == 0  # without noise and with dt = eta it is the chain


def test_the_derivative_free_method_has_the_moments_of_the_chain():
    """At dt = eta its noise is Gaussian, mean and variance those of the chain to second order; five standard errors."""
    sde, theta = make(eta_outer=0.05), smooth_theta(1)[0]
    ours = integrate(sde, theta, 0.5, method="derivative_free", paths=4000, generator=seeded()).theta
    chain = run_chain(sde, theta, 10, paths=4000, generator=seeded(1)).theta
    error = ((ours.var(0) + chain.var(0)) / 4000).sqrt()
    assert ((ours.mean(0) - chain.mean(0)).abs() < 5 * error + 1e-3).all()
    torch.testing.assert_close(ours.var(0), chain.var(0), rtol=0.15, atol=0)


def test_the_derivative_free_method_is_for_exact_processes_of_order_two():
    for sde in (make(order=1), make(mode="expanded"), DECAY):
        with pytest.raises(BackpassError, match="derivative_free"):
            integrate(sde, smooth_theta(), 0.2, 0.1, method="derivative_free")
    with pytest.raises(BackpassError, match="at most eta_outer"):
        integrate(make(), smooth_theta(), 1.0, 0.5, method="derivative_free")


def test_the_trap_is_refused_and_the_message_says_what_to_do():
    theta = smooth_theta()
    with pytest.raises(BackpassError, match=r"Use method='predictor_corrector'.*coarse=True"):
        integrate(make(), theta, 1.0, method="euler_maruyama")
    with pytest.raises(BackpassError, match="at most eta_outer/4 = 0.05"):
        integrate(make(), theta, 1.0, dt=0.2, method="predictor_corrector")
    with pytest.raises(BackpassError, match="at most eta_outer = 0.2"):
        integrate(make(order=1), theta, 1.0, dt=0.4)
    integrate(make(), theta, 0.2, dt=0.2, method="euler_maruyama", coarse=True)
    integrate(make(order=1), theta, 0.2, dt=0.2, method="euler_maruyama")


def test_euler_at_dt_eta_on_the_exact_field_is_the_chain_with_gaussian_noise():
    sde, theta = make(order=1), smooth_theta()
    found = integrate(sde, theta, 0.4, method="euler_maruyama", generator=seeded(1)).theta
    generator = seeded(1)
    for _ in range(2):
        xi = torch.randn(4, 6, generator=generator, dtype=D)
        # -eta h, and eta S^{1/2} in the direction xi: sde.noise holds sqrt(eta), the step's sqrt(dt) the other.
        theta = theta - 0.2 * sde.mean_field(theta) + 0.2**0.5 * sde.noise(theta, xi)
    torch.testing.assert_close(found, theta)


def test_the_chains_mean_and_spread_are_those_of_its_steps():
    """Of many paths after one step, against the mean field and the covariance; five standard errors."""
    sde, theta = make(), smooth_theta(1)[0]
    moves = run_chain(sde, theta, 1, paths=40_000, generator=seeded()).theta - theta
    spread = 0.2**2 * sde.covariance(theta)
    error = 5 * (spread.diagonal() / 40_000).sqrt()
    assert ((moves.mean(0) + 0.2 * sde.mean_field(theta)).abs() < error).all()
    torch.testing.assert_close(moves.T.cov(), spread, rtol=0.05, atol=0.05 * spread.diagonal().max().item())


def test_records_are_equally_spaced_and_hold_what_is_observed():
    sde = make()
    found = integrate(sde, smooth_theta(1)[0], 0.9, paths=5, record=3, observe=sde.gradient_penalty)
    torch.testing.assert_close(found.times, torch.tensor([0.0, 0.3, 0.6, 0.9], dtype=D))
    assert found.values.shape == (4, 5)
    torch.testing.assert_close(found.values[-1], sde.gradient_penalty(found.theta))
    alone = integrate(sde, smooth_theta(), 0.9)
    assert alone.times.tolist() == pytest.approx([0.9])
    assert torch.equal(alone.values, alone.theta[None])
    chain = run_chain(sde, smooth_theta(), 6, record=2)
    torch.testing.assert_close(chain.times, torch.tensor([0.0, 0.6, 1.2], dtype=D))
    assert chain.values.shape == (3, 4, 3)


def test_a_generator_makes_paths_reproducible_and_leaves_the_global_state():
    state = torch.get_rng_state()
    a, b = (integrate(make(), smooth_theta(), 0.4, generator=seeded(7)).theta for _ in range(2))
    c, d = (run_chain(make(), smooth_theta(), 2, generator=seeded(7)).theta for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(c, d)
    assert not torch.equal(a, integrate(make(), smooth_theta(), 0.4, generator=seeded(8)).theta)
    assert torch.equal(state, torch.get_rng_state())


def test_a_path_is_differentiable_in_its_start():
    def end(theta):
        return integrate(make(), theta, 0.2, generator=seeded(2)).theta

    assert torch.autograd.gradcheck(end, smooth_theta(2).requires_grad_())


GEOMETRIC = ItoSDE(lambda x: 0.3 * x, lambda x, xi: 0.8 * x * xi, noise_dim=1)
SMALL = ItoSDE(lambda x: 0.3 * x, lambda x, xi: 0.05 * x * xi, noise_dim=1)


def test_the_default_warns_where_noise_of_order_one_lowers_its_order():
    start = torch.ones(10, 1, dtype=D)
    with pytest.warns(UserWarning, match="weak order 1 for this SDE"):
        integrate(GEOMETRIC, start, 0.2, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integrate(GEOMETRIC, start, 0.2, 0.1, "predictor_corrector")  # named, so accepted
        integrate(SMALL, start, 0.2, 0.1)
        integrate(DECAY, start, 0.2, 0.1)
        integrate(make(), smooth_theta(), 0.2)


@pytest.mark.parametrize("name", ["heun", "stochastic_heun"])
def test_names_of_stratonovichs_calculus_are_refused(name):
    with pytest.raises(BackpassError, match=r"Stratonovich.*'predictor_corrector'"):
        integrate(make(), smooth_theta(), 1.0, method=name)


def test_records_at_given_times():
    sde, theta = make(), smooth_theta()
    found = integrate(sde, theta, 0.9, generator=seeded(), record=[0.0, 0.1, 0.35])
    assert found.times.tolist() == [0.0, 0.1, 0.35]
    assert torch.equal(found.values[0], theta)
    again = integrate(sde, theta, 0.35, generator=seeded(), record=torch.tensor([0.1, 0.35], dtype=D))
    assert torch.equal(found.values[1:], again.values)
    assert not torch.equal(found.theta, found.values[-1])  # the end is later
    chain = run_chain(sde, theta, 5, generator=seeded(), record=[0.4, 1.0])
    torch.testing.assert_close(chain.values[0], run_chain(sde, theta, 2, generator=seeded()).theta)
    assert torch.equal(chain.values[1], chain.theta)


def test_paths_are_differentiable_in_both_rates_and_in_the_data():
    x, y = smooth_data()

    def end(outer, inner, x):
        sde = AdversarialSDE(smooth_loss, (x, y), eta_outer=outer, steps=2, eta_inner=inner, batch_size=2)
        return integrate(sde, smooth_theta(1)[0], 0.1, 0.05, coarse=True, generator=seeded(2)).theta

    def chain(outer, inner, x):
        sde = AdversarialSDE(smooth_loss, (x, y), eta_outer=outer, steps=2, eta_inner=inner, batch_size=2)
        return run_chain(sde, smooth_theta(1)[0], 2, generator=seeded(2)).theta

    inputs = torch.tensor(0.2, dtype=D), torch.tensor(0.1, dtype=D), x
    for function in (end, chain):
        assert torch.autograd.gradcheck(function, [one.clone().requires_grad_() for one in inputs])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: integrate(make(), smooth_theta(), 1.0, record=[0.5, 0.2]), "increasing times"),
        (lambda: integrate(make(), smooth_theta(), 1.0, record=[0.5, 2.0]), "increasing times"),
        (lambda: run_chain(make(), smooth_theta(), 5, record=[0.3]), "multiples of its time step"),
        (lambda: run_chain(DECAY, smooth_theta(), 5), "model a chain"),
        (lambda: integrate(make(), smooth_theta(), 0.0), "final time"),
        (lambda: integrate(make(), smooth_theta(), 1.0, dt=-0.1), "length of a step"),
        (lambda: integrate(DECAY, smooth_theta(), 1.0), "no default"),
        (lambda: integrate(make(), smooth_theta(), 1.0, paths=3), "at one theta0"),
        (lambda: integrate(make(), smooth_theta() / 0, 1.0), "NaN or infinite"),
        (lambda: integrate(make(), torch.zeros(3).long(), 1.0), "floating-point"),
        (lambda: integrate(make(), smooth_theta(), 1.0, record=0), "record"),
        (lambda: run_chain(make(), smooth_theta(), 5, record=2), "multiple of record"),
        (lambda: run_chain(make(), smooth_theta(), 0), "positive multiple"),
    ],
)
def test_bad_input_is_refused_with_a_reason(call, message):
    with pytest.raises(BackpassError, match=message):
        call()


def test_unknown_methods_come_with_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'euler_maruyama'"):
        integrate(make(), smooth_theta(), 1.0, method="euler_maryama")
