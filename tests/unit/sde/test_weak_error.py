"""The oracle of weak errors: each side against another way to compute it, and the orders that it finds."""

import itertools

import pytest
import torch

from backpass import BackpassError, UnknownNameError
from backpass.sde import AdversarialSDE
from backpass.sde.weak_error import VARIANTS, Variant, fit_slope, weak_error
from support.sde import D, squared_loss

FUNCTIONS = {
    "sin": lambda p: (2 * p[..., 0]).sin(),
    "square": lambda p: p.square().sum(-1),
    "bell": lambda p: (-p.square().sum(-1)).exp(),
}
TARGETS = torch.tensor([0.5, 0.3, 1.0, -0.2], dtype=D)
LINE = {
    "data": (torch.tensor([[0.6], [1.0], [1.2], [0.8]], dtype=D), TARGETS),
    "bounds": [(-0.8, 1.6)],
    "theta0": torch.tensor([1.0], dtype=D),
    "nodes": 18,
}
PLANE = {
    "data": (torch.tensor([[1.0, 0.4], [-0.5, 0.9], [0.8, -0.6], [0.3, 0.7]], dtype=D), TARGETS),
    "bounds": [(-0.3, 1.3), (-0.3, 1.3)],
    "theta0": torch.tensor([1.0, 0.7], dtype=D),
    "nodes": 11,
}


def oracle(place, *, etas, t, steps=0, rho=1.0, batch_size=1, functions=FUNCTIONS, **settings):
    sde = AdversarialSDE(squared_loss, place["data"], eta_outer=1.0, eta_inner=rho, steps=steps, batch_size=batch_size)
    rest = {name: place[name] for name in ("bounds", "theta0", "nodes")} | settings
    return weak_error(sde, functions=functions, t=t, etas=etas, **rest)


@pytest.mark.parametrize("place", [LINE, PLANE], ids=["1d", "2d"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_error_is_that_of_all_sequences_of_batches_against_the_moments_ode(place, batch_size):
    """Plain SGD on a regression: the chain by enumeration, the SDE's first two moments by their linear ODE."""
    eta, steps = 0.1, 3 if batch_size == 1 else 2
    sde = AdversarialSDE(squared_loss, place["data"], eta_outer=eta, batch_size=batch_size)
    batches = list(itertools.product(range(4), repeat=batch_size))
    theta, chain = place["theta0"][None], [place["theta0"].square().sum()]
    for _ in range(steps):
        theta = theta.repeat_interleave(len(batches), 0)
        theta = sde.chain_step(theta, index=torch.tensor(batches).repeat(len(theta) // len(batches), 1))
        chain.append(theta.square().sum(1).mean())

    # Drift -H (theta - centre); the covariance is a quadratic of theta, read off by its derivatives at 0.
    x, y = place["data"]
    d, zero = x.shape[1], torch.zeros(x.shape[1], dtype=D)
    H, S = x.T @ x / 4, sde.covariance
    H, push = H + eta / 2 * H @ H, (torch.eye(d, dtype=D) + eta / 2 * H) @ (x.T @ y / 4)
    linear, quadratic = torch.func.jacrev(S)(zero), torch.func.hessian(S)(zero) / 2
    mean, second = place["theta0"], place["theta0"].outer(place["theta0"])
    n, ours = 500, [second.trace()]
    h = eta / n

    def slope(mean, second):
        noise = S(zero) + linear @ mean + (quadratic * second).sum((-2, -1))
        return push - H @ mean, (-H @ second - second @ H.T + push.outer(mean) + mean.outer(push) + eta * noise)

    for _ in range(steps):
        for _ in range(n):  # the midpoint rule
            a, b = slope(mean, second)
            a, b = slope(mean + h / 2 * a, second + h / 2 * b)
            mean, second = mean + h * a, second + h * b
        ours.append(second.trace())
    expected = max(abs(a - b) for a, b in zip(chain, ours, strict=True)).item()
    found = oracle(place, etas=[eta], t=eta * steps, batch_size=batch_size, variants=["C"])
    assert found.errors["C"]["square"][0] == pytest.approx(expected, rel=1e-5)


ETAS = [0.005, 0.0025, 0.00125]


@pytest.mark.parametrize(("steps", "rho"), [(0, 1), (2, 1), (2, 3), (3, 1), (3, 3)])
@pytest.mark.parametrize("place", [LINE, PLANE], ids=["1d", "2d"])
def test_the_weak_order_is_one_without_the_terms_of_order_eta_and_two_with_them(place, steps, rho):
    found = oracle(place, etas=ETAS, t=1.0, steps=steps, rho=rho)
    for name, row in found.slopes.items():
        for function, slope in row.items():
            assert slope == pytest.approx(VARIANTS[name].order, abs=0.15), (name, function, found.errors[name])
            assert found.resolution[name][function] < 0.05, (name, function)


def test_other_variants_can_be_asked_for():
    """The field and covariance of the chain itself, without the drift's correction: order 1, whatever the attack."""
    found = oracle(LINE, etas=ETAS, t=1.0, steps=2, variants={"no correction": Variant("exact", 1)})
    assert found.slope("no correction", "square") == pytest.approx(1.0, abs=0.15)


def test_it_prints_as_a_table():
    found = oracle(LINE, etas=[0.1, 0.05], t=0.5, steps=2, variants=["C"], functions={"sin": FUNCTIONS["sin"]})
    head, row = str(found).splitlines()
    assert head.split() == ["SDE", "f", "eta=0.1", "eta=0.05", "slope", "resolution"]
    assert row.endswith("%")
    assert row.split()[:2] == ["C", "sin"]
    assert float(row.split()[2]) == pytest.approx(found.errors["C"]["sin"][0], rel=1e-3)


def test_a_slope_that_is_the_grids_is_said_to_be():
    """A box much wider than the paths leaves the grid too coarse for small errors."""
    points, aims = torch.tensor([[0.5], [1.0], [-0.7], [1.3], [0.2]]).double(), torch.tensor([0.4, 0.9, -0.3, 0.8, 0.0])
    sde = AdversarialSDE(
        lambda theta, x, y: ((x @ theta).tanh() - y).square() / 2,
        (points, aims.double()),
        eta_outer=0.1,
        steps=3,
        eta_inner=0.1,
    )
    asked = {
        "theta0": torch.tensor([0.2]).double(),
        "functions": {"cos": lambda theta: (3 * theta[..., 0]).cos()},
        "t": 2.0,
        "etas": [0.02, 0.01],
        "variants": ["B"],
    }
    wide, tight = (weak_error(sde, bounds=[box], **asked) for box in ((-1.0, 2.5), (0.1, 1.2)))
    assert "take a tighter box" in str(wide)
    assert "take a tighter box" not in str(tight)
    assert tight.slope("B", "cos") == pytest.approx(2.0, abs=0.1)


def test_a_box_that_does_not_hold_the_chain_is_an_error_not_a_number():
    with pytest.raises(BackpassError, match="blows up"):
        oracle({**LINE, "bounds": [(-40.0, 40.0)]}, etas=[0.1], t=10.0, steps=3, rho=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"etas": []}, "etas are learning rates"),
        ({"etas": [0.0]}, "etas are learning rates"),
        ({"theta0": torch.tensor([9.0], dtype=D)}, "point of the box"),
        ({"theta0": torch.tensor([1.0])}, "float64"),
        ({"functions": {}}, "one or more test functions"),
        ({"batch_size": 40}, "different batches"),
        ({"nodes": 40}, "7 to 20"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(BackpassError, match=message):
        oracle(LINE, **{"etas": [0.1], "t": 1.0, **settings})


def test_unknown_variants_come_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"Did you mean 'b0\+sigma'"):
        oracle(LINE, etas=[0.1], t=1.0, variants=["b0+sgma"])


def test_a_slope_is_the_exponent_of_a_power_law():
    assert fit_slope([1.0, 2.0, 4.0], [3.0, 3 * 2**1.5, 3 * 4**1.5]) == pytest.approx(1.5)
    with pytest.raises(BackpassError, match="two or more positive"):
        fit_slope([0.1], [0.1])
