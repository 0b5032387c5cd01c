"""The attack tables: outcomes are those of the attack itself, weaker and stronger gradients are found out, and told."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from backpass.attacks import PGD
from backpass.data import Images, Labelled
from backpass.errors import BackpassError
from backpass.lab.bench.experiment import Bench, Experiment
from backpass.lab.bench.pieces import Pieces
from backpass.lab.experiments.linbp import success_tables
from backpass.lab.experiments.linbp.published import HALVINGS, published
from backpass.lab.experiments.linbp.success import Contest, Success, measure
from backpass.lab.experiments.linbp.trials import Trial, attack_images, run_trial
from backpass.lab.experiments.linbp.victims import Training, Victim, victims
from backpass.rules import parse_rule
from backpass.training.loop import Loop

CPU = torch.device("cpu")
TINY = Training(model="mlp:widths=24-16", data="digits", epochs=3)
TRIAL = Trial(attack="pgd:steps=4,restarts=1", eps=0.1, protocol="standard", images=40)


def settings(**changes):
    contest = Contest(training=TINY, placements=("linbp:start=-1",), sweep=("-1", "-2"), counterpart="resnet50")
    usual = {
        "contests": (contest,),
        "seeds": (0, 1, 2),
        "attacks": ("pgd:steps=4,restarts=1",),
        "radii": (8 / 255,),
        "images": 40,
    }
    return Success(**{**usual, **changes})


def experiment(chosen):
    return Experiment(
        name="tiny", title="T", question="Q", source="S", scales={"small": chosen},
        measure=partial(measure, reference="Table I"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(shared=Pieces(tmp_path_factory.mktemp("shared")))


def one_victim(bench):
    (victim,) = victims(TINY, (0,), bench)
    return victim


@pytest.mark.parametrize("rule", ["bp", "linbp:start=-1"])
def test_an_outcome_is_the_attacks_own(bench, rule):
    victim = one_victim(bench)
    x, y = victim.test.first(40).images.x, victim.test.first(40).images.y
    right = victim.network(x).argmax(1) == y
    attack = PGD(eps=0.1, steps=4, restarts=1)
    with parse_rule(rule).attach(victim.network):
        expected = attack(victim.network, x[right], y[right], indices=right.nonzero().squeeze(1)).success
    found = run_trial(bench, victim, rule, TRIAL)
    assert torch.equal(found.right, right)
    assert torch.equal(found.fooled[right], expected)
    assert found.rate == pytest.approx(100 * expected.double().mean().item())


def test_a_trained_network_and_its_outcomes_are_found_again(tmp_path):
    first, again = Pieces(tmp_path), Pieces(tmp_path)
    outcomes, weights = [], []
    for pieces in (first, again):
        bench = Bench(shared=pieces)
        victim = one_victim(bench)
        outcomes.append(run_trial(bench, victim, "bp", TRIAL))
        weights.append(torch.cat([p.flatten() for p in victim.network.parameters()]))
    assert (first.computed, again.computed, again.found) == (2, 0, 2)
    assert torch.equal(outcomes[0].fooled, outcomes[1].fooled)
    assert torch.equal(*weights)


def test_a_network_that_has_learned_nothing_is_told():
    with pytest.raises(BackpassError, match="has learned nothing"):
        list(victims(replace(TINY, lr=1e-9), (0,), Bench()))


def test_training_that_was_interrupted_goes_on_and_ends_with_the_same_weights(tmp_path, monkeypatch):
    def weights(folder):
        return torch.cat([p.flatten() for p in one_victim(Bench(shared=Pieces(folder))).network.parameters()])

    whole = weights(tmp_path / "whole")
    epoch, calls = Loop._epoch, []

    def interrupted(loop):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return epoch(loop)

    monkeypatch.setattr(Loop, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "broken")
    assert list((tmp_path / "broken" / "training").iterdir())
    assert torch.equal(weights(tmp_path / "broken"), whole)
    assert len(calls) == 4  # two epochs, the interruption, and the one that was missing
    assert not list((tmp_path / "broken" / "training").iterdir())


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_a_search_in_another_precision_ends_with_a_verdict_on_all_images(bench, precision):
    victim = one_victim(bench)
    found = attack_images(victim, parse_rule("bp"), Trial(attack="pgd:steps=4,restarts=1", eps=0.1, images=40,
                                                          protocol="standard", precision=precision))  # fmt: skip
    plain = run_trial(bench, victim, "bp", TRIAL)
    assert torch.equal(found.right, plain.right)
    assert abs(found.rate - plain.rate) < 15
    assert next(victim.network.parameters()).dtype == torch.float32


class Dead(nn.Module):
    """Logits (0, slope * relu(x - 0.6) - 0.1): a unit that sleeps at x = 0.5 and wakes inside the ball."""

    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, x):
        z = x.flatten(1)
        other = self.slope * torch.relu(z[:, :1] - 0.6) - 0.1
        return torch.cat([torch.zeros_like(other), other + 0 * z.sum(1, keepdim=True)], 1)


class Decoy(nn.Module):
    """A unit that never wakes points the other way, and outweighs the one that is awake."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        z = x.flatten(1)[:, :1]
        other = self.weight * (torch.relu(z) + 5 * torch.relu(-z - 9.0)) - 0.6
        return torch.cat([torch.zeros_like(other), other], 1)


def planted(network):
    pixels = torch.full((8, 1, 2, 2), 128, dtype=torch.uint8)
    images = Images(pixels=pixels, labels=torch.zeros(8, dtype=torch.int64))
    data = Labelled(name="mnist", split="test", description="planted", images=images, classes=2)
    return Victim(
        training=TINY, seed=0, network=network.eval(), loss=0.0, accuracy=100.0, test_accuracy=100.0, test=data,
        device=CPU,
    )  # fmt: skip


def test_linbp_wins_where_a_sleeping_unit_decides():
    trial = Trial(attack="pgd:steps=10,restarts=1,random_start=false,step=0.05", eps=0.3, protocol="standard")
    bp, linbp = (attack_images(planted(Dead(10.0)), parse_rule(rule), trial).rate for rule in ("bp", "linbp"))
    assert (bp, linbp) == (0.0, 100.0)


def test_linbp_loses_to_a_unit_that_never_wakes():
    trial = Trial(attack="pgd:steps=10,restarts=1,random_start=false,step=0.05", eps=0.3, protocol="standard")
    bp, linbp = (attack_images(planted(Decoy()), parse_rule(rule), trial).rate for rule in ("bp", "linbp"))
    assert (bp, linbp) == (100.0, 0.0)


def test_logits_so_large_that_the_loss_saturates_blind_both_gradients(bench):
    victim = one_victim(bench)
    for rule in ("bp", "linbp:start=-1"):
        plain, large = (attack_images(victim, parse_rule(rule), Trial(
            attack="pgd:steps=4,restarts=1,random_start=false", eps=0.2, protocol="standard", images=40, scale=scale,
        )) for scale in (1.0, 1e4))  # fmt: skip
        assert torch.equal(plain.right, large.right)
        assert plain.rate > large.rate


def test_a_run_tells_ours_beside_the_papers(bench):
    result = experiment(settings()).run("small", bench)
    first = result.findings[0]
    assert "85.83 %" not in first.text  # the paper has no row of 4 steps
    assert "digits of scikit-learn" in result.findings[-1].text
    assert [claim.n for claim in result.claims] == [3, 3]
    (table,) = [table for table in result.tables if table.id == "success"]
    assert len(table.rows) == 2 * 2
    (series,) = result.series
    bp, linbp = series.curves
    assert len(bp.intervals) == len(linbp.intervals) == 2
    named = experiment(settings(attacks=("pgd:steps=10,restarts=1",))).run("small", bench)
    assert "85.83 % and 66.41 % for resnet50" in named.findings[0].text
    assert named.claims[0].published.startswith("+19.42")


def test_the_claims_are_paired_differences_of_the_rates(bench):
    result = experiment(settings()).run("small", bench)
    rates = {rule: [] for rule in ("bp", "linbp:start=-1")}
    for victim in victims(TINY, (0, 1, 2), bench):
        for rule, into in rates.items():
            trial = Trial(attack="pgd:steps=4,restarts=1", eps=8 / 255, protocol="paper", images=40)
            into.append(attack_images(victim, parse_rule(rule), trial).rate)
    differences = [a - b for a, b in zip(rates["linbp:start=-1"], rates["bp"], strict=True)]
    assert result.claims[0].estimate == pytest.approx(math.fsum(differences) / 3)


def test_fewer_than_three_networks_decide_nothing(bench):
    result = experiment(settings(seeds=(0, 1))).run("small", bench)
    assert {claim.verdict for claim in result.claims} == {"undecided"}


def test_the_papers_numbers_are_found_by_attack_radius_and_network():
    assert published("pgd:steps=20,restarts=5", 16 / 255, "vgg16") == (94.88, 99.99)
    assert published("apgd:steps=100,restarts=1", 8 / 255, "wrn-28-10") == (39.46, 41.20)
    assert published("pgd:steps=7", 8 / 255, "vgg16") is None
    assert all(a < b for a, b in zip(HALVINGS["linbp"], HALVINGS["bp"], strict=True))


@pytest.mark.parametrize("one", success_tables.EXPERIMENTS, ids=lambda one: one.name)
@pytest.mark.parametrize("scale", ["small", "paper"])
def test_every_scale_names_networks_and_attacks_that_exist(one, scale):
    from backpass.lab.placements import parse_rule_for
    from backpass.lab.training.assembly import complete

    chosen = one.settings(scale)
    images = Images(pixels=torch.zeros(1, 3, 32, 32, dtype=torch.uint8), labels=torch.zeros(1, dtype=torch.int64))
    data = Labelled(name="cifar10", split="test", description="", images=images, classes=10)
    assert len(chosen.seeds) >= 3
    for trial in chosen.trials:
        assert trial.make(data).eps > 0
    for contest in chosen.contests:
        assert complete(contest.training.recipe(0)).recipe.model == contest.training.model
        assert all(parse_rule_for(contest.training.model, rule).name == "linbp" for rule in contest.placements)
        for attack in chosen.attacks:
            assert any(published(attack, eps, contest.counterpart) for eps in chosen.radii) or "steps=100" in attack
