"""The comparison at its full size: 200 steps, 100 paths of each chain and SDE."""

from dataclasses import replace

import pytest

from backpass.experiments.experiment import Context
from backpass.experiments.robustness import Paired, compare_slopes, predict_paths, run_paths

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def predicted():
    modes = {"SGD": replace(Paired(), adversarial=False), "AT": Paired(), "AT, B": replace(Paired(), mode="expanded")}
    return {name: predict_paths(settings, 0, Context()) for name, settings in modes.items()}


@pytest.mark.parametrize("who", ["SGD", "AT"])
@pytest.mark.parametrize("quantity", ["gradient_penalty", "expected_loss"])
def test_the_exact_sde_predicts_every_recorded_mean(predicted, who, quantity):
    """Within three standard errors plus 5 %, up to T = 20."""
    assert max(predicted[who][f"excess {quantity}"]) <= 0


def test_the_adversary_lowers_the_slope_of_the_input_gradient_almost_everywhere():
    slopes = compare_slopes(Paired(), 0, Context())["slope"]
    assert len(slopes) == 400
    assert sum(slope < 0 for slope in slopes) >= 0.95 * 400


def test_the_input_gradient_ends_below_half_of_that_of_sgd_and_the_clean_loss_above():
    trained, plain = (run_paths(replace(Paired(), adversarial=one), 0, Context()) for one in (True, False))

    def end(found, quantity):
        return sum(path[-1] for path in found[quantity])

    assert end(trained, "gradient_penalty") < 0.5 * end(plain, "gradient_penalty")
    assert end(trained, "expected_loss") > end(plain, "expected_loss")


def test_the_exact_sde_is_closer_than_the_expanded_one_in_the_end(predicted):
    assert predicted["AT"]["gap gradient_penalty"][-1] < predicted["AT, B"]["gap gradient_penalty"][-1]
