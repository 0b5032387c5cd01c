"""The problems on which learning rates are compared, and the tables of the comparisons in small."""

import math

import pytest
import torch

from backpass.data import load_data
from backpass.errors import BackpassError
from backpass.experiments import adversarial_rates
from backpass.experiments.adversarial_rates import Attacked, compare_rates
from backpass.experiments.experiment import Arm, Context, Runs
from backpass.experiments.image_rates import Images, train_images
from backpass.experiments.rate_ends import end
from backpass.experiments.regression_problems import PROBLEMS
from backpass.experiments.regression_rates import RATES, Regression, regress
from backpass.papers import learning_rates
from backpass.sde import AdversarialSDE
from support.experiments import Shift, draw, judged

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
        steps=problem.attack_steps,
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
    settings = Regression(problem=PROBLEMS[0], steps=60)
    found = regress(settings, 0, Context())
    assert len(found["fixed"]) == len(found["Polyak"]) == RATES
    assert found["fixed"][0] < float(PROBLEMS[0].excess(torch.zeros(PROBLEMS[0].size)))
    assert found == regress(settings, 0, Context())


@pytest.mark.parametrize("problem", adversarial_rates.PROBLEMS, ids=lambda problem: problem.name)
def test_the_minimum_is_one_and_frozen_curvature_is_smaller(problem):
    theta, derivative = problem.minimum
    assert float(problem.sde.mean_field(theta).norm()) < 1e-8
    assert torch.linalg.eigvals(derivative).real.min() > 0
    assert float(problem.excess(theta)) == 0
    assert 0 < problem.frozen_share() < 0.7


def runs_of(name, *outcomes):
    arm = Arm(name=name, work=draw, candidates={"": Shift(shift=0.0)})
    return Runs(arm=arm, by_candidate={"": outcomes}, chosen="")


def test_the_best_rate_is_that_of_the_lowest_mean_over_the_seeds():
    one = {"fixed": [3.0, 1.0, math.nan], "fixed attacked": [5.0, 6.0, 1.0], "controlled": [2.0]}
    two = {"fixed": [3.0, 7.0, 0.0], "fixed attacked": [7.0, 8.0, 1.0], "controlled": [6.0]}
    fixed, controlled = (runs_of(name, one, two) for name in ("fixed, best of 10 rates", "controlled"))
    assert end("x").values(fixed) == [3.0, 3.0]  # of the means 3, 4 and none
    assert end("x").values(controlled) == [2.0, 6.0]
    assert end("x", metric=" attacked").values(fixed) == [5.0, 7.0]  # at the rate chosen before
    assert end("x", metric=" attacked", chosen_by=" attacked").values(fixed) == [1.0, 1.0]
    logs = end("x", log=True, over="fixed, best of 10 rates").values(controlled)
    assert logs == pytest.approx([math.log(2 / 3), math.log(2)])


def test_the_comparison_on_regression_pools_the_problems(tmp_path):
    claims, result = judged(tmp_path, learning_rates.regression(30, 2))
    assert len(claims) == 7
    assert {claim.n for claim in claims.values()} == {len(PROBLEMS)}
    found = [[regress(Regression(problem=one, steps=30), seed, Context()) for seed in (0, 1)] for one in PROBLEMS]
    gaps = [sum(math.log(run["controlled"][0] / run["cosine"][0]) for run in runs) / 2 for runs in found]
    assert claims["below-cosine-from-the-largest-rate"].estimate == pytest.approx(sum(gaps) / len(gaps))
    assert [len(table.rows) for table in result.tables] == [10] * len(PROBLEMS)


def test_the_comparison_with_adversaries_judges_each_problem(tmp_path):
    claims, result = judged(tmp_path, learning_rates.adversarial(12, 2, 6))
    name = adversarial_rates.PROBLEMS[1].name
    runs = [compare_rates(Attacked(problem=name, steps=12, every=6), seed, Context()) for seed in (0, 1)]
    best = min(range(10), key=lambda k: sum(run["fixed"][k] for run in runs))
    gaps = [math.log(run["controlled"][0] / run["fixed"][best]) for run in runs]
    assert claims["below-fixed-1"].estimate == pytest.approx(sum(gaps) / 2)
    assert {claim.verdict for claim in claims.values()} == {"undecided"}  # two runs are too few
    assert [len(table.rows) for table in result.tables] == [3] * len(adversarial_rates.PROBLEMS)


def test_the_comparison_on_images_has_every_schedule_from_the_same_weights(tmp_path):
    try:
        load_data("mnist", split="train")
    except BackpassError as error:
        pytest.skip(str(error))
    sizes = {"images": 100, "test": 50, "epochs": 1, "batch": 50}
    claims, result = judged(tmp_path, learning_rates.images(1, ("mlp",), **sizes))
    assert len(claims) == 15
    assert [len(table.rows) for table in result.tables] == [7, 7]
    found = train_images(Images(model="mlp", attack_steps=3, **sizes), 0, Context())
    assert {len(found[name]) for name in ("fixed", "Polyak")} == {10}
    gap = found["controlled attacked"][0] - found["linear attacked"][0]
    slug = "adversary-mlp-adversarial-k-3-below-linear-decay-from-the-largest-rate"
    assert claims[slug].estimate == pytest.approx(gap)
