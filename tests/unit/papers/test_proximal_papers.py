"""The tables of the ProxProp and SIBP papers, run on the digits; their measurements agree with slow ones."""

import math

import pytest
import torch
import torch.nn.functional as F

from backpass.experiments.directions import directions
from backpass.experiments.experiment import Arm, Context, Runs
from backpass.experiments.images import Source
from backpass.experiments.training import Training, at, at_equal_time, largest_usable_rate, train, training_arm
from backpass.experiments.training_runs import Run
from backpass.models import build
from backpass.papers import proxprop, sibp
from backpass.rules import parse_rule
from support.experiments import Shift, draw, judged

TRAINING = Training(
    run=Run(model="mlp:widths=32-16", batch=100, marks=(0, 5, 10)), source=Source(data="digits", held_out=200)
)


def test_proxprop_is_compared_per_step_in_time_and_in_accuracy(tmp_path):
    methods = {
        "SGD": ("bp", "sgd", (0.1,)),
        "ProxProp + SGD": ("proxprop:stop=-1", "sgd", (3.0, 10.0)),
    }
    claims, result = judged(tmp_path, proxprop.compare("MLP", TRAINING, methods, (("ProxProp + SGD", "SGD"),)))
    assert set(claims) == {f"proxprop-sgd-sgd-{key}" for key in ("steps", "time", "accuracy")}
    assert claims["proxprop-sgd-sgd-steps"].estimate < 0
    assert [row[0] for row in result.tables[0].rows] == ["SGD", "ProxProp + SGD", "ProxProp + SGD"]
    assert [series.x_label for series in result.series] == ["steps", "seconds", "steps"]
    assert "times as much" in result.findings[0].text


def test_conjugate_gradients_come_nearer_with_more_steps_and_always_descend(tmp_path):
    scale = proxprop.solvers(TRAINING, cg_steps=(1, 20), taus=(1e-2, 0.05, 1e2), warm=2)
    claims, result = judged(tmp_path, scale)
    assert all(claims[f"descent-{name}"].interval[0] > 0 for name in ("exact", "cg-1", "cg-20"))
    assert claims["nearer-20"].estimate < 0
    assert {"more-steps", "exact", "gradient", "cheaper"} <= set(claims)
    near, trained = result.tables
    assert [row[0] for row in near.rows] == ["exact", "CG-1", "CG-20"]
    assert [row[0] for row in trained.rows] == ["exact", "CG-1", "CG-20", "gradient"]
    assert near.rows[0][1].mean == 0


def test_sibp_is_compared_with_every_other_method(tmp_path):
    rates = {"sibp": (0.3,), "sgd": (0.1,), "proxprop": (10.0,), "adamw": (1e-3,)}
    claims, _ = judged(tmp_path, sibp.scale({"MLP": (TRAINING, rates)}, 3))
    others = [f"mlp-{key}-{other}" for other in ("sgd", "proxprop", "adamw") for key in ("faster", "lower", "better")]
    assert set(claims) == {"mlp-larger-steps", *others}
    assert claims["mlp-faster-sgd"].estimate < 0
    assert claims["mlp-larger-steps"].estimate == pytest.approx(100 * 0.3 - 0.1)


def test_a_rate_in_the_rule_leaves_the_optimizers_at_one():
    by_rule = training_arm("SIBP", TRAINING, (0.2,), rule="sibp:eta={rate}", optimizer="sgd")
    by_hand = training_arm("SIBP", TRAINING, (1.0,), rule="sibp:eta=0.2", optimizer="sgd")
    assert by_rule.candidates["0.2"] == by_hand.candidates["1"]
    (plain,) = training_arm("SGD", TRAINING, (0.2,), optimizer="sgd").candidates.values()
    assert (plain.run.rule, plain.run.rate) == ("bp", 0.2)


def runs_of(**ends):
    """Runs of one seed by rate, from (last training loss, last accuracy on held-out images)."""
    by_rate = {
        rate.strip("r"): [{"train loss": [2.3, loss], "held-out accuracy": [10.0, end]}]
        for rate, (loss, end) in ends.items()
    }
    arm = Arm(name="SIBP", work=draw, candidates=dict.fromkeys(by_rate, Shift(shift=0.0)))
    return Runs(arm=arm, by_candidate=by_rate, chosen=min(by_rate))


def test_the_largest_usable_rate_learns_nearly_as_well_as_the_best():
    lost = (math.nan, math.nan)
    one = runs_of(r1=(0.5, 90.0), r3=(0.3, 95.0), r10=(0.4, 93.0), r30=(0.6, 91.9), r100=lost)
    assert largest_usable_rate({}).values(one) == [10]
    assert largest_usable_rate({"SIBP": 100.0}).values(one) == [1000]


def test_a_rate_at_which_the_loss_does_not_fall_is_not_usable():
    assert largest_usable_rate({}).values(runs_of(r1=(2.29, 11.0), r3=(2.31, 12.0))) == [1]
    assert largest_usable_rate({}).values(runs_of(r1=(2.4, 11.0))) == [0]


def timed(*runs):
    arm = Arm(name="a", work=draw, candidates={"": Shift(shift=0.0)})
    curves = [{"train loss": losses, "seconds": seconds} for losses, seconds in runs]
    return Runs(arm=arm, by_candidate={"": curves}, chosen="")


def test_losses_are_read_after_the_seconds_of_the_quicker_of_each_pair():
    quick = timed(([4.0, 1.0], [0.0, 2.0]), ([4.0, 1.0], [0.0, 8.0]))
    slow = timed(([4.0, 1.0], [0.0, 4.0]), ([4.0, 1.0], [0.0, 4.0]))
    ours, theirs = at_equal_time("train loss").both(quick, slow)
    assert ours == pytest.approx([1.0, 2.0])  # halfway in time is halfway in the logarithm
    assert theirs == pytest.approx([2.0, 1.0])


def test_after_a_divergence_there_is_no_loss():
    lost, fine = timed(([4.0, math.nan], [0.0, math.nan])), timed(([4.0, 1.0], [0.0, 4.0]))
    ours, _ = at_equal_time("train loss").both(lost, fine)
    assert math.isnan(ours[0])


def test_an_arm_s_seed_is_that_of_its_run():
    (settings,) = training_arm("SGD", TRAINING, (0.1,), optimizer="sgd").candidates.values()
    first, again, other = (train(settings, seed, Context())["train loss"] for seed in (3, 3, 4))
    assert first == again
    assert first[0] != other[0]
    assert at("train loss", 0).label == "training loss"


def test_directions_are_measured_beside_the_gradient_and_the_first():
    torch.manual_seed(0)
    model, x, y = build("mlp:widths=6-5"), torch.rand(20, 1, 8, 8), torch.randint(10, (20,))
    rules = {name: parse_rule(text) for name, text in (("exact", "proxprop:tau=1.0,stop=-1"), ("bp", "bp"))}
    found = directions(model, x, y, rules)
    inputs = [x.flatten(1), model[:4](x)]
    assert isinstance(model[2], torch.nn.Linear)
    outputs = [model.linear1(inputs[0]), model.linear2(inputs[1])]
    model.zero_grad()
    z = [model.linear1(inputs[0]).detach().requires_grad_()]
    z.append(model.linear2(z[0].relu()))
    z[1].retain_grad()
    F.cross_entropy(model.linear3(z[1].relu()), y).backward()
    cosines, errors = [], []
    for a, zi in zip((inputs[0], outputs[0].relu()), z, strict=True):
        rows = torch.cat([a, torch.ones(20, 1)], 1).detach().double()
        gradient = rows.T @ zi.grad.double()
        proximal = torch.linalg.solve(rows.T @ rows + torch.eye(rows.shape[1]), gradient)
        cosines.append(float((gradient * proximal).sum() / gradient.norm() / proximal.norm()))
        errors.append(float((gradient - proximal).norm() / proximal.norm()))
    assert found["exact"] == pytest.approx({"cosine": min(cosines), "error": 0}, rel=1e-4)
