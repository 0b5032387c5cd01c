"""Learning rates in adversarial training: the problems, and the comparison in small."""

import pytest
import torch

from backpass.lab.bench.experiment import Bench
from backpass.lab.experiments.sde.adversarial_rates import EXPERIMENTS, PROBLEMS, Sizes


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_the_minimum_is_one_and_frozen_curvature_is_smaller(problem):
    theta, derivative = problem.minimum
    assert float(problem.sde.mean_field(theta).norm()) < 1e-8
    assert torch.linalg.eigvals(derivative).real.min() > 0
    assert float(problem.excess(theta)) == 0
    assert 0 < problem.frozen_share() < 0.7


def test_the_comparison_in_small():
    (experiment,) = EXPERIMENTS
    outcome = experiment.measure(Sizes(steps=12, runs=2, every=6), Bench())
    assert len(outcome.claims) == len(outcome.tables[0].rows) == len(PROBLEMS)
    assert all(claim.verdict == "undecided" for claim in outcome.claims)  # two runs are too few
