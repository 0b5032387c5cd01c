"""The digits: real, scaled exactly, split once and for all."""

import torch

from backpass.data import load_digits


def test_every_image_is_on_exactly_one_side():
    split = load_digits()
    assert (len(split.train), len(split.test)) == (1347, 450)
    everything = torch.cat([split.train.pixels, split.test.pixels]).flatten(1)
    from sklearn.datasets import load_digits as original

    expected = torch.from_numpy(original().data).to(torch.uint8)
    assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, expected.tolist()))


def test_images_are_floats_in_the_unit_range_and_exact():
    split = load_digits()
    assert split.train.pixels.dtype == torch.uint8
    assert split.train.x.shape == (1347, 1, 8, 8)
    assert (split.train.x.min(), split.train.x.max()) == (0.0, 1.0)
    assert torch.equal(split.train.x * 16, split.train.pixels.float())


def test_both_sides_hold_every_class_in_proportion_whatever_the_global_seed():
    torch.manual_seed(1)
    split = load_digits()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(split.test.pixels, load_digits().test.pixels)
    assert torch.equal(before, torch.get_rng_state())
    totals = split.train.y.bincount() + split.test.y.bincount()
    assert ((split.test.y.bincount() - 0.25 * totals).abs() <= 0.5).all()
