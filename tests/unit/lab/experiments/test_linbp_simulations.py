"""The teacher-student simulations agree with closed forms, and with numbers from an independent implementation."""

import math
from dataclasses import replace

import pytest
import torch

from backpass.lab.experiments.linbp import simulated_attack, simulated_training
from backpass.lab.experiments.linbp.simulated_attack import Attack, Update
from backpass.lab.experiments.linbp.simulated_training import Training
from backpass.rules import parse_rule

CPU = torch.device("cpu")
PLAIN, L2, SIGN = Update(norm="none", step=1e-3), Update(norm="l2", step=0.05), Update(norm="sign", step=0.005)


def mean_and_error(values):
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


# Means of another 500 draws, with their own standard errors of about .68: after 10, 50 and 100 steps.
REFERENCE = {
    ("bp", PLAIN): (194.70, 194.00, 193.89),
    ("linbp", PLAIN): (193.83, 192.84, 192.77),
    ("bp", L2): (194.90, 193.99, 193.90),
    ("linbp", L2): (194.60, 192.95, 192.77),
    ("bp", SIGN): (195.00, 194.00, 193.97),
    ("linbp", SIGN): (194.77, 192.90, 192.86),
}


@pytest.mark.parametrize(("rule", "update"), list(REFERENCE))
def test_the_attacks_distances_are_those_of_an_independent_implementation(rule, update):
    found = simulated_attack.simulate(Attack(updates={}, runs=500), parse_rule(rule), update, CPU)
    for step, expected in zip((10, 50, 100), REFERENCE[rule, update], strict=True):
        mean, error = mean_and_error([row[step] for row in found["distance"]])
        assert abs(mean - expected) < 3 * math.hypot(error, 0.68)


def test_the_attack_is_descent_by_the_rules_gradient_inside_the_ball():
    settings = Attack(updates={}, runs=3, steps=4, eps=0.01)
    d, m, k = settings.widths
    draws = torch.Generator().manual_seed(settings.seed)
    w, v, best, start = (
        torch.randn(*shape, generator=draws, dtype=torch.float64) for shape in ((3, m, d), (3, k, m), (3, d), (3, d))
    )
    best = 1 + 2 * best
    for rule, slope in (("bp", lambda z: (z > 0).double()), ("linbp", torch.ones_like)):
        found = simulated_attack.simulate(settings, parse_rule(rule), PLAIN, CPU)
        for run in range(3):
            x, aim = start[run], v[run] @ (w[run] @ best[run]).relu()
            for step in range(settings.steps + 1):
                assert found["distance"][run][step] == pytest.approx((x - best[run]).abs().sum().item())
                z = w[run] @ x
                error = v[run] @ z.relu() - aim
                assert found["loss"][run][step] == pytest.approx(error.square().sum().item() / 2)
                gradient = w[run].T @ (slope(z) * (v[run].T @ error)) / d
                x = start[run] + (x - 1e-3 * gradient - start[run]).clamp(-0.01, 0.01)


def test_linbps_expected_weights_shrink_by_one_minus_half_the_step():
    settings = Training(runs=20, steps=1000, recorded=(0, 1000), early=100)
    found = simulated_training.simulate(settings, CPU)["linbp"]["distance"]
    ratios = [after / before for before, after in found]
    mean, error = mean_and_error(ratios)
    assert abs(mean - (1 - settings.step / 2) ** 1000) < 4 * error + 1e-3


def test_training_is_sgd_with_the_rules_gradient():
    settings = Training(runs=2, steps=3, recorded=(0, 1, 2, 3), early=1)
    for unit in (False, True):
        found = simulated_training.simulate(replace(settings, unit=unit, step=0.1), CPU)
        draws = torch.Generator().manual_seed(settings.seed)
        best = 1 + 3 * torch.randn(2, 10, generator=draws, dtype=torch.float64)
        start = torch.randn(2, 10, generator=draws, dtype=torch.float64)
        inputs = torch.Generator().manual_seed(settings.seed + 1)
        xs = [torch.randn(2, 100, 10, generator=inputs, dtype=torch.float64) for _ in range(4)]
        for rule, slope in (("bp", lambda z: (z > 0).double()), ("linbp", torch.ones_like)):
            for run in range(2):
                w = start[run]
                for step in range(4):
                    assert found[rule]["distance"][run][step] == pytest.approx((w - best[run]).abs().sum().item())
                    z = xs[step][run] @ w
                    gradient = xs[step][run].T @ (slope(z) * (z.relu() - (xs[step][run] @ best[run]).relu())) / 100
                    w = w - 0.1 * (gradient / gradient.norm() if unit else gradient)
