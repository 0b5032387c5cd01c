"""Augmentation against a loop over images, and its draws against what chance would do."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from backpass.data.augmentation import Augmentation, draw
from backpass.errors import BackpassError

M64 = (1 << 64) - 1


def batch(index, epoch=0, seed=0):
    return SimpleNamespace(index=torch.as_tensor(index), epoch=epoch, seed=seed)


def images(count, shape=(3, 8, 10), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, *shape), dtype=torch.uint8, generator=generator)


def hashed(*words):
    """splitmix64's finaliser after each word, in Python's integers."""
    z = 0
    for word in words:
        z = (z + word + 0x9E3779B97F4A7C15) & M64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
        z ^= z >> 31
    return z


def one_at_a_time(pixels, index, epoch, seed, crop, flip):
    """The same by pixel: y[i, j] = x[i + down - crop, j + right - crop], black outside, mirrored by a coin."""
    out = torch.zeros(pixels.shape)
    height, width = pixels.shape[2:]
    for sample, number in enumerate(index):
        z = hashed(0x6175676D656E7421, seed, number, epoch)
        down = ((z & (2**31 - 1)) * (2 * crop + 1) >> 31) - crop
        right = ((z >> 31 & (2**31 - 1)) * (2 * crop + 1) >> 31) - crop
        for i in range(height):
            for j in range(width):
                row, column = i + down, (width - 1 - j if flip and z >> 63 else j) + right
                if 0 <= row < height and 0 <= column < width:
                    out[sample, :, i, j] = pixels[sample, :, row, column] / 255
    return out


@pytest.mark.parametrize(("crop", "flip"), [(4, True), (2, False), (0, True), (9, True)])
def test_it_is_what_a_loop_over_pixels_gives(crop, flip):
    x, index = images(12), [0, 5, 3, 999_999, 7, 8, 9, 10, 11, 12, 13, 2]
    found = Augmentation(crop=crop, flip=flip)(x, batch(index, epoch=3, seed=17))
    torch.testing.assert_close(found, one_at_a_time(x, index, 3, 17, crop, flip))


def test_a_sample_looks_the_same_in_any_batch_and_order():
    x, index = images(64), torch.arange(100, 164)
    whole = Augmentation()(x, batch(index, epoch=2, seed=5))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    parts = [Augmentation()(x[rows], batch(index[rows], epoch=2, seed=5)) for rows in order.split(7)]
    assert torch.equal(torch.cat(parts), whole[order])


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}])
def test_another_epoch_or_seed_gives_other_images(other):
    x, index = images(64), torch.arange(64)
    one, two = Augmentation()(x, batch(index)), Augmentation()(x, batch(index, **other))
    same = sum(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert same < 6  # 64 / 162 are expected to be the same by chance


def chi_square(counts):
    expected = counts.sum() / counts.numel()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("vary", ["index", "epoch", "seed"])
def test_draws_are_uniform_and_independent_of_each_other(vary):
    """All 162 outcomes are equally likely, whichever word runs: chi-square with 161 degrees, 20,000 draws."""
    n = 20_000
    if vary == "index":
        down, right, coin = draw(3, torch.arange(n), 4, 9)
    else:
        index = torch.tensor([7])
        made = [draw(w, index, 4, 9) if vary == "seed" else draw(3, index, w, 9) for w in range(n)]
        down, right, coin = (torch.cat(parts) for parts in zip(*made, strict=True))
    assert (down.min(), down.max(), right.min(), right.max()) == (0, 8, 0, 8)
    counts = ((down * 9 + right) * 2 + coin).bincount(minlength=162).double()
    assert 161 - 4 * 322**0.5 < chi_square(counts) < 161 + 4 * 322**0.5


@pytest.mark.parametrize("step", ["index", "epoch", "seed"])
def test_draws_of_neighbours_are_independent(step):
    """The pair (draw here, draw one further) is uniform over 18 x 18 outcomes: chi-square with 323 degrees."""
    index = torch.arange(0, 80_000, 2)
    here = draw(3, index, 4, 9)
    there = {
        "index": lambda: draw(3, index + 1, 4, 9),
        "epoch": lambda: draw(3, index, 5, 9),
        "seed": lambda: draw(4, index, 4, 9),
    }[step]()
    pair = (here[0] * 2 + here[2]) * 18 + there[0] * 2 + there[2]
    assert 323 - 4 * 646**0.5 < chi_square(pair.bincount(minlength=324).double()) < 323 + 4 * 646**0.5


def test_images_may_be_floats_and_white_another_value():
    x = images(4)
    floats = Augmentation()(x.double() / 255, batch(range(4)))
    assert floats.dtype == torch.float64
    torch.testing.assert_close(floats.float(), Augmentation()(x, batch(range(4))))
    digits = torch.full((2, 1, 8, 8), 16, dtype=torch.uint8)
    assert torch.equal(Augmentation(crop=0, flip=False, white=16)(digits, batch([0, 1])), torch.ones(2, 1, 8, 8))


def test_the_images_and_the_global_random_state_are_left_alone():
    x, before = images(8), torch.get_rng_state()
    copy = x.clone()
    Augmentation()(x, batch(range(8)))
    assert torch.equal(x, copy)
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_meant_is_told():
    with pytest.raises(BackpassError, match="at least 0"):
        replace(Augmentation(), crop=-1)
    with pytest.raises(BackpassError, match=r"takes images \(B, C, H, W\)"):
        Augmentation()(torch.zeros(4, 64), batch(range(4)))
    with pytest.raises(BackpassError, match="3 indices"):
        Augmentation()(images(4), batch(range(3)))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_is_the_same_on_a_gpu():
    x, index = images(16), torch.arange(16)
    assert torch.equal(Augmentation()(x.cuda(), batch(index)).cpu(), Augmentation()(x, batch(index)))
