"""Batches with and without replacement, and the stationary law of the latter."""

from collections import Counter

import pytest
import torch

from backpass import BackpassError, UnknownNameError
from backpass.sde import AdversarialSDE, permuted_law, run_chain, stationary
from backpass.sde.sampling import draw_batches
from support.sde import D, smooth_data, smooth_loss, smooth_theta


def batches(sampling, count, *, samples=6, size=2, paths=(3,)):
    draw = draw_batches(sampling, samples, size, paths, torch.Generator().manual_seed(0), torch.device("cpu"))
    return [next(draw) for _ in range(count)]


def test_an_epoch_without_replacement_takes_every_sample_once():
    for start in (0, 3):
        epoch = torch.cat(batches("permuted", 6)[start : start + 3], -1)
        assert torch.equal(epoch.sort(-1).values, torch.arange(6).expand(3, -1))
    orders = torch.cat(batches("permuted", 300, paths=()), -1).view(-1, 6)
    assert len({tuple(order.tolist()) for order in orders}) > 70
    assert all(40 < count[1] < 160 for place in range(6) for count in [(0, int((orders[:, place] == 0).sum()) * 6)])


def test_batches_with_replacement_repeat_samples():
    repeats = Counter(len(set(row.tolist())) for batch in batches("iid", 200) for row in batch)
    assert repeats[1] / 600 == pytest.approx(1 / 6, abs=0.05)


def test_what_a_batch_leaves_over_is_left_out():
    epoch = torch.cat(batches("permuted", 2, samples=5), -1)
    assert all(len(set(row.tolist())) == 4 for row in epoch)


def logistic(theta, x, y):
    return torch.nn.functional.softplus(-y * (x @ theta)) + 0.05 * theta.square().sum()


def problem(eta, **settings):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 2, generator=generator, dtype=D)
    y = (x[:, 0] - 0.5 * x[:, 1] + 0.8 * torch.randn(24, generator=generator, dtype=D)).sign()
    return AdversarialSDE(logistic, (x, y), eta_outer=eta, batch_size=4, steps=2, eta_inner=0.2, **settings)


def test_the_law_without_replacement_is_that_of_long_runs():
    sde, start = problem(0.2), torch.zeros(2, dtype=D)
    law = permuted_law(sde, start, generator=torch.Generator().manual_seed(0))
    assert law.epoch == 6
    paths = run_chain(
        sde, law.mean, 600, paths=300, generator=torch.Generator().manual_seed(2), record=100, sampling="permuted"
    ).values[30:]
    ends = paths.flatten(0, 1)
    torch.testing.assert_close(ends.T.cov().trace(), law.covariance.trace(), rtol=0.15, atol=0)
    assert ((ends.mean(0) - law.mean).abs() < 0.02 * (law.theta - law.mean).norm() + 4 * ends.std(0) / 400**0.5).all()
    assert law.within.trace() > 2 * law.covariance.trace()


def test_it_is_of_a_higher_order_in_the_learning_rate_than_with_replacement():
    """The covariance at the end of an epoch falls as eta^3, with replacement as eta."""
    shares = []
    for eta in (0.1, 0.05, 0.025):
        sde = problem(eta)
        law = permuted_law(sde, torch.zeros(2, dtype=D), generator=torch.Generator().manual_seed(0))
        shares.append(float(law.covariance.trace() / stationary(sde, torch.zeros(2, dtype=D)).chain_covariance.trace()))
    assert shares[0] < 0.1
    assert shares[0] / shares[1] == pytest.approx(4, rel=0.2)
    assert shares[1] / shares[2] == pytest.approx(4, rel=0.2)


def test_mistakes_are_named():
    sde = AdversarialSDE(smooth_loss, smooth_data(), eta_outer=0.1, batch_size=7)
    with pytest.raises(UnknownNameError, match="Did you mean 'permuted'"):
        run_chain(sde, smooth_theta(), 1, sampling="permute")
    with pytest.raises(BackpassError, match="without replacement"):
        run_chain(sde, smooth_theta(), 1, sampling="permuted")
    with pytest.raises(BackpassError, match="P <= 32"):
        permuted_law(sde, torch.zeros(40, dtype=D))
