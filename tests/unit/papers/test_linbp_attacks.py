"""LinBP's attacks: works are the attacks themselves on trained networks, and the tables say what they measure."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import LinBP, list_sites
from backpass.attacks import APGD, IFGSM, PGD
from backpass.data import Images, Labelled
from backpass.errors import BackpassError
from backpass.experiments import attack_success, victims
from backpass.experiments.attack_success import (
    FOOLED_IMAGES,
    Transfer,
    Trial,
    attack_images,
    find_halvings,
    halving,
    transfer_images,
)
from backpass.experiments.experiment import Arm, Context, Runs
from backpass.experiments.input_gradients import Directions, compare_gradients, measure_steps
from backpass.experiments.victims import Loaded, Victim, describe_victim, load_victim
from backpass.lab.placements import parse_rule_for
from backpass.lab.plans import make_plans
from backpass.lab.protocols import make_protocol
from backpass.lab.subjects import Subject
from backpass.lab.training.assembly import complete
from backpass.papers import linbp_tables, linbp_transfer, linbp_white_box
from backpass.rules import parse_rule
from backpass.training.loop import Loop
from support.experiments import judged

MLP = Victim(model="mlp:widths=24-16", data="digits", epochs=3)
RESNET = Victim(model="resnet:blocks=1-1,width=4", data="digits", epochs=4, limit=600)
TRIAL = Trial(victim=MLP, attack="pgd:steps=4,restarts=1", eps=0.1, protocol="standard", images=40)
LINEAR = replace(TRIAL, rule="linbp:start=-1")
EXPERIMENTS = (*linbp_tables.EXPERIMENTS, *linbp_white_box.EXPERIMENTS, *linbp_transfer.EXPERIMENTS)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of all runs, so that each network is trained once."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def context(out):
    return Context(folder=out / "shared")


@pytest.fixture
def loaded(context):
    """The network of seed 0, 40 images, their labels, and which of them are right."""
    subject, _, test = load_victim(MLP, 0, context)
    x, y = test.first(40).images.x, test.first(40).images.y
    return subject.network, x, y, subject.network(x).argmax(1) == y


def weights(victim, context, seed=0):
    return torch.cat([p.flatten() for p in load_victim(victim, seed, context).subject.network.parameters()])


def percent(true):
    return 100 * true.double().mean().item()


@pytest.mark.parametrize("rule", ["bp", "linbp:start=-1"])
def test_an_outcome_is_the_attacks_own(context, loaded, rule):
    network, x, y, right = loaded
    with parse_rule(rule).attach(network):
        attack = PGD(eps=0.1, steps=4, restarts=1)
        fooled = attack(network, x[right], y[right], indices=right.nonzero().squeeze(1)).success
    found = attack_images(replace(TRIAL, rule=rule), 0, context)
    assert [mark != "-" for mark in found["images"]] == right.tolist()
    assert [mark == "1" for mark in found["images"] if mark != "-"] == fooled.tolist()
    assert found["fooled"] == pytest.approx(percent(fooled))
    assert found["rule"] == rule


def test_a_network_is_trained_once_and_described(context, monkeypatch):
    before = weights(MLP, context)
    monkeypatch.setattr(victims, "_train", lambda *arguments: pytest.fail("trained again"))
    assert torch.equal(weights(MLP, context), before)
    found = describe_victim(MLP, 0, context)
    subject, _, test = load_victim(MLP, 0, context)
    images = test.first(1000).images
    assert found["test accuracy"] == pytest.approx(percent(subject.model(images.x).argmax(1) == images.y))
    with pytest.raises(pytest.fail.Exception):
        load_victim(replace(MLP, epochs=2), 0, context)


def test_weights_of_a_file_are_not_trained(context, tmp_path):
    trained = load_victim(MLP, 1, context).subject.network
    torch.save(trained.state_dict(), tmp_path / "net-1.pt")
    given = Victim(model=MLP.model, data="digits", weights=f"{tmp_path}/net-{{seed}}.pt")
    assert torch.equal(weights(given, Context(), seed=1), weights(MLP, context, seed=1))
    ours, theirs = (attack_images(replace(TRIAL, victim=one), 1, context) for one in (given, MLP))
    assert ours == theirs


def test_a_network_that_has_learned_nothing_is_refused():
    with pytest.raises(BackpassError, match="has learned nothing"):
        load_victim(replace(MLP, lr=1e-9), 0, Context())


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    whole = weights(MLP, Context(folder=tmp_path / "whole"))
    epoch, calls = Loop._epoch, []

    def interrupted(loop):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return epoch(loop)

    monkeypatch.setattr(Loop, "_epoch", interrupted)
    broken = Context(folder=tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        load_victim(MLP, 0, broken)
    assert torch.equal(weights(MLP, broken), whole)
    assert len(calls) == 4  # two epochs, the interruption, and the one that was missing
    assert {path.suffix for path in broken.folder.iterdir()} == {".lock", ".safetensors"}


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_a_search_in_another_precision_ends_with_a_verdict_on_all_images(context, precision):
    plain, other = (attack_images(one, 0, context) for one in (TRIAL, replace(TRIAL, precision=precision)))
    assert [mark == "-" for mark in other["images"]] == [mark == "-" for mark in plain["images"]]
    assert abs(other["fooled"] - plain["fooled"]) < 15


class Planted(nn.Module):
    """Logits (0, relu(w z + b) v + c) of the first pixel z, which is 0.5."""

    def __init__(self, w, b, v, c):
        super().__init__()
        self.hidden, self.last = nn.Linear(1, len(w)), nn.Linear(len(w), 1)
        for parameter, value in ((self.hidden.weight, [[one] for one in w]), (self.hidden.bias, b),
                                 (self.last.weight, [v]), (self.last.bias, [c])):  # fmt: skip
            parameter.data = torch.tensor(value)

    def forward(self, x):
        other = self.last(torch.relu(self.hidden(x.flatten(1)[:, :1])))
        return torch.cat([torch.zeros_like(other), other], 1)


ASLEEP = Planted([1.0], [-0.6], [10.0], -0.1)  # wakes inside the ball
DECOY = Planted([1.0, -1.0], [0.0, -9.0], [1.0, 5.0], -0.6)  # the second never wakes, and outweighs the first


@pytest.mark.parametrize(("network", "bp", "linbp"), [(ASLEEP, 0.0, 100.0), (DECOY, 100.0, 0.0)])
def test_linbp_wins_where_a_sleeping_unit_decides_and_loses_to_one_that_never_wakes(monkeypatch, network, bp, linbp):
    pixels = torch.full((8, 1, 2, 2), 128, dtype=torch.uint8)
    images = Images(pixels=pixels, labels=torch.zeros(8, dtype=torch.int64))
    data = Labelled(name="mnist", split="test", description="planted", images=images, classes=2)
    subject = Subject(name="planted", network=network, model=network, weights="", digest="", trained=True)
    monkeypatch.setattr(attack_success, "load_victim", lambda *arguments: Loaded(subject, data, data))
    trial = replace(TRIAL, attack="pgd:steps=10,restarts=1,random_start=false,step=0.05", eps=0.3, images=None)
    found = [attack_images(replace(trial, rule=rule), 0, Context())["fooled"] for rule in ("bp", "linbp")]
    assert found == [bp, linbp]


@pytest.mark.parametrize("rule", ["bp", "linbp:start=-1"])
def test_logits_so_large_that_the_loss_saturates_blind_both_gradients(context, rule):
    trial = replace(TRIAL, attack="pgd:steps=4,restarts=1,random_start=false", eps=0.2, rule=rule)
    plain, large = (attack_images(replace(trial, scale=scale), 0, context) for scale in (1.0, 1e4))
    assert [mark == "-" for mark in large["images"]] == [mark == "-" for mark in plain["images"]]
    assert plain["fooled"] > large["fooled"]


def test_start_auto_is_the_best_on_the_images_after_those_attacked(context):
    _, _, test = load_victim(MLP, 0, context)
    rest = replace(test, images=replace(test.images, pixels=test.images.pixels[40:], labels=test.images.labels[40:]))
    rates = {}
    for start in (-1, -2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attack_success, "load_victim", lambda *a: load_victim(*a)._replace(test=rest))
            rates[start] = attack_images(replace(TRIAL, rule=f"linbp:start={start}"), 0, context)["fooled"]
    found = attack_images(replace(TRIAL, rule="linbp:start=auto"), 0, context)
    assert rates[int(found["rule"].partition("=")[2])] == max(rates.values())
    with pytest.raises(BackpassError, match="set images to fewer"):
        attack_images(replace(TRIAL, rule="linbp:start=auto", images=None), 0, context)


@pytest.mark.parametrize("rule", ["bp", "linbp:start=-1"])
def test_halvings_are_those_of_apgd_without_an_early_end(context, loaded, rule):
    network, x, y, right = loaded
    with parse_rule(rule).attach(network):
        attack = APGD(eps=0.1, steps=20, early_stop=False)
        rows = attack(network, x[right], y[right], indices=right.nonzero().squeeze(1)).halvings
    found = find_halvings(replace(TRIAL, rule=rule, attack="apgd:steps=20,restarts=1"), 0, context)
    assert found["halvings"] == [[at for at in row if at >= 0] for row in rows.tolist()]
    firsts = [row[0] for row in found["halvings"] if row]
    assert found["iterations"][0] == pytest.approx(sum(firsts) / len(firsts))
    assert found["shares"][0] == pytest.approx(100 * len(firsts) / len(found["halvings"]))


def test_only_apgd_halves_its_step(context):
    with pytest.raises(BackpassError, match="only apgd"):
        find_halvings(TRIAL, 0, context)


def test_halvings_are_compared_over_the_images_that_have_them_under_both_rules():
    ours, theirs = [[22, 41], [22], [41, 57, 70]], [[22], [41, 57], [57, 70]]
    arm = Arm(name="a", work=find_halvings, candidates={"": TRIAL})
    runs = [Runs(arm=arm, by_candidate={"": [{"halvings": rows}]}, chosen="") for rows in (ours, theirs)]
    assert halving(0, "first").both(*runs) == ([85 / 3], [120 / 3])
    assert halving(1, "second").both(*runs) == ([57], [70])
    assert all(math.isnan(side[0]) for side in halving(2, "third").both(*runs))


def test_transfer_shows_the_images_to_networks_of_the_next_seed(context):
    settings = Transfer(
        victim=RESNET, targets=(RESNET, MLP), networks=2, attack="ifgsm:step=0.05,steps=4", eps=0.2,
        protocol="standard", images=40,
    )  # fmt: skip
    found = transfer_images(settings, 1, context)
    source, target = (load_victim(RESNET, seed, context).subject.network for seed in (1, 0))
    images = load_victim(RESNET, 0, context).test.first(40).images
    x_adv = IFGSM(eps=0.2, step=0.05, steps=4, early_stop=False)(source, images.x, images.y).x_adv
    for name, judge in (("source", source), (RESNET.model, target)):
        right = judge(images.x).argmax(1) == images.y
        fooled = judge(x_adv).argmax(1) != images.y
        assert found[name] == pytest.approx(percent(fooled[right]))
        assert [mark == "-" for mark in found[f"images of {name}"]] == (~right).tolist()
    with pytest.raises(BackpassError, match="at least two seeds"):
        transfer_images(replace(settings, networks=1), 0, context)


def test_the_two_gradients_are_compared_as_defined(context, loaded):
    network, x, y, right = loaded
    x, y = x[right].requires_grad_(), y[right]
    settings = Directions(victim=MLP, rule="linbp:start=-1", images=40, lengths=(0.01, 0.05))
    found = compare_gradients(settings, 0, context)
    gradients = []
    for rule in (parse_rule("bp"), LinBP(start=-1)):
        with rule.attach(network):
            gradients.append(torch.autograd.grad(F.cross_entropy(network(x), y, reduction="sum"), x)[0])
    plain, linear = (g.flatten(1) for g in gradients)
    assert found["agreement"] == pytest.approx(percent(plain.sign() == linear.sign()))
    assert found["cosine"] == pytest.approx(F.cosine_similarity(plain, linear, dim=1).mean().item(), rel=1e-4)
    assert found["blind"] == 0.0
    hidden = []
    last = network.get_submodule(list_sites(network, x)[-1].module)
    with last.register_forward_pre_hook(lambda module, args: hidden.append(args[0])):
        loss = F.cross_entropy(network(x), y)
    assert found["asleep"] == pytest.approx(percent(hidden[0] < 0))
    assert found["loss"] == pytest.approx(loss.item())
    for rule, gradient in zip(("bp", "linbp:start=-1"), gradients, strict=True):
        moved = [(x + length * gradient.sign()).clamp(0, 1) for length in (0.01, 0.05)]
        rises = [(F.cross_entropy(network(one), y) - loss).item() for one in moved]
        assert measure_steps(replace(settings, rule=rule), 0, context)["gain"] == pytest.approx(rises, rel=1e-4)


def test_tables_compare_the_rates_network_by_network_and_quote_the_paper(out, context):
    contest = linbp_tables.Contest(victim=MLP, placements=("linbp:start=-1",), sweep=("-1", "-2"),
                                   counterpart="resnet50")  # fmt: skip
    scale = linbp_tables.success(
        [contest], ["pgd:steps=10,restarts=1"], where="Table I", seeds=(0, 1, 2), radii=(8 / 255,), images=40
    )
    claims, result = judged(out, scale)
    assert list(claims) == [
        f"mlp-widths-24-16-{protocol}-8-pgd-steps-10-restarts-1" for protocol in ("paper", "standard")
    ]
    trial = scale.arms[0].candidates[""]
    assert (trial.rule, trial.protocol, trial.images) == ("bp", "paper", 40)
    differences = [
        attack_images(replace(trial, rule="linbp:start=-1"), seed, context)["fooled"]
        - attack_images(trial, seed, context)["fooled"]
        for seed in (0, 1, 2)
    ]
    paper, standard = claims.values()
    assert (paper.n, paper.estimate) == (3, pytest.approx(math.fsum(differences) / 3))
    assert (paper.published, standard.published) == ("+19.42 (85.83 % against 66.41 %, resnet50)", "")
    assert [len(table.rows) for table in result.tables] == [2, 2, 3, 1]
    (series,) = result.series
    assert [len(curve.intervals) for curve in series.curves] == [2, 2]
    assert "digits of scikit-learn" in result.environment["data"]


def test_one_network_is_compared_over_its_images(out, context):
    contest = linbp_tables.Contest(victim=MLP, placements=("linbp:start=-1",), counterpart="vgg16")
    scale = linbp_tables.success(
        [contest], ["pgd:steps=4,restarts=1"], where="Table I", seeds=(0,), radii=(0.1,), protocols=("standard",),
        images=60, fooled=FOOLED_IMAGES,
    )  # fmt: skip
    claims, _ = judged(out, scale)
    marks = [attack_images(arm.candidates[""], 0, context)["images"] for arm in scale.arms[:2]]
    (claim,) = claims.values()
    assert claim.n == sum(mark != "-" for mark in marks[0])
    assert claim.estimate == pytest.approx(100 * (marks[1].count("1") - marks[0].count("1")) / claim.n)


def test_halvings_and_transfer_have_their_claims_and_plots(out):
    apgd = replace(LINEAR, attack="apgd:steps=30,restarts=1", images=15)
    claims, result = judged(out, linbp_white_box.halvings(apgd, seeds=(0, 1, 2)))
    assert claims["halving-1"].published.endswith("(22.95 against 25.85, ResNet-50)")
    assert claims["halving-1"].n == 3
    settings = Transfer(victim=RESNET, targets=(RESNET, MLP), networks=0, attack="ifgsm:step=0.05,noise=0.05",
                        eps=0.2, protocol="standard", images=40)  # fmt: skip
    claims, result = judged(out, linbp_transfer.transfers(settings, "layer2", (2, 4), seeds=(0, 1, 2)))
    assert len(claims) == 4
    assert [[curve.label for curve in series.curves] for series in result.series] == [
        ["BP", "LinBP", "LinBP, renormalised"]
    ] * 2
    assert [row[0] for row in result.tables[0].rows[:2]] == ["BP, 2 steps", "BP, 4 steps"]


def test_every_condition_has_a_claim_beside_the_base(out):
    conditions = {
        "base": {"small": LINEAR},
        "placement": {"all": replace(LINEAR, rule="linbp"), "chosen": replace(LINEAR, rule="linbp:start=auto")},
        "depth": {"one": replace(LINEAR, victim=replace(MLP, model="mlp:widths=24"))},
    }
    claims, result = judged(out, linbp_white_box.white_box(conditions, seeds=(0, 1, 2), lengths=(0.01, 0.1)))
    assert list(claims) == ["base-small", "placement-all", "placement-chosen", "depth-one"]
    rows = {table.title: [row[0] for row in table.rows] for table in result.tables}
    assert rows["placement: every arm"][:3] == ["small, BP", "small, LinBP", "all, BP"]
    assert rows["The two gradients at clean images: every arm"] == ["base: small", "placement: all", "depth: one"]
    assert result.settings["attack"] == LINEAR.attack  # of all arms that attack
    assert len(result.series) == 3  # each network and placement once; a chosen placement has no plot of its own


@pytest.mark.parametrize(
    ("attack", "eps", "network", "rates"),
    [
        ("pgd:steps=20,restarts=5", 16 / 255, "vgg16", (94.88, 99.99)),
        ("apgd:steps=100,restarts=1", 8 / 255, "wrn-28-10", (39.46, 41.20)),
        ("pgd:steps=10,restarts=1", 8 / 255, "resnet50:activation=silu", (74.24, 75.85)),
        ("pgd:steps=7", 8 / 255, "vgg16", None),
        ("pgd:steps=10", 8 / 255, "resnet18", None),
    ],
)
def test_the_papers_rates_are_found_by_attack_radius_and_network(attack, eps, network, rates):
    assert linbp_tables.published(attack, eps, network) == rates


@pytest.mark.parametrize("scale", ["small", "paper"])
@pytest.mark.parametrize("one", EXPERIMENTS, ids=lambda one: one.name)
def test_every_arm_names_a_network_a_rule_and_an_attack_that_exist(one, scale):
    table = one.design(scale)
    assert len(table.seeds) >= 3
    trials = {arm.candidates[""] for arm in table.arms if isinstance(arm.candidates[""], Trial)}
    for trial in trials:
        assert complete(trial.victim.recipe(0)).recipe.model == trial.victim.model
        assert parse_rule_for(trial.victim.model, trial.rule).name in ("bp", "linbp")
        protocol = make_protocol(trial.protocol, trial.victim.data, None)
        (plan,) = make_plans([trial.attack], [trial.eps], {}, protocol)
        assert plan.attack.eps > 0
