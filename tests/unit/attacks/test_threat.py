"""The ball: what rounding may do to an image that was projected, and not a bit more."""

import pytest
import torch

from backpass.attacks.threat import make_threat

ULP = 2.0**-23  # of float32

# Two roundings of the largest number: of 1 + eps for a pixel, of the length of the all-ones image and eps for all four.
SLACK = {"linf": 2 * ULP * (1 + 0.5), "l2": 2 * ULP * (2 + 0.5)}


@pytest.mark.parametrize("norm", SLACK)
@pytest.mark.parametrize(("share", "inside"), [(0.0, True), (1.0, True), (1 + 1e-6, False)])
def test_an_image_may_be_two_roundings_outside(norm, share, inside):
    x = torch.zeros(1, 4)
    z = torch.zeros(1, 4, dtype=torch.float64)
    z[0, 1] = 0.5 + share * SLACK[norm]
    assert make_threat(norm, 0.5, (0.0, 1.0)).contains(x, z).item() is inside


@pytest.mark.parametrize("norm", SLACK)
@pytest.mark.parametrize("value", [-1e-12, 1 + 1e-12, float("nan")])
def test_the_bounds_are_exact_and_a_nan_is_outside(norm, value):
    x = torch.full((1, 4), 0.5, dtype=torch.float64)
    z = x.clone()
    z[0, 2] = value
    assert not make_threat(norm, 10.0, (0.0, 1.0)).contains(x, z).item()


def test_an_image_on_the_sphere_is_left_as_it_is():
    threat = make_threat("l2", 0.5, (0.0, 1.0))
    x, z = torch.zeros(1, 4), torch.tensor([[0.5 + 2.0**-24, 0.0, 0.0, 0.0]])
    assert torch.equal(threat.project(x, z.clone()), z)
