"""Radii per sample, bounds per channel, masks, targets, several radii, and paired statistics."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import nn

from backpass.attacks import (
    APGD,
    FAB,
    FGSM,
    FMN,
    IFGSM,
    MIFGSM,
    PGD,
    AutoAttack,
    Paired,
    Square,
    evaluate,
    transfer,
)
from backpass.attacks.paired import binomial_interval
from backpass.attacks.threat import make_threat
from backpass.errors import BackpassError

NORMS = {"linf": 0.1, "l2": 0.6, "l1": 3.0}


def every(norm, eps):
    step = eps if norm != "linf" else 0.03
    shared = {"eps": eps, "norm": norm}
    attacks = {
        "pgd": PGD(**shared, step=step, steps=4, restarts=2),
        "ifgsm": IFGSM(**shared, step=step, steps=3),
        "mifgsm": MIFGSM(**shared, step=step, steps=3),
        "fgsm": FGSM(**shared),
        "apgd": APGD(**shared, steps=25),
        "published": APGD(**shared, steps=6, published=norm != "l1"),
        "fab": FAB(**shared, steps=4, targets=2),
        "fmn": FMN(**shared, steps=6),
        "autoattack": AutoAttack(**shared, steps=3, queries=5, targets=2),
    }
    return attacks if norm == "l1" else attacks | {"square": Square(**shared, queries=8)}


CASES = {f"{norm} {name}": attack for norm, eps in NORMS.items() for name, attack in every(norm, eps).items()}
every_attack = pytest.mark.parametrize("attack", CASES.values(), ids=CASES)


def size(norm, delta):
    return delta.double().flatten(1).norm(float(norm[1:]), dim=1)


@every_attack
def test_every_sample_keeps_to_its_own_radius(attack, cnn, held_out):
    x, y = held_out.x[:10], held_out.y[:10]
    eps = torch.linspace(0, attack.largest_eps, 10)
    result = replace(attack, eps=eps)(cnn, x, y)
    assert bool((size(attack.norm, result.x_adv - x) <= eps * (1 + 1e-4) + 1e-5).all())
    for i in (0, 4, 9):
        alone = replace(attack, eps=float(eps[i]))
        one = alone(cnn, x[i : i + 1], y[i : i + 1], indices=torch.tensor([i]))
        assert one.success[0] == result.success[i]
        torch.testing.assert_close(one.x_adv[0], result.x_adv[i], atol=1e-4, rtol=0)


@every_attack
def test_pixels_outside_of_the_mask_stay(attack, cnn, held_out):
    x, y = held_out.x[:10], held_out.y[:10]
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 2:6] = True
    result = attack(cnn, x, y, mask=mask)
    changed = (result.x_adv != x).any(0)[0]
    assert not changed[~mask].any()
    assert changed[mask].any()
    assert torch.equal(result.success, (cnn(result.x_adv).argmax(1) != y) & (result.distance <= attack.eps + 1e-4))
    own = mask.expand(10, 1, 8, 8).clone()
    own[3] = False
    assert torch.equal(attack(cnn, x, y, mask=own).x_adv[3], x[3])


def test_bounds_per_channel_are_those_of_normalised_images():
    torch.manual_seed(0)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    lo, hi = (-mean / std).tolist(), ((1 - mean) / std).tolist()
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    x = (torch.rand(12, 3, 4, 4) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    x = torch.minimum(torch.maximum(x, torch.tensor(lo).view(3, 1, 1)), torch.tensor(hi).view(3, 1, 1))
    y = model(x).argmax(1)
    for name, attack in every("linf", 0.5).items():
        if name == "fmn":
            attack = FMN(steps=6)
        own = replace(attack, bounds=(lo, torch.tensor(hi)))
        x_adv = own(model, x, y).x_adv
        for channel in range(3):
            assert x_adv[:, channel].min() >= torch.tensor(lo[channel])
            assert x_adv[:, channel].max() <= torch.tensor(hi[channel])
        assert own == replace(own)
        assert hash(own)
    with pytest.raises(BackpassError, match="bounds has 3 channels"):
        own(model, x[:, :1], y)


BAD_CALLS = {
    "radii": ({"eps": [0.1, 0.2]}, {}, "eps has 2 radii for 5 samples"),
    "index without a radius": ({"eps": [0.1, 0.2]}, {"indices": torch.arange(5)}, "got index 4"),
    "float mask": ({}, {"mask": torch.ones(8, 8)}, r"Use mask\.bool\(\)"),
    "mask of another shape": ({}, {"mask": torch.ones(7, dtype=torch.bool)}, "broadcasts to x"),
    "start of another shape": ({}, {"start": torch.ones(7)}, "start must be images of x's shape"),
}


@pytest.mark.parametrize(("settings", "call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(settings, call, message, cnn, held_out):
    with pytest.raises(BackpassError, match=message):
        PGD(**settings)(cnn, held_out.x[:5], held_out.y[:5], **call)


def test_masks_and_radii_in_an_evaluation(cnn, held_out):
    x, y = held_out.x[:40], held_out.y[:40]
    eps = torch.linspace(0, 0.2, 40)
    attack = PGD(eps=eps, step=0.05, steps=4)
    mask = torch.zeros(40, 1, 8, 8, dtype=torch.bool)
    mask[:, :, ::2] = True
    report = evaluate(cnn, (x, y), attack, batch_size=7, mask=mask)
    right = cnn(x).argmax(1) == y
    expected = attack(cnn, x, y, mask=mask).success & right
    assert torch.equal(report.success, expected)
    row = evaluate(cnn, (x, y), attack, batch_size=11, mask=mask[0])
    function = evaluate(cnn, (x, y), attack, mask=lambda x: mask[0].expand_as(x))
    assert torch.equal(row.success, expected)
    assert torch.equal(function.success, expected)


TARGETS = {
    "next": lambda y, logits: (y + 1) % 10,
    "least-likely": lambda y, logits: logits.scatter(1, y[:, None], torch.inf).argmin(1),
    "second": lambda y, logits: logits.scatter(1, y[:, None], -torch.inf).argmax(1),
    3: lambda y, logits: torch.full_like(y, 3),
}


@pytest.mark.parametrize("targets", TARGETS)
def test_targets_by_name(targets, cnn, held_out):
    x, y = held_out.x[:60], held_out.y[:60]
    attack = PGD(eps=0.3, step=0.05, targeted=True)
    logits = cnn(x)
    right = logits.argmax(1) == y
    aim = TARGETS[targets](y, logits)
    report = evaluate(cnn, (x, y), attack, targets=targets, batch_size=13)
    record = report.attacks["PGD"]
    assert torch.equal(record.attacked, right & (aim != y))
    assert report.fooled().trials == int(record.attacked.sum())
    assert bool((record.prediction[record.success] == aim[record.success]).all())
    assert record.success.any()


def test_random_targets_are_other_classes_whatever_the_batch(cnn, held_out):
    x, y = held_out.x[:60], held_out.y[:60]
    attack = PGD(eps=0.3, step=0.05, targeted=True)
    one, other = (evaluate(cnn, (x, y), attack, targets="random", batch_size=size) for size in (60, 7))
    record = one.attacks["PGD"]
    assert torch.equal(record.success, other.attacks["PGD"].success)
    assert torch.equal(record.attacked, one.correct)
    assert len(record.prediction[record.success].unique()) > 4


def test_targets_that_are_the_label_are_no_success(cnn, held_out):
    x, y = held_out.x[:20], held_out.y[:20]
    attack = FGSM(eps=0.0, targeted=True)
    with pytest.raises(BackpassError, match="every target is the sample's own label"):
        evaluate(cnn, (x, y), attack, targets=lambda y: y)
    with pytest.raises(BackpassError, match="every target is the sample's own label"):
        transfer({"a": cnn}, {"a": cnn}, (x, y), attack, classes=lambda y: y)
    some = evaluate(cnn, (x, y), attack, targets=lambda y: torch.where(y < 5, y, (y + 1) % 10))
    assert some.success.sum() == 0
    assert not some.attacks["FGSM"].attacked[y < 5].any()
    for bad in ("worst", 10, lambda y: y + 10, lambda y: y.float()):
        with pytest.raises(BackpassError, match="target"):
            evaluate(cnn, (x, y), attack, targets=bad)


def test_a_curve_is_that_of_searches_from_the_largest_radius_down_until_one_fails(cnn, held_out):
    x, y = held_out.x[:60], held_out.y[:60]
    radii = [0.0, 0.02, 0.05, 0.08, 0.14]
    attack = PGD(eps=0.1, step=0.025, steps=8, restarts=2)
    report = evaluate(cnn, (x, y), {"pgd": attack}, radii=reversed(radii), batch_size=23)
    standing = dict.fromkeys(radii, 0)
    for i in (cnn(x).argmax(1) == y).nonzero().flatten().tolist():
        one, start, least = x[i : i + 1], None, 1.0
        for radius, larger in zip(radii[:0:-1], [1.0, *radii[:1:-1]], strict=True):
            now = PGD(eps=radius, step=radius / 4, steps=8, restarts=2)
            begin = None if start is None else one + (start - one) * (radius / larger)
            result = now(cnn, one, y[i : i + 1], indices=torch.tensor([i]), start=begin)
            if not result.success:
                break
            start, least = result.ahead, radius
        for radius in radii:
            standing[radius] += radius < least
    assert {radius: rate.hits for radius, rate in report.curve().items()} == standing


def test_a_start_that_is_a_success_costs_one_forward_pass_and_the_others_are_searched(cnn, held_out):
    x, y = held_out.x[:40], held_out.y[:40]
    attack = PGD(eps=0.1, step=0.025, steps=8, restarts=1, random_start=False)
    first = attack(cnn, x, y)
    fallen = first.success & (cnn(x).argmax(1) == y)
    assert 0 < fallen.sum() < 40
    leaf = first.x_adv.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(cnn(leaf), y, reduction="sum"), leaf)
    step = (first.x_adv + 0.025 * gradient.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    assert torch.equal(first.ahead[fallen], step[fallen])
    again = attack(cnn, x, y, start=first.x_adv)
    assert torch.equal(again.x_adv[first.success], first.x_adv[first.success])
    standing = int((~first.success).sum())
    assert again.forwards == 40 + standing
    assert again.gradients <= 8 * standing
    assert bool((again.loss >= first.loss)[~first.success].all())


def test_a_curve_of_radii_falls_and_meets_the_single_radii(cnn, held_out):
    x, y = held_out.x[:150], held_out.y[:150]
    radii = [0.02, 0.04, 0.06, 0.08, 0.1, 0.14]
    attack = PGD(eps=0.1, step=0.025, steps=20, restarts=1)
    report = evaluate(cnn, (x, y), {"pgd": attack}, radii=reversed(radii), batch_size=64)
    curve = report.curve()
    assert list(curve) == radii
    values = [rate.value for rate in curve.values()]
    assert values == sorted(values, reverse=True)
    assert values[0] - values[-1] > 0.3
    gradients, smaller = 0, torch.zeros_like(report.correct)
    for radius in radii:
        alone = evaluate(cnn, (x, y), PGD(eps=radius, step=radius / 4, steps=20, restarts=1))
        gradients += alone.attacks["PGD"].gradients
        assert curve[radius].value <= alone.robust_accuracy + 0.01
        record = report.attacks[f"pgd eps={radius:.6g}"]
        assert record.settings["eps"] == radius
        assert bool((record.distance[record.success] <= radius + 1e-6).all())
        assert not (smaller & ~record.success).any()  # what falls at a radius falls at every larger one
        smaller = record.success
    assert report.attacks["pgd eps=0.02"].gradients < gradients / 2
    written = report.to_dict()["curves"]["pgd"]
    assert [row["eps"] for row in written] == radii


def test_a_minimum_norm_attack_gives_any_radius(cnn, held_out):
    x, y = held_out.x[:60], held_out.y[:60]
    report = evaluate(cnn, (x, y), FMN(norm="l2", steps=30))
    record = report.attacks["FMN"]
    for radius in (0.1, 0.5, 2.0):
        rate = report.curve(radii=[radius])[radius]
        assert rate.hits == int((report.correct & (record.distance > radius)).sum())
    at = evaluate(cnn, (x, y), FMN(norm="l2", steps=30), radii=[0.5])
    assert at.curve()[0.5].hits == report.curve(radii=[0.5])[0.5].hits
    with pytest.raises(BackpassError, match="use FMN or FAB"):
        evaluate(cnn, (x, y), PGD(steps=1)).curve(radii=[0.1])
    with pytest.raises(BackpassError, match="give radii= to evaluate"):
        report.curve()


@pytest.mark.parametrize("radii", [[], [0.1, 0.1], [-0.1], ["a"], [2.0]])
def test_bad_radii(radii, cnn, held_out):
    with pytest.raises(BackpassError, match=r"radii|eps=2"):
        evaluate(cnn, (held_out.x[:5], held_out.y[:5]), PGD(), radii=radii)


def test_classes_have_names_and_rates(cnn, held_out):
    x, y = held_out.x[:100], held_out.y[:100]
    names = [f"digit {i}" for i in range(10)]
    report = evaluate(cnn, (x, y), FGSM(eps=0.05), class_names=names)
    for row in report.per_class():
        own = y == row.label
        assert row.name == names[row.label]
        assert (row.clean.hits, row.clean.trials) == (int(report.correct[own].sum()), int(own.sum()))
        assert row.robust.hits == int((report.correct & ~report.success)[own].sum())
    with pytest.raises(BackpassError, match="must name all 10 outputs"):
        evaluate(cnn, (x, y), FGSM(), class_names=names[:3])


def test_reports_are_compared_sample_by_sample(cnn, mlp, held_out):
    x, y = held_out.x[:100], held_out.y[:100]
    one, other = (evaluate(model, (x, y), FGSM(eps=0.06)) for model in (cnn, mlp))
    found = one.compare(other)
    mine, theirs = (report.correct & ~report.success for report in (one, other))
    assert found.only_first == int((mine & ~theirs).sum())
    assert found.difference == pytest.approx(one.robust_accuracy - other.robust_accuracy)
    with pytest.raises(BackpassError, match="same samples only"):
        one.compare(evaluate(mlp, (x[:50], y[:50]), FGSM()))


@pytest.mark.parametrize("differing", [0, 1, 4, 5, 6, 9, 17, 60])
def test_mcnemar_and_its_interval_agree_and_are_scipys(differing):
    for first in range(differing + 1):
        found = Paired(100, first, differing - first)
        test = stats.binomtest(first, differing, 0.5) if differing else None
        if test is None:
            assert found.p_value == 1
            continue
        tails = min(stats.binom.cdf(first, differing, 0.5), stats.binom.sf(first - 1, differing, 0.5))
        assert found.p_value == pytest.approx(min(1.0, 2 * tails))
        low, high = test.proportion_ci(method="exact")
        assert binomial_interval(first, differing) == pytest.approx((low, high), abs=1e-9)
        low, high = found.interval
        assert (low > 0 or high < 0) == (found.p_value < 0.05)
        assert low <= found.difference <= high


@pytest.mark.parametrize("eps", [0.5, 2.0])
def test_the_l1_projection_is_the_nearest_point(eps):
    torch.manual_seed(0)
    x = torch.rand(6, 1, 3, 4, dtype=torch.float64)
    z = x + 2 * torch.randn_like(x)
    found = make_threat("l1", eps, (0.0, 1.0)).project(x, z.clone())
    for i in range(6):
        # By bisection over the threshold of the soft shrinkage.
        u = (z[i] - x[i]).flatten()
        room = torch.where(u > 0, 1 - x[i].flatten(), x[i].flatten())
        low, high = 0.0, float(u.abs().max())
        for _ in range(200):
            t = (low + high) / 2
            d = torch.minimum((u.abs() - t).clamp_min(0), room)
            low, high = (t, high) if d.sum() > eps else (low, t)
        torch.testing.assert_close(found[i].flatten(), x[i].flatten() + u.sign() * d, atol=1e-9, rtol=0)
    inside = make_threat("l1", 1e3, (0.0, 1.0)).project(x, z.clone())
    assert torch.equal(inside, z.clamp(0, 1))


def test_the_l1_start_is_uniform_in_the_ball():
    from backpass.attacks.noise import make_key

    index = torch.arange(4000)
    x = torch.full((4000, 1, 1, 3), 0.5, dtype=torch.float64)
    start = make_threat("l1", 0.5, (0.0, 1.0)).start(x, make_key(0, index, like=index)) - x
    radius = start.flatten(1).abs().sum(1) / 0.5
    # The share of the ball inside of radius r is r^3.
    assert stats.kstest(radius**3, "uniform").pvalue > 0.01
    assert start.flatten(1).mean(0).abs().max() < 0.01
    assert math.isclose(float(start.flatten(1).sign().mean()), 0, abs_tol=0.02)
