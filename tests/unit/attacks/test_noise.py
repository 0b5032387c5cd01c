"""Draws belong to (seed, sample, restart): not to the batch, the order, the device or the global generator."""

import torch

from backpass.attacks.noise import make_key, normal, signs, uniform


def keys(count: int, seed: int = 0, restart: int = 0) -> torch.Tensor:
    index = torch.arange(count)
    return make_key(seed, index, restart, like=index)


def splitmix64(state: int) -> int:
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_bits_are_those_of_splitmix64() -> None:
    key = torch.tensor([1234567])
    drawn = uniform(key, torch.empty(1, 5, dtype=torch.float64))
    states = [1234567 + k * 0x9E3779B97F4A7C15 for k in range(5)]
    expected = [(splitmix64(state % 2**64) >> 11) * 2.0**-53 for state in states]
    assert drawn.flatten().tolist() == expected


def test_a_sample_draws_the_same_in_any_batch() -> None:
    whole = uniform(keys(6), torch.empty(6, 3, 4, 4))
    part = uniform(keys(6)[[4, 1]], torch.empty(2, 3, 4, 4))
    assert torch.equal(part, whole[[4, 1]])


def test_channels_last_draws_the_same_numbers() -> None:
    like = torch.empty(6, 3, 4, 4)
    last = uniform(keys(6), like.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, uniform(keys(6), like))


def test_float32_and_float64_draw_the_same_up_to_rounding() -> None:
    single, double = uniform(keys(4), torch.empty(4, 50)), uniform(keys(4), torch.empty(4, 50, dtype=torch.float64))
    torch.testing.assert_close(single.double(), double, atol=2.0**-24, rtol=0)


def test_samples_restarts_and_seeds_draw_differently() -> None:
    like = torch.empty(50, 64)
    draws = torch.cat([uniform(keys(50, seed, r), like) for seed in (0, 1) for r in (0, 1)])
    assert len(torch.unique(draws, dim=0)) == 200
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.6


def test_uniform_and_normal_have_their_moments() -> None:
    u = uniform(keys(100), torch.empty(100, 10_000, dtype=torch.float64))
    n = normal(keys(100), torch.empty(100, 10_000, dtype=torch.float64))
    s = signs(keys(100), torch.empty(100, 10_000, dtype=torch.float64))
    assert 0 <= u.min() < 1e-5 < 1 - 1e-5 < u.max() < 1
    # Four standard errors of a million draws.
    for draw, mean, variance in ((u, 0.5, 1 / 12), (n, 0.0, 1.0), (s, 0.0, 1.0)):
        assert abs(draw.mean() - mean) < 4e-3 * variance**0.5
        assert abs(draw.var() - variance) < 4e-3 * variance * 2**0.5
    assert abs((n**4).mean() - 3) < 4e-3 * 96**0.5


def test_the_global_generator_is_not_touched() -> None:
    before = torch.get_rng_state()
    normal(keys(3), torch.empty(3, 7))
    assert torch.equal(torch.get_rng_state(), before)
