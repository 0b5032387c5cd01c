"""Details on which an answer depends and which no larger test would miss."""

import pytest
import torch
from scipy import stats
from torch import nn

from backpass.attacks import APGD, IFGSM, PGD, apgd, evaluate
from backpass.attacks.jobs import Jobs
from backpass.attacks.noise import make_key
from backpass.attacks.saving import to_uint8
from backpass.attacks.threat import make_threat


class Undefined(nn.Module):
    """Logits that are NaN or inf where the first pixel is above .5."""

    def __init__(self, value):
        super().__init__()
        self.weight, self.value = nn.Parameter(torch.ones(3, 4)), value

    def forward(self, x):
        z = x.flatten(1) @ (self.weight * torch.tensor([[1.0], [0.5], [0.0]])).t()
        return torch.where(x.flatten(1)[:, :1] > 0.5, torch.tensor([0.0, self.value, 0.0]), z)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("attack", [PGD(eps=0.2, step=0.1), APGD(eps=0.2, steps=5)])
def test_logits_that_are_not_finite_are_no_success(value, attack):
    x, y = torch.full((4, 1, 2, 2), 0.4), torch.zeros(4).long()
    result = attack(Undefined(value), x, y)
    assert not result.success.any()


def test_shards_know_the_targets(cnn, held_out, tmp_path):
    data = held_out.x[:30], held_out.y[:30]
    attack = PGD(eps=0.1, steps=2, targeted=True)
    for targets, reused in (("next", 0), ("second", 0), (lambda y: (y + 2) % 10, 0), ("next", 1)):
        report = evaluate(cnn, data, attack, targets=targets, resume=tmp_path)
        assert report.shards_reused == reused, targets


def test_shards_know_masks_and_radii(cnn, held_out, tmp_path):
    data = held_out.x[:30], held_out.y[:30]
    mask = torch.ones(8, 8, dtype=torch.bool)
    half = mask.tril()
    for settings, reused in (({}, 0), ({"mask": half}, 0), ({"radii": [0.1]}, 0), ({"mask": half}, 1)):
        assert evaluate(cnn, data, PGD(steps=2), resume=tmp_path, **settings).shards_reused == reused


def test_a_random_model_has_one_fingerprint(held_out, tmp_path):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            return self.linear(x.flatten(1)) + 0.5 * torch.randn(len(x), 10)

    model, data = Noisy(), (held_out.x[:20], held_out.y[:20])
    for reused in (0, 1):
        torch.manual_seed(reused)
        assert evaluate(model, data, PGD(steps=2), resume=tmp_path).shards_reused == reused


@pytest.mark.parametrize("masked", [False, True])
def test_the_l2_start_is_uniform_in_the_ball(masked):
    index = torch.arange(4000)
    x = torch.full((4000, 1, 2, 3), 0.5, dtype=torch.float64)
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[..., :2] = True
    threat = make_threat("l2", 0.4, (0.0, 1.0), mask if masked else None)
    delta = threat.start(x, make_key(0, index, like=index)) - x
    radius = delta.flatten(1).norm(dim=1) / 0.4
    # The share of the ball inside of radius r is r^D.
    assert stats.kstest(radius ** (4 if masked else 6), "uniform").pvalue > 0.01
    if masked:
        assert not delta[~mask].any()


def test_what_only_a_noisy_view_fools_goes_on():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.constant_(model[1].weight, 0.0)
    with torch.no_grad():
        model[1].weight[0], model[1].bias[0] = 1.0, -1.9
    x, y = torch.full((8, 1, 2, 2), 0.5), torch.zeros(8).long()
    result = IFGSM(eps=0.0, step=0.0, steps=5, noise=0.5)(model, x, y)
    assert result.gradients == 5 * 8
    assert not result.success.any()


HALVED = [  # rises of 10, halved at the last checkpoint, best loss risen since: halved now
    (10, False, True, False),
    (8, False, True, False),
    (7, False, True, True),
    (10, False, False, True),
    (10, True, False, False),
    (7, True, False, True),
]


@pytest.mark.parametrize(("rises", "before", "risen", "halved"), HALVED)
@pytest.mark.parametrize("published", [False, True])
def test_the_step_is_halved_without_progress(rises, before, risen, halved, published):
    x, index = torch.rand(1, 1, 2, 2), torch.zeros(1).long()
    jobs = Jobs(x, index, index, index, index, make_threat("linf", 0.1, (0.0, 1.0)))
    one = torch.ones(1)
    state = apgd.Progress(
        jobs=jobs, z=x, seen=x, record=torch.full((1, 3), -1), point=x, before=x, gradient=x, size=one, value=one,
        best_point=x + 1, best_gradient=x, best_value=2 * one, kept_value=one, kept_fooled=one < 0, rises=rises * one,
        mark_value=one if risen else 2 * one, mark_halved=(one > 0) if before else (one < 0),
    )  # fmt: skip
    after = APGD(eps=0.1, published=published)._halve(state, 1, 10, 40)
    assert after.size.item() == (0.5 if halved else 1.0)
    assert torch.equal(after.point, state.best_point if halved else state.point)
    assert after.record.tolist() == [[-1, 40 if halved else -1, -1]]
    assert after.rises.item() == 0
    assert after.mark_halved.item() is halved


def test_every_restart_tries_the_same_targets(cnn, held_out, monkeypatch):
    ranks = []
    real = apgd.likely_wrong

    def spy(logits, y, rank):
        ranks.extend(rank.unique().tolist())
        return real(logits, y, rank)

    monkeypatch.setattr(apgd, "likely_wrong", spy)
    APGD(eps=0.01, steps=2, loss="dlr-targeted", restarts=3, targets=2, early_stop=False)(
        cnn, held_out.x[:4], held_out.y[:4], batch_size=4
    )
    assert sorted(ranks) == [0, 0, 0, 1, 1, 1]


def test_rounding_inwards_keeps_pixels_that_did_not_move():
    x = (torch.arange(256.0) / 255).view(1, 1, 16, 16)
    z = x.clone()
    z[0, 0, 0, 0] = 0.4 / 255 + 0.3 / 255  # the nearest grid point is outside of the ball
    threat = make_threat("linf", 0.7 / 255, (0.0, 1.0))
    rounded = to_uint8(x, z, threat).flatten().tolist()
    assert rounded == [0, *range(1, 256)]
