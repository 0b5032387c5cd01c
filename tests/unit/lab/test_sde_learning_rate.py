"""The regression problems on which learning rates are compared, and the comparison in small."""

import pytest
import torch

from backpass.lab.bench.experiment import Bench
from backpass.lab.experiments.sde.learning_rate import EXPERIMENTS, Regression
from backpass.lab.experiments.sde.regression_problems import PROBLEMS
from backpass.lab.experiments.sde.regression_rates import RATES, regress
from backpass.sde import AdversarialSDE

BY_NAME = {problem.name: problem for problem in PROBLEMS}
IDS = list(BY_NAME)


@pytest.mark.parametrize("name", IDS)
def test_the_gradient_is_that_of_the_attack_carried_out_step_by_step(name):
    problem = BY_NAME[name]
    x, y = next(problem.batches(0, 1))
    theta = torch.randn(problem.size, generator=torch.Generator().manual_seed(1)) / problem.size**0.5
    sde = AdversarialSDE(
        lambda theta, x, y: (x @ theta - y).square() / 2,
        (x, y),
        eta_outer=0.1,
        steps=problem.steps,
        eta_inner=problem.eta_inner,
    )
    torch.testing.assert_close(problem.gradients(theta[None], x, y)[0], sde.mean_field(theta), rtol=1e-4, atol=1e-5)
    attacked = problem.attacked(theta, x, y)
    torch.testing.assert_close(
        (attacked @ theta - y).square().mean() / 2, sde.adversarial_loss(theta), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", IDS)
def test_the_minimum_and_the_field_are_those_of_many_samples(name):
    problem = BY_NAME[name]
    minimum, curvature = problem.minimum
    assert float(problem.field(minimum).norm()) < 1e-9
    assert float(problem.excess(minimum)) == 0
    assert torch.linalg.eigvalsh(curvature)[0] > 0
    theta = minimum.float() + 0.1
    means = torch.stack([problem.gradients(theta[None], x, y)[0] for x, y in problem.batches(3, 4000)]).double()
    error = means.std(0) / 4000**0.5
    assert ((means.mean(0) - problem.field(theta.double())).abs() < 6 * error).all()


def test_the_largest_rate_is_stable_and_the_schedules_share_their_batches():
    found = regress(PROBLEMS[0], seed=0, steps=60, every=10)
    assert len(found["fixed"]) == len(found["Polyak"]) == RATES
    assert found["fixed"][0] < float(PROBLEMS[0].excess(torch.zeros(PROBLEMS[0].size)))
    again = regress(PROBLEMS[0], seed=0, steps=60, every=10)
    assert found == again


def test_the_comparison_in_small():
    experiment = EXPERIMENTS[0]
    outcome = experiment.measure(Regression(steps=30, runs=2), Bench())
    assert [table.id for table in outcome.tables] == ["effective", "attacked"]
    assert len(outcome.tables[0].columns) == 1 + len(PROBLEMS)
    assert len(outcome.claims) == 7
