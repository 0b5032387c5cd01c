"""The optimal schedule of the linear-quadratic problem: closed form, finite differences, and brute force."""

import itertools
import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from backpass import BackpassError
from backpass.sde.control import LinearQuadratic, optimal_lr
from backpass.sde.control_hjb import _tridiagonal, best_control

EXAMPLE = {"curvature": 1.0, "noise": 1.0, "eta": 0.1, "start": 0.5, "horizon": 10.0}


def descend(problem, controls, dt):
    """m(T) by forward Euler under any controls: the equation, and nothing else."""
    m = torch.full(controls.shape[1:], problem.start, dtype=torch.float64)
    for u in controls:
        m = m + dt * (-2 * problem.effective * u * m + problem.effective * problem.eta * problem.noise * u**2 / 2)
    return m


def test_the_worked_example():
    schedule = optimal_lr(**EXAMPLE)
    assert schedule.value == pytest.approx(0.005248, abs=1e-6)  # derived for this project
    assert schedule.fixed[1] == pytest.approx(0.008720, abs=1e-6)
    assert schedule.switch == pytest.approx(math.log(19) / 2)
    assert schedule.gain >= 0.30


def test_the_closed_form_obeys_the_equation_of_the_risk():
    problem = LinearQuadratic(curvature=0.7, noise=2.0, eta=0.05, start=0.4)
    times = torch.arange(200_000, dtype=torch.float64) * 5e-5
    controls = torch.tensor([problem.optimal(t)[0] for t in times.tolist()])
    assert problem.optimal(10.0)[1] == pytest.approx(float(descend(problem, controls, 5e-5)), rel=1e-4)


@pytest.mark.parametrize("start", [0.5, 0.04, 0.01])
@pytest.mark.parametrize("adversarial", [0.0, 0.8])
def test_no_perturbed_schedule_ends_lower(start, adversarial):
    problem = LinearQuadratic(curvature=1.0, noise=1.0, eta=0.1, start=start, adversarial=adversarial)
    dt = 1e-2
    ours = torch.tensor([problem.optimal((k + 0.5) * dt)[0] for k in range(500)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    bumps = torch.randn(500, 40, generator=generator, dtype=torch.float64)
    others = (ours[:, None] * (1 + 0.3 * bumps.cumsum(0) / 500**0.5)).clamp(0, 1)
    assert (descend(problem, others, dt) > descend(problem, ours[:, None], dt)).all()


def test_the_finite_differences_agree_with_the_closed_form():
    closed, numeric = optimal_lr(**EXAMPLE), optimal_lr(**EXAMPLE, method="hjb")
    assert numeric.value == pytest.approx(closed.value, rel=0.01)
    assert numeric.risk[-1] == pytest.approx(closed.value, rel=1e-3)  # the path of the policy that was found
    assert 1 - numeric.value / numeric.fixed[1] >= 0.30
    for t in (0.5, 1.2, 2.0, 5.0, 9.0):
        assert numeric.at(t) == pytest.approx(closed.at(t), rel=0.02)


@pytest.mark.parametrize(
    ("problem", "gain", "switch"),
    [
        ({"curvature": 1.0, "noise": 0.0, "eta": 0.1, "start": 0.5, "horizon": 4.0}, 0.0, 4.0),
        ({"curvature": 1.0, "noise": 1.0, "eta": 1e-3, "start": 5.0, "horizon": 10.0}, 0.52418, 4.95172),
    ],
)
def test_finite_differences_where_the_policy_is_bang_bang_or_the_risk_falls_far(problem, gain, switch):
    found, closed = optimal_lr(**problem, method="hjb"), optimal_lr(**problem)
    assert found.gain == pytest.approx(gain, abs=1e-4)
    assert found.switch == pytest.approx(switch, abs=problem["horizon"] / 400)
    assert found.value == pytest.approx(closed.value, rel=0.01)
    assert found.risk[-1] == pytest.approx(closed.value, rel=1e-3)


def test_gains_by_finite_differences_are_those_in_closed_form_or_an_error_says_why_not():
    """A grid of 108 problems; those without noise that run for too long underflow."""
    refused = 0
    for curvature, noise, eta, start, horizon in itertools.product(
        (0.1, 1.0, 10.0), (0.0, 1.0, 10.0), (1e-3, 1e-1), (0.01, 5.0), (1.0, 10.0, 100.0)
    ):
        problem = {"curvature": curvature, "noise": noise, "eta": eta, "start": start, "horizon": horizon}
        closed = optimal_lr(**problem, points=10)
        if noise == 0 and curvature * horizon > 150:
            with pytest.raises(BackpassError, match="too deep for finite differences"):
                optimal_lr(**problem, method="hjb", points=50, steps=50)
            refused += 1
            continue
        found = optimal_lr(**problem, method="hjb", points=50, steps=50)
        assert found.gain == pytest.approx(closed.gain, abs=0.02)
        assert found.value == pytest.approx(closed.value, rel=0.12)  # 50 points and steps: the value is rougher
    assert refused == 4


def test_the_finite_differences_converge_to_the_closed_form_at_first_order():
    closed = optimal_lr(**EXAMPLE).value
    coarse, fine = (abs(optimal_lr(**EXAMPLE, method="hjb", points=n, steps=n).value - closed) for n in (200, 800))
    assert 3 < coarse / fine < 6


def test_the_schedule_is_near_the_best_that_any_rates_can_do_in_the_chain():
    """The chain's own optimum lr = 2 m / (s^2 + 2 a m), by its exact recursion."""
    eta, steps = 0.1, 100
    schedule = optimal_lr(**EXAMPLE)
    ours = best = constant = 0.5
    for k in range(steps):
        rates = eta * schedule.factor(k), min(eta, 2 * best / (1 + 2 * best)), eta * schedule.fixed[0]
        ours, best, constant = (
            (1 - lr) ** 2 * m + lr**2 / 2 for lr, m in zip(rates, (ours, best, constant), strict=True)
        )
    assert best <= ours < 1.01 * best
    assert ours < 0.7 * constant


def test_an_adversary_adds_to_the_curvature():
    attacked = optimal_lr(**EXAMPLE, adversarial=0.5)
    plain = optimal_lr(**{**EXAMPLE, "curvature": 1.5})
    assert attacked.control == plain.control
    assert attacked.switch < optimal_lr(**EXAMPLE).switch


def test_a_start_below_the_noise_starts_below_the_largest_rate():
    schedule = optimal_lr(**{**EXAMPLE, "start": 0.01})
    assert schedule.switch == 0
    assert schedule.control[0] == pytest.approx(2 * 0.01 / 0.1)


def test_without_noise_the_largest_rate_is_kept():
    schedule = optimal_lr(**{**EXAMPLE, "noise": 0.0})
    assert set(schedule.control) == {1.0}
    assert schedule.switch == EXAMPLE["horizon"]
    assert schedule.value == pytest.approx(0.5 * math.exp(-20))


def test_the_best_constant_is_the_best_of_a_fine_grid():
    for start in (0.5, 0.03, 0.01):
        problem = LinearQuadratic(curvature=1.0, noise=1.0, eta=0.1, start=start)
        for horizon in (0.5, 10.0):
            _, m = problem.best_fixed(horizon)
            assert m <= min(problem.fixed(u / 10_000, horizon) for u in range(10_001)) * (1 + 1e-12)


def test_the_schedule_drives_a_torch_optimizer():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    schedule = optimal_lr(**EXAMPLE)
    scheduler = LambdaLR(optimizer, schedule.factor)
    for _ in range(60):
        optimizer.step()
        scheduler.step()
    u = 1 / (1 + 60.5 * 0.1 - math.log(19) / 2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * u, rel=1e-4)


def test_the_control_minimises_its_quadratic():
    generator = torch.Generator().manual_seed(1)
    b, c = torch.randn(2, 200, generator=generator, dtype=torch.float64)
    c[:20] = 0
    grid = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:, None]
    u = best_control(b, c)
    assert (b * u + c * u**2 <= (b * grid + c * grid**2).amin(0) + 1e-12).all()


@pytest.mark.parametrize("n", [10, 37, 64])
def test_the_tridiagonal_solver_solves(n):
    generator = torch.Generator().manual_seed(n)
    lower, upper, right = torch.rand(3, n, generator=generator, dtype=torch.float64)
    lower[0] = upper[-1] = 0
    diagonal = 1 + lower + upper
    matrix = torch.diag(diagonal) - torch.diag(lower[1:], -1) - torch.diag(upper[:-1], 1)
    torch.testing.assert_close(_tridiagonal(-lower, diagonal, -upper, right), torch.linalg.solve(matrix, right))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"curvature": 0.0}, "curvature is a finite number above 0"),
        ({"adversarial": -2.0}, "turned the minimum into a maximum"),
        ({"noise": -1.0}, "variance"),
        ({"horizon": 0.0}, "SDE time"),
        ({"points": 3}, "at least 10"),
        ({"method": "closd"}, "Did you mean 'closed'"),
    ],
)
def test_mistakes_are_named(change, says):
    with pytest.raises(BackpassError, match=says):
        optimal_lr(**{**EXAMPLE, **change})
