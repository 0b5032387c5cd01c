"""APGD against a slow single-sample transcription of algorithm 1, and what it reports of its halvings."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from backpass.attacks import APGD, PGD
from backpass.attacks.apgd import checkpoints, published_checkpoints
from backpass.attacks.noise import make_key, normal, uniform
from backpass.attacks.threat import make_threat


def test_checkpoints_are_those_of_the_paper():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9]


def slow_apgd(model, x, y, start, norm, eps, steps):
    """Algorithm 1 for one sample: returns the best point and the iterations of halving."""
    threat = make_threat(norm, eps, (0.0, 1.0))

    def look(z):
        z = z.clone().requires_grad_()
        value = F.cross_entropy(model(z), y)
        return value.item(), torch.autograd.grad(value, z)[0]

    z = before = best_z = start
    step, halvings, last_mark, halved_last, rises = 2 * eps, [], 0, False, 0
    last, best_g = look(start)
    best = mark_best = last
    for k in range(steps + 1):
        value, g = look(z)
        rises += value > last
        last = value
        if value > best:
            best, best_z, best_g = value, z, g
        if k in checkpoints(steps):
            halve = rises < 0.75 * (k - last_mark) or (not halved_last and best == mark_best)
            if halve:
                step, z, g, last = step / 2, best_z, best_g, best
                halvings.append(k)
            last_mark, halved_last, mark_best, rises = k, halve, best, 0
        ahead = threat.project(x, z + step * threat.direction(g))
        if k:
            ahead = threat.project(x, z + 0.75 * (ahead - z) + 0.25 * (z - before))
        before, z = z, ahead
    return best_z, halvings


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.4)])
def test_every_sample_follows_algorithm_1(cnn, held_out, norm, eps):
    cnn, x, y = cnn.double(), held_out.x[:12].double(), held_out.y[:12]
    attack = APGD(eps=eps, norm=norm, steps=40, early_stop=False)
    result = attack(cnn, x, y)
    index = torch.arange(12)
    starts = make_threat(norm, eps, (0.0, 1.0)).start(x, make_key(0, index, 0 * index, 1, like=index))
    for i in range(12):
        row = slice(i, i + 1)
        best, halvings = slow_apgd(cnn, x[row], y[row], starts[row], norm, eps, 40)
        if not result.success[i]:
            torch.testing.assert_close(result.x_adv[row], best, atol=1e-9, rtol=0)
        assert [k for k in result.halvings[i].tolist() if k >= 0] == halvings


def slow_published(model, x, y, start, norm, eps, steps):
    """The authors' rules for one sample, on a list of all losses: the best point, the last fooled one, the halvings."""
    threat = make_threat(norm, eps, (0.0, 1.0))

    def look(z):
        z = z.clone().requires_grad_()
        logits = model(z)
        value = F.cross_entropy(logits, y)
        return value.item(), torch.autograd.grad(value, z)[0], bool(logits.argmax(1) != y)

    z = before = best_z = start
    best, g, fooled = look(z)
    best_g, fooled_z = g, z if fooled else None
    losses, step, halvings = [], 2 * eps, []
    period, waited, halved_last, best_last = max(int(0.22 * steps), 1), 0, True, best
    for i in range(steps):
        ahead = threat.project(x, z + step * threat.direction(g))
        if i:
            ahead = threat.project(x, z + 0.75 * (ahead - z) + 0.25 * (z - before))
        before, z = z, ahead
        value, g, fooled = look(z)
        losses.append(value)
        if fooled:
            fooled_z = z
        if value > best:
            best, best_z, best_g = value, z, g
        waited += 1
        if waited == period:
            window = losses[-period - 1 :] if len(losses) > period else [0.0, *losses]
            rises = sum(b > a for a, b in pairwise(window))
            halve = rises <= 0.75 * period or (not halved_last and best_last >= best)
            halved_last, best_last = halve, best
            if halve:
                step, z, g = step / 2, best_z, best_g
                halvings.append(i + 1)
            waited, period = 0, max(period - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return best_z, fooled_z, halvings


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.4)])
@pytest.mark.parametrize("steps", [40, 31])
def test_the_published_variant_follows_the_authors_rules(cnn, held_out, norm, eps, steps):
    cnn, x, y = cnn.double(), held_out.x[:12].double(), held_out.y[:12]
    attack = APGD(eps=eps, norm=norm, steps=steps, early_stop=False, published=True)
    result = attack(cnn, x, y)
    index = torch.arange(12)
    key = make_key(0, index, 0 * index, 1, like=index)
    drawn = uniform(key, x) * 2 - 1 if norm == "linf" else normal(key, x)
    length = drawn.flatten(1).norm(torch.inf if norm == "linf" else 2, dim=1).view(-1, 1, 1, 1)
    starts = (x + eps * drawn / length).clamp(0, 1)
    kept = 0
    for i in range(12):
        row = slice(i, i + 1)
        best, fooled, halvings = slow_published(cnn, x[row], y[row], starts[row], norm, eps, steps)
        assert result.success[i] == (fooled is not None)
        if fooled is None:
            torch.testing.assert_close(result.x_adv[row], best, atol=1e-9, rtol=0)
            kept += 1
        # A check after the last step has no effect.
        assert [k for k in result.halvings[i].tolist() if k >= 0] == [k for k in halvings if k < steps]
    assert 0 < kept < 12


def test_the_published_variant_stops_early_without_another_outcome(cnn, held_out):
    x, y = held_out.x[:64], held_out.y[:64]
    whole, early = (APGD(eps=0.07, steps=30, published=True, early_stop=stop)(cnn, x, y) for stop in (False, True))
    assert torch.equal(whole.success, early.success)
    assert early.gradients < whole.gradients


def test_published_checkpoints_are_sums_of_whole_periods():
    assert published_checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert published_checkpoints(10) == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert published_checkpoints(50) == [11, 21, 30, 38, 45]


def test_in_l1_few_entries_change(cnn, held_out):
    x, y = held_out.x[:40], held_out.y[:40]
    apgd = APGD(norm="l1", eps=3.0, steps=60)(cnn, x, y)
    pgd = PGD(norm="l1", eps=3.0, step=1.0, steps=60, restarts=1)(cnn, x, y)
    assert apgd.success.sum() >= pgd.success.sum()
    assert bool((apgd.distance[apgd.success] <= 3.0 + 1e-5).all())
    changed = ((apgd.x_adv - x).abs() > 1e-6).flatten(1).sum(1).double().mean()
    assert changed < 0.6 * 64


def test_fooled_samples_have_no_later_halvings(cnn, held_out):
    x, y = held_out.x[:64], held_out.y[:64]
    result = APGD(eps=0.15, steps=40)(cnn, x, y)
    assert result.halvings.shape == (64, len(checkpoints(40)))
    assert bool((result.halvings[result.success][:, -1] == -1).float().mean() > 0.5)
    assert bool((result.halvings[~result.success] >= 0).any())


@pytest.mark.parametrize("loss", ["ce", "dlr", "margin", "dlr-targeted"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.5)])
def test_the_answer_is_that_of_any_batch_size(cnn, held_out, loss, norm, eps):
    cnn, x, y = cnn.double(), held_out.x[:24].double(), held_out.y[:24]
    attack = APGD(eps=eps, norm=norm, steps=10, loss=loss, restarts=2, targets=2)
    whole = attack(cnn, x, y)
    part = attack(cnn, x, y, batch_size=7)
    torch.testing.assert_close(part.x_adv, whole.x_adv, atol=1e-9, rtol=0)
    assert torch.equal(part.success, whole.success)
    assert torch.equal(part.halvings, whole.halvings)


def test_targeted_dlr_tries_the_likeliest_classes_in_turn(cnn, held_out):
    x, y = held_out.x[:128], held_out.y[:128]
    one, nine = (APGD(eps=0.08, steps=20, loss="dlr-targeted", targets=t)(cnn, x, y) for t in (1, 9))
    assert nine.success.sum() >= one.success.sum()
    assert nine.gradients > one.gradients


def test_lead_to_the_users_classes(cnn, held_out):
    x, y = held_out.x[:32], (held_out.y[:32] + 1) % 10
    result = APGD(eps=0.3, steps=20, targeted=True)(cnn, x, y)
    assert result.success.float().mean() > 0.8
    assert torch.equal(cnn(result.x_adv).argmax(1) == y, result.success)
