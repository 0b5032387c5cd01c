"""The comparison at its full size: 200 steps, 100 paths of each chain and SDE."""

import pytest
import torch

from backpass.lab.experiments.sde.compare import Study, measure
from backpass.lab.experiments.sde.compare_result import gap, tolerance

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured():
    threads = torch.get_num_threads()
    yield measure(Study())
    torch.set_num_threads(threads)


@pytest.mark.parametrize("who", ["SGD", "AT"])
@pytest.mark.parametrize("quantity", ["gradient_penalty", "expected_loss"])
def test_the_exact_sde_predicts_every_recorded_mean(measured, who, quantity):
    """Within three standard errors plus 5 %, up to T = 20."""
    assert (gap(measured, quantity, who) <= tolerance(measured, quantity, who)).all()


def test_the_adversary_lowers_the_slope_of_the_input_gradient_almost_everywhere(measured):
    assert len(measured.slopes) == 400
    assert (measured.slopes < 0).double().mean() >= 0.95


def test_the_input_gradient_ends_below_half_of_that_of_sgd_and_the_clean_loss_above(measured):
    penalty, clean = measured.values["gradient_penalty"], measured.values["expected_loss"]
    assert penalty["AT"][-1].mean() < 0.5 * penalty["SGD"][-1].mean()
    assert clean["AT"][-1].mean() > clean["SGD"][-1].mean()


def test_the_exact_sde_is_closer_than_the_expanded_one_in_the_end(measured):
    exact, expanded = (gap(measured, "gradient_penalty", "AT", mode)[-1] for mode in ("C", "B"))
    assert exact < expanded
