"""The normalisation of a data set: known by name, or measured."""

import pytest
import torch

from backpass.data import Images, load_digits
from backpass.data.normalisation import Normalisation, known_normalisation, measured_normalisation
from backpass.errors import BackpassError


def test_what_is_measured_is_mean_and_standard_deviation_of_the_pixels_as_floats():
    pixels = torch.randint(256, (50, 3, 7, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[:, 1] //= 3
    images = Images(pixels=pixels, labels=torch.zeros(50))
    found = measured_normalisation(images)
    std, mean = torch.std_mean(images.x, (0, 2, 3), correction=0)
    assert found.mean == pytest.approx(mean.tolist(), abs=6e-5)
    assert found.std == pytest.approx(std.tolist(), abs=6e-5)


def test_white_and_constant_channels_are_respected():
    assert known_normalisation("digits") == measured_normalisation(load_digits().train)
    black = Images(pixels=torch.zeros(4, 1, 2, 2, dtype=torch.uint8), labels=torch.zeros(4))
    assert measured_normalisation(black) == Normalisation((0.0,), (1.0,))


@pytest.mark.parametrize("name", ["cifar10", "uoft-cs/cifar10", "cifar10:label=label", "uoft-cs/cifar10:revision=main"])
def test_a_data_set_is_known_however_it_is_asked_for(name):
    assert known_normalisation(name) == Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert known_normalisation("my_images") is None


def test_a_normalisation_that_cannot_be_meant_is_told():
    with pytest.raises(BackpassError, match="every std above 0"):
        Normalisation((0.5, 0.5), (0.5,))
