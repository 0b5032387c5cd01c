"""Whatever is of a wrong kind is refused by name: no number is silently another one."""

import math

import pytest
import torch
from torch import nn

from backpass import BackpassError
from backpass.sde import (
    AdversarialSDE,
    GaussianRegression,
    Moments,
    fit_slope,
    from_module,
    integrate,
    optimal_lr,
    run_chain,
    stationarity_test,
    stationary,
    weak_error,
)
from support.names import name_of

X, Y = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None], torch.ones(4, dtype=torch.float64)
THETA = torch.zeros(1, dtype=torch.float64)
ODD = pytest.mark.parametrize(
    "value", ["x", [], True, 10**400, math.nan, object()], ids=["word", "list", "bool", "huge", "nan", "object"]
)


def loss(theta, x, y):
    return (x @ theta - y).square() / 2


def make(**settings):
    return AdversarialSDE(loss, (X, Y), **{"eta_outer": 0.1, "steps": 1, "eta_inner": 0.1, **settings})


def errors(**settings):
    given = {"bounds": [(-2.0, 2.0)], "theta0": THETA, "functions": {"f": lambda p: p[..., 0]}, "t": 0.2}
    return weak_error(make(), **{**given, "etas": (0.1, 0.05), **settings})


@ODD
@pytest.mark.parametrize("name", ["eta_outer", "batch_size", "steps", "eta_inner", "lam", "eps", "order"])
def test_numbers_of_the_sde(name, value):
    with pytest.raises(BackpassError, match=name):
        make(**{name: value})


def test_switches_and_functions_of_the_sde():
    with pytest.raises(BackpassError, match="unrolled"):
        make(unrolled="no")
    with pytest.raises(BackpassError, match="regulariser"):
        make(regulariser=3, lam=1.0)


@ODD
def test_numbers_of_paths(value):
    for name in ("t", "dt", "paths", "record"):
        with pytest.raises(BackpassError, match=name):
            integrate(make(), THETA, **{"t": 0.2, name: value})
    for name in ("steps", "paths", "record"):
        with pytest.raises(BackpassError, match=name):
            run_chain(make(), THETA, **{"steps": 2, name: value})
    with pytest.raises(BackpassError, match="observe"):
        run_chain(make(), THETA, 2, observe=3)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0], "int64 tensor"),
        (torch.zeros(1), "int64 tensor"),
        (torch.tensor([9]), r"0\.\.3"),
        (torch.zeros(0, dtype=torch.int64), "batch per path"),
    ],
    ids=["list", "float", "range", "empty"],
)
def test_a_batch_of_other_samples(index, message):
    with pytest.raises(BackpassError, match=message):
        make().chain_step(THETA, index=index)


def test_noise_of_another_precision_is_refused():
    for xi in (torch.zeros(4), [0.0] * 4, torch.zeros(3, dtype=torch.float64)):
        with pytest.raises(BackpassError, match="xi needs a number per path and sample"):
            make().noise(THETA, xi)


def test_parameters_on_another_device_are_refused():
    with pytest.raises(BackpassError, match="theta is on meta"):
        make().drift(THETA.to("meta"))


@pytest.mark.parametrize("layer", [nn.RReLU(), nn.Dropout(), nn.BatchNorm1d(1)], ids=name_of)
def test_a_module_with_chance_or_mixing_is_refused(layer):
    with pytest.raises(BackpassError, match=r"model\.eval\(\)"):
        from_module(nn.Sequential(nn.Linear(1, 1), layer), nn.functional.mse_loss)


def test_from_module_takes_a_network_and_a_function():
    for model, criterion in ((3, loss), (nn.Linear(1, 1), 3)):
        with pytest.raises(BackpassError, match="a network and a criterion"):
            from_module(model, criterion)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bounds": 3}, "bounds"),
        ({"bounds": [("a", "b")]}, "bounds"),
        ({"theta0": [0.0]}, "theta0"),
        ({"functions": [loss]}, "functions"),
        ({"functions": {"f": 3}}, "functions"),
        ({"functions": {"f": lambda p: p}}, "'f' must give a finite number"),
        ({"functions": {"f": lambda p: p[..., 0] * math.nan}}, "'f' must give a finite number"),
        ({"t": math.inf}, "horizon"),
        ({"t": "x"}, "horizon"),
        ({"t": 1e30}, "limit is"),
        ({"etas": 0.1}, "etas"),
        ({"etas": (0.1, "x")}, "etas"),
        ({"variants": "B"}, "variants"),
        ({"variants": ()}, "variants"),
        ({"variants": {"mine": 3}}, "variants"),
        ({"nodes": 8.5}, "nodes"),
    ],
    ids=name_of,
)
def test_settings_of_weak_errors(settings, message):
    with pytest.raises(BackpassError, match=message):
        errors(**settings)


def test_a_slope_needs_two_learning_rates():
    for etas, found in (([1, 1], [1, 2]), ([1, 2], [1, math.nan]), (None, None), (["a", "b"], [1, 2])):
        with pytest.raises(BackpassError, match="two or more positive etas"):
            fit_slope(etas, found)


@ODD
def test_numbers_of_the_moments(value):
    settings = {"covariance": torch.eye(2, dtype=torch.float64), "noise": 0.1, "eta_outer": 0.1}
    for name in ("covariance", "noise", "eta_outer", "batch_size", "steps", "eta_inner"):
        with pytest.raises(BackpassError):
            GaussianRegression(**{**settings, name: value})
    regression, start = GaussianRegression(**settings), Moments.at(torch.ones(2, dtype=torch.float64))
    with pytest.raises(BackpassError, match="steps"):
        regression.chain(start, value)
    with pytest.raises(BackpassError, match="time"):
        regression.sde(start, value)
    with pytest.raises(BackpassError, match="order"):
        regression.sde(start, 1.0, order=value)
    with pytest.raises(BackpassError, match="Moments"):
        regression.chain(value, 1)


def test_moments_of_another_dimension():
    regression = GaussianRegression(covariance=torch.eye(2, dtype=torch.float64), noise=0.1, eta_outer=0.1)
    with pytest.raises(BackpassError, match="of 2 parameters"):
        regression.chain(Moments.at(torch.ones(3, dtype=torch.float64)), 1)


@ODD
def test_numbers_of_the_control(value):
    given = {"curvature": 1.0, "noise": 1.0, "eta": 0.1, "start": 0.5, "horizon": 10.0}
    for name in (*given, "adversarial", "points", "steps"):
        with pytest.raises(BackpassError, match=name):
            optimal_lr(**{**given, name: value})


def test_other_things_than_processes_and_records():
    with pytest.raises(BackpassError, match="AdversarialSDE"):
        stationary(None, THETA)
    with pytest.raises(BackpassError, match="tensor"):
        stationarity_test([1.0] * 70)
