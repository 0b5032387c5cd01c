"""The images by which a start is chosen are not attacked."""

import pytest
import torch

from backpass import BackpassError
from backpass.data import Images, Labelled
from backpass.experiments.placing import set_aside


def images(count):
    labels = torch.arange(count)
    pixels = labels[:, None, None, None].to(torch.int16)
    return Labelled(
        name="n", split="test", description="d", images=Images(pixels=pixels, labels=labels), classes=max(1, count)
    )


@pytest.mark.parametrize(
    ("count", "limit", "attacked", "aside"),
    [(1000, 300, 300, 200), (1000, 900, 900, 100), (1000, None, 800, 200), (400, 400, 300, 100), (2, None, 1, 1)],
)
def test_they_follow_those_that_are_attacked(count, limit, attacked, aside):
    some, others = set_aside(images(count), limit, ["bp", "linbp:start=auto"])
    assert torch.equal(some.images.labels, torch.arange(attacked))
    assert torch.equal(others.images.labels, torch.arange(attacked, attacked + aside))


def test_without_a_choice_to_make_none_is_set_aside():
    some, others = set_aside(images(9), None, ["bp", "linbp:start=-2"])
    assert (len(some.images), others) == (9, None)


def test_one_image_is_too_few():
    with pytest.raises(BackpassError, match="another one to choose by"):
        set_aside(images(1), None, ["linbp:start=auto"])
