"""Halving, transfer and the white-box conditions: tiny runs, each held against the attack called by hand."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from backpass import LinBP, list_sites
from backpass.attacks import APGD
from backpass.errors import BackpassError
from backpass.lab.bench.experiment import Bench
from backpass.lab.bench.pieces import Pieces
from backpass.lab.experiments.linbp import halving, transfer, white_box_conditions
from backpass.lab.experiments.linbp.gradients import compare_gradients
from backpass.lab.experiments.linbp.trials import Trial, attack_images, run_trial, search_halvings
from backpass.lab.experiments.linbp.victims import Training, victims
from backpass.lab.experiments.linbp.white_box import Condition, WhiteBox
from backpass.lab.placements import parse_rule_for
from backpass.lab.plans import make_plans
from backpass.lab.protocols import Standard
from backpass.rules import parse_rule

MLP = Training(model="mlp:widths=24-16", data="digits", epochs=3)
RESNET = Training(model="resnet:blocks=1-1,width=4", data="digits", epochs=4, limit=600)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    return Bench(pieces=Pieces(folder / "own"), shared=Pieces(folder / "shared"))


def run(one, settings, bench):
    return replace(one, scales={"small": settings}).run("small", bench)


def test_the_mean_of_a_halving_is_over_images_that_have_it_under_both_rules():
    ours, theirs = [[22, 41], [22], [41, 57, 70]], [[22], [41, 57], [57, 70]]
    assert halving.nth(ours, theirs, 0) == (pytest.approx((22 + 22 + 41) / 3), pytest.approx((22 + 41 + 57) / 3), 100.0)
    assert halving.nth(ours, theirs, 1) == (57.0, 70.0, pytest.approx(100 / 3))
    assert halving.nth(ours, theirs, 2)[2] == 0.0


def test_halvings_are_those_of_apgd_without_an_early_end(bench):
    (victim,) = victims(MLP, (0,), bench)
    x, y = victim.test.first(20).images.x, victim.test.first(20).images.y
    right = (victim.network(x).argmax(1) == y).nonzero().squeeze(1)
    trial = Trial(attack="apgd:steps=20,restarts=1", eps=0.1, protocol="standard", images=20)
    for rule in ("bp", "linbp:start=-1"):
        with parse_rule(rule).attach(victim.network):
            attack = APGD(eps=0.1, steps=20, early_stop=False)
            expected = attack(victim.network, x[right], y[right], indices=right).halvings
        assert search_halvings(victim, rule, trial) == [[at for at in row if at >= 0] for row in expected.tolist()]
    with pytest.raises(BackpassError, match="only apgd"):
        search_halvings(victim, "bp", replace(trial, attack="pgd:steps=2"))


def test_the_halving_experiment_tells_ours_beside_the_papers(bench):
    trial = Trial(attack="apgd:steps=30,restarts=1", eps=8 / 255, images=15)
    settings = halving.Halving(seeds=SEEDS, training=MLP, rule="linbp:start=-1", trial=trial)
    result = run(halving.EXPERIMENTS[0], settings, bench)
    assert "22.95 and 25.85" in result.findings[0].text
    assert [claim.id for claim in result.claims] == [f"linbp-halving.halving-{n}" for n in (1, 2, 3, 4)]
    assert result.claims[0].n == 3


def test_transfer_judges_each_source_by_networks_of_other_seeds(bench):
    settings = transfer.Transfer(
        seeds=SEEDS, source=RESNET, targets=(RESNET, MLP), start="layer2", steps=(2, 4),
        trial=Trial(attack="ifgsm:step=0.05,noise=0.05", eps=0.2, protocol="standard", images=40),
    )  # fmt: skip
    result = run(transfer.EXPERIMENTS[0], settings, bench)
    assert len(result.claims) == 4
    (table,) = [table for table in result.tables if table.id == "transfer"]
    assert [row[:2] for row in table.rows[:2]] == [["BP", 2], ["BP", 4]]
    # The last source is judged by the first seed's networks.
    source, target = (next(victims(RESNET, (seed,), bench)) for seed in (2, 0))
    (plan,) = make_plans([settings.trial.attack + ",steps=4"], [0.2], {}, Standard())
    x, y = source.test.first(40).images.x, source.test.first(40).images.y
    made = replace(plan.attack, early_stop=False)(source.network, x, y).x_adv
    right = target.network(x).argmax(1) == y
    fooled = right & (target.network(made).argmax(1) != y)
    curve = next(c for s in result.series if "resnet" in s.id for c in s.curves if c.label == "BP")
    assert curve.runs[2][1] == pytest.approx(100 * int(fooled.sum()) / int(right.sum()))
    with pytest.raises(BackpassError, match="two seeds"):
        run(transfer.EXPERIMENTS[0], replace(settings, seeds=(0,)), bench)


def test_the_two_gradients_are_compared_as_defined(bench):
    (victim,) = victims(MLP, (0,), bench)
    found = compare_gradients(victim, "linbp:start=-1", images=30, lengths=(0.01,))
    x, y = victim.test.first(30).images.x, victim.test.first(30).images.y
    right = victim.network(x).argmax(1) == y
    x, y = x[right].requires_grad_(), y[right]
    gradients = []
    for rule in (parse_rule("bp"), LinBP(start=-1)):
        with rule.attach(victim.network):
            gradients.append(torch.autograd.grad(F.cross_entropy(victim.network(x), y, reduction="sum"), x)[0])
    plain, linear = (g.flatten(1) for g in gradients)
    assert found["agreement"] == pytest.approx(100 * (plain.sign() == linear.sign()).double().mean().item())
    assert found["cosine"] == pytest.approx(F.cosine_similarity(plain, linear, dim=1).mean().item(), rel=1e-4)
    assert found["blind"] == 0.0
    hidden = []
    last = victim.network.get_submodule(list_sites(victim.network, x)[-1].module)
    with last.register_forward_pre_hook(lambda module, args: hidden.append(args[0])):
        victim.network(x)
    assert found["asleep"] == pytest.approx(100 * (hidden[0] < 0).double().mean().item())
    with torch.no_grad():
        moved = (x + 0.01 * gradients[0].sign()).clamp(0, 1)
        rise = F.cross_entropy(victim.network(moved), y) - F.cross_entropy(victim.network(x), y)
    assert found["bp 0.01"] == pytest.approx(rise.item(), rel=1e-4)


def test_start_auto_is_chosen_on_images_that_are_not_attacked(bench):
    (victim,) = victims(MLP, (0,), bench)
    trial = Trial(attack="pgd:steps=3,restarts=1", eps=0.1, protocol="standard", images=40)
    rates = {}
    held_out = replace(victim, test=_after(victim.test, 40))
    for start in (-1, -2):
        rates[start] = attack_images(held_out, LinBP(start=start), trial).rate
    best = max(rates, key=rates.get)
    chosen = run_trial(bench, victim, "linbp:start=auto", trial)
    expected = attack_images(victim, LinBP(start=best), trial)
    if rates[-1] != rates[-2]:
        assert torch.equal(chosen.fooled, expected.fooled)
    with pytest.raises(BackpassError, match="none is left"):
        run_trial(bench, victim, "linbp:start=auto", replace(trial, images=None))


def _after(data, skip):
    return replace(
        data, images=replace(data.images, pixels=data.images.pixels[skip:], labels=data.images.labels[skip:])
    )


def test_the_white_box_experiment_gives_every_condition_a_verdict(bench):
    trial = Trial(attack="pgd:steps=3,restarts=1", eps=0.1, protocol="standard", images=40)
    base = Condition(factor="base", value="small", training=MLP, rule="linbp:start=-1", trial=trial)
    settings = WhiteBox(
        seeds=SEEDS,
        conditions=(
            base,
            replace(base, factor="placement", value="all", rule="linbp"),
            replace(base, factor="placement", value="chosen", rule="linbp:start=auto"),
            replace(base, factor="depth", value="one", training=replace(MLP, model="mlp:widths=24")),
        ),
        lengths=(0.01, 0.1),
    )
    result = run(white_box_conditions.EXPERIMENTS[0], settings, bench)
    assert [claim.id for claim in result.claims] == [
        f"linbp-white-box.{name}" for name in ("base-small", "placement-all", "placement-chosen", "depth-one")
    ]
    assert result.findings[0].text.startswith("In the paper LinBP is ahead in 29 of 30 cells")
    assert [finding.topic for finding in result.findings[1:3]] == ["Placement", "Depth"]
    assert len(result.series) == 3  # the networks, each rule once; a chosen placement has no plot of its own


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_every_condition_can_be_meant_and_differs_from_every_other(scale):
    conditions = white_box_conditions.EXPERIMENTS[0].settings(scale).conditions
    assert len({(c.training, c.rule, c.trial) for c in conditions}) == len(conditions)
    for condition in conditions:
        assert parse_rule_for(condition.training.model, condition.rule).name == "linbp"
        assert condition.trial.images is not None
