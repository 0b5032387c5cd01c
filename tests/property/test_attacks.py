"""Properties of threat models and of attacks, on drawn images, radii and settings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from backpass.attacks import APGD, FAB, FGSM, IFGSM, MIFGSM, PGD, Square
from backpass.attacks.losses import margin
from backpass.attacks.noise import make_key
from backpass.attacks.threat import make_threat

NORM = st.sampled_from(["linf", "l2"])
DTYPE = st.sampled_from([torch.float32, torch.float64])
EPS = st.floats(0.0, 1.0)
SEED = st.integers(0, 2**63)
BOUNDS = st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (-2.5, 3.0)])


def images(seed, dtype, bounds, shape=(4, 2, 3, 3)):
    g = torch.Generator().manual_seed(seed % 2**31)
    lo, hi = bounds
    x = torch.rand(shape, generator=g, dtype=torch.float64) * (hi - lo) + lo
    return x.to(dtype).clamp(lo, hi), torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


@given(NORM, DTYPE, EPS, SEED, BOUNDS, st.floats(1e-6, 1e6))
@settings(max_examples=150, deadline=None)
def test_projection_is_idempotent_and_stays_in_ball_and_bounds(norm, dtype, eps, seed, bounds, far):
    threat = make_threat(norm, eps, bounds)
    x, direction = images(seed, dtype, bounds)
    once = threat.project(x, x + far * direction)
    assert bool(threat.contains(x, once).all())
    assert once.min() >= bounds[0]
    assert once.max() <= bounds[1]
    assert torch.equal(threat.project(x, once.clone()), once)


@given(NORM, DTYPE, EPS, SEED, BOUNDS)
@settings(max_examples=80, deadline=None)
def test_projection_leaves_alone_what_is_inside(norm, dtype, eps, seed, bounds):
    threat = make_threat(norm, eps, bounds)
    x, direction = images(seed, dtype, bounds)
    inside = (x + 0.5 * eps * threat.direction(direction)).clamp(*bounds)
    assert torch.equal(threat.project(x, inside.clone()), inside)


@given(NORM, DTYPE, st.floats(0.01, 1.0), SEED, BOUNDS)
@settings(max_examples=80, deadline=None)
def test_a_random_start_is_feasible_and_random(norm, dtype, eps, seed, bounds):
    threat = make_threat(norm, eps, bounds)
    x, _ = images(seed, dtype, bounds)
    index = torch.arange(4)
    first, second = (threat.start(x, make_key(seed, index, r, like=index)) for r in (0, 1))
    assert bool(threat.contains(x, first).all())
    assert not torch.equal(first, second)


@given(NORM, DTYPE, SEED, st.floats(-30, 30))
@settings(max_examples=80, deadline=None)
def test_the_direction_is_the_steepest_of_unit_size(norm, dtype, seed, power):
    threat = make_threat(norm, 1.0, (0.0, 1.0))
    other, g = images(seed, dtype, (-1.0, 1.0))
    g = g * 10.0**power  # as small as a confident network's gradient
    d = threat.direction(g)
    torch.testing.assert_close(threat.size(d), torch.ones(4, dtype=torch.float64), atol=1e-5, rtol=0)
    rival = other / threat.size(other).view(-1, 1, 1, 1).to(dtype)
    scale = g.abs().amax()
    gain, lesser = ((g / scale * v).flatten(1).sum(1) for v in (d, rival))
    assert bool((gain >= lesser - 1e-5).all())


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed % 1000)
        return nn.Sequential(nn.Conv2d(2, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))


ATTACKS = st.sampled_from(
    [
        lambda **s: FGSM(**s),
        lambda **s: IFGSM(**s, step=0.1, steps=3),
        lambda **s: MIFGSM(**s, step=0.1, steps=3, diversity=0.5, noise=0.1),
        lambda **s: PGD(**s, step=0.1, steps=3, restarts=3),
        lambda **s: APGD(**s, steps=8, loss="dlr-targeted", targets=2),
        lambda **s: FAB(**s, steps=3, targets=2),
        lambda **s: Square(**s, queries=6),
    ]
)


@given(ATTACKS, NORM, EPS, SEED, BOUNDS, st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_final_image_never_leaves_ball_or_bounds(make, norm, eps, seed, bounds, early_stop):
    x, _ = images(seed, torch.float32, bounds)
    model = network(seed)
    result = make(eps=eps, norm=norm, bounds=bounds, seed=seed, early_stop=early_stop)(model, x, model(x).argmax(1))
    assert bool(make_threat(norm, eps, bounds).contains(x, result.x_adv).all())
    assert result.x_adv.min() >= bounds[0]
    assert result.x_adv.max() <= bounds[1]


class FirstLoss(nn.Module):
    """Keeps the margin of the first images that the model is asked about: those of the start."""

    def __init__(self, model, y):
        super().__init__()
        self.model, self.y, self.first = model, y, None

    def forward(self, x):
        logits = self.model(x)
        if self.first is None:
            self.first = margin(logits, self.y).detach()
        return logits


@pytest.mark.parametrize("make", [lambda **s: APGD(**s, steps=8), lambda **s: Square(**s, queries=8)])
@given(norm=NORM, eps=st.floats(0.01, 0.5), seed=SEED, early_stop=st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_best_so_far_attack_never_ends_below_its_start(make, norm, eps, seed, early_stop):
    x, _ = images(seed, torch.float32, (0.0, 1.0))
    model = network(seed)
    watched = FirstLoss(model, model(x).argmax(1))
    attack = make(eps=eps, norm=norm, seed=seed, loss="margin", early_stop=early_stop)
    loss = attack(watched, x, watched.y).loss
    assert bool((loss >= watched.first - 1e-6).all())
