"""Minimum-norm attacks: exact on linear models, FMN as a slow transcription, distances beyond eps."""

import math

import pytest
import torch
from torch import nn

from backpass.attacks import FAB, FMN, PGD
from backpass.attacks.hyperplane import towards_hyperplane

NORMS = {"linf": (1.0, torch.inf), "l2": (2.0, 2.0), "l1": (torch.inf, 1.0)}  # dual, norm


class Halfspaces(nn.Module):
    """z_j = <w_j, x>, without bounds that matter: the distance to class j is the gap over the dual norm."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))

    def forward(self, x):
        return x.flatten(1) @ self.w.t()


@pytest.fixture
def linear():
    model = Halfspaces()
    x = torch.randn(20, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model, x, model(x).argmax(1)


def distances(model, x, y, dual):
    logits = model(x)
    gaps = logits.gather(1, y[:, None]) - logits
    sizes = torch.stack([(model.w[y] - model.w[j]).norm(dual, dim=1) for j in range(4)], 1)
    return (gaps / sizes.clamp_min(1e-300)).masked_fill(torch.eye(4, dtype=torch.bool)[y], torch.inf).amin(1)


ATTACKS = {
    "FMN": (lambda norm: FMN(norm=norm, steps=300, bounds=(-50.0, 50.0)), 0.01),
    "FAB": (lambda norm: FAB(norm=norm, steps=20, targets=None, bounds=(-50.0, 50.0)), 0.06),
    "FAB targeted": (lambda norm: FAB(norm=norm, steps=20, targets=3, bounds=(-50.0, 50.0)), 0.06),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_on_a_linear_model_the_distance_is_the_exact_one(norm, name, linear):
    make, tolerance = ATTACKS[name]
    model, x, y = linear
    result = make(norm)(model, x, y)
    exact = distances(model, x, y, NORMS[norm][0])
    assert result.success.all()
    assert bool((result.distance >= exact * (1 - 1e-9)).all())
    ratio = result.distance / exact
    assert ratio.median() < 1 + tolerance
    size = (result.x_adv - x).flatten(1).norm(NORMS[norm][1], dim=1)
    torch.testing.assert_close(result.distance, size)


def slow_fmn(model, x, y, norm, steps, step):
    """One sample, by the words of algorithm 1."""
    p, q = NORMS[norm][1], NORMS[norm][0]
    delta, best, radius, found = torch.zeros_like(x), math.inf, 0.0, False
    for i in range(steps):
        c = (1 + math.cos(math.pi * i / steps)) / 2
        a, gamma = step / 100 + step * 0.99 * c, 0.001 + 0.049 * c
        z = (x + delta).requires_grad_()
        logits = model(z)[0]
        other = torch.cat([logits[:y], logits[y + 1 :]]).max()
        margin = other - logits[y]
        g = torch.autograd.grad(margin, z)[0]
        size = delta.flatten().norm(p).item()
        if margin > 0:
            found, best = True, min(best, size)
            radius = min(radius * (1 - gamma), best)
        elif found:
            radius = radius * (1 + gamma)
        else:
            radius = (1 + gamma) * max(radius, size + abs(margin.item()) / g.flatten().norm(q).item())
        delta = delta + a * g / g.norm()
        if norm == "linf":
            delta = delta.clamp(-radius, radius)
        elif delta.norm() > radius:
            delta = delta * radius / delta.norm()
        delta = (x + delta).clamp(0, 1) - x
    return best


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fmn_is_algorithm_1(cnn, held_out, norm):
    cnn, x, y = cnn.double(), held_out.x[:8].double(), held_out.y[:8]
    result = FMN(norm=norm, steps=30, step=0.5)(cnn, x, y)
    for i in range(8):
        slow = slow_fmn(cnn, x[i : i + 1], int(y[i]), norm, 30, 0.5)
        assert result.distance[i].item() == pytest.approx(slow, abs=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_median_is_at_most_that_of_a_bisection_over_pgd(cnn, held_out, norm):
    x, y = held_out.x[:24], held_out.y[:24]
    found = FMN(norm=norm, steps=100)(cnn, x, y).distance
    low, high = torch.zeros(24), torch.full((24,), {"linf": 1.0, "l2": 5.0, "l1": 30.0}[norm])
    for _ in range(9):
        middle = (low + high) / 2
        result = PGD(eps=middle, norm=norm, step=float(middle.median()) / 5, steps=30, restarts=1)(cnn, x, y)
        low, high = torch.where(result.success, low, middle), torch.where(result.success, middle, high)
    assert found.median() <= 1.02 * high.median()


@pytest.mark.parametrize("make", [FMN, lambda **s: FAB(targets=None, **s), lambda **s: FAB(targets=4, **s)])
def test_distances_beyond_eps_are_returned(make, cnn, held_out):
    x, y = held_out.x[:24], held_out.y[:24]
    free = make(steps=15)(cnn, x, y)
    assert free.success.all()
    far = make(steps=15, eps=0.05, early_stop=False)(cnn, x, y)
    torch.testing.assert_close(far.distance, free.distance)
    assert torch.equal(far.success, free.distance <= 0.05)
    early = make(steps=15, eps=0.05)(cnn, x, y)
    assert bool((early.success | ~far.success).all())
    assert bool(((early.x_adv - x).abs().amax((1, 2, 3)) <= 0.05 + 1e-6).all())
    assert early.gradients < far.gradients


def test_a_misclassified_image_has_distance_0(cnn, held_out):
    x, y = held_out.x[:8], (held_out.y[:8] + 1) % 10
    for attack in (FMN(steps=3), FAB(steps=3)):
        result = attack(cnn, x, y)
        wrong = cnn(x).argmax(1) != y
        assert bool((result.distance[wrong] == 0).all())
        assert torch.equal(result.x_adv[wrong], x[wrong])


def test_further_searches_of_fmn_find_nearer_images(cnn, held_out):
    x, y = held_out.x[:60], held_out.y[:60]
    one, three = (FMN(norm="l2", steps=40, restarts=count)(cnn, x, y).distance for count in (1, 3))
    assert bool((three <= one).all())
    assert (three < 0.99 * one).any()


def test_targeted_fmn_reaches_the_class(cnn, held_out):
    x, y = held_out.x[:16], (held_out.y[:16] + 1) % 10
    result = FMN(norm="l2", steps=60, targeted=True)(cnn, x, y)
    assert result.success.float().mean() > 0.9
    assert torch.equal(result.prediction == y, result.success)


def test_the_way_to_a_hyperplane_in_l1_moves_the_steepest_entries_first():
    torch.manual_seed(0)
    z, w = torch.rand(30, 1, 2, 3, dtype=torch.float64), torch.randn(30, 1, 2, 3, dtype=torch.float64)
    gap = torch.randn(30, dtype=torch.float64)
    found = towards_hyperplane(z, w, gap, "l1", (0.0, 1.0)).flatten(1)
    for i in range(30):
        left, slow = abs(gap[i].item()), torch.zeros(6, dtype=torch.float64)
        for j in w[i].flatten().abs().argsort(descending=True).tolist():
            slope = w[i].flatten()[j].item()
            up = slope * gap[i].item() > 0
            room = (1 - z[i].flatten()[j] if up else z[i].flatten()[j]).item()
            move = min(room, left / abs(slope))
            slow[j], left = (move if up else -move), left - move * abs(slope)
        torch.testing.assert_close(found[i], slow, atol=1e-12, rtol=0)
