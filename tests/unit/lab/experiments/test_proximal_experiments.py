"""The ProxProp and SIBP experiments run on the digits; their own measurements agree with slow ones."""

import math

import pytest
import torch
import torch.nn.functional as F

from backpass.lab.bench.experiment import Bench, Experiment
from backpass.lab.bench.images import Source
from backpass.lab.bench.tuning import Method, Protocol, Tuned
from backpass.lab.experiments.proxprop import conjugate_gradients
from backpass.lab.experiments.proxprop import training as proxprop_training
from backpass.lab.experiments.proxprop.conjugate_gradients import Solvers
from backpass.lab.experiments.proxprop.directions import directions
from backpass.lab.experiments.proxprop.training import Comparison
from backpass.lab.experiments.sibp import training as sibp_training
from backpass.lab.experiments.sibp.training import Early, longest_step
from backpass.models import build
from backpass.rules import parse_rule

SOURCE = Source(data="digits", held_out=200)
PROTOCOL = Protocol(model="mlp:widths=32-16", source=SOURCE, batch=100, marks=(0, 5, 10), seeds=3)


def run(experiments, name, settings):
    (found,) = (one for one in experiments if one.name == name)
    result = Experiment(**{**vars(found), "scales": {"tiny": settings}}).run("tiny", Bench())
    result.as_json()
    return {claim.id.partition(".")[2]: claim for claim in result.claims}, result


def test_proxprop_is_compared_per_step_in_time_and_in_accuracy():
    methods = {
        "SGD": Method(optimizer="sgd", rates=(0.1,)),
        "ProxProp + SGD": Method(rule="proxprop:stop=-1", optimizer="sgd", rates=(3.0, 10.0)),
    }
    settings = Comparison(name="MLP", protocol=PROTOCOL, methods=methods, pairs=(("ProxProp + SGD", "SGD"),))
    claims, result = run(proxprop_training.EXPERIMENTS, "proxprop-mlp", settings)
    assert set(claims) == {f"proxprop-sgd-sgd-{key}" for key in ("steps", "time", "accuracy")}
    assert claims["proxprop-sgd-sgd-steps"].verdict == "holds"
    assert [row[0] for row in result.tables[0].rows] == ["SGD", "ProxProp + SGD", "ProxProp + SGD"]


def test_directions_are_told_beside_the_gradient_and_the_first():
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
    assert found["bp"] == pytest.approx({"cosine": 1, "error": max(errors)}, rel=1e-4)


def test_conjugate_gradients_come_nearer_with_more_steps_and_always_descend():
    settings = Solvers(
        model="mlp:widths=32-16", source=SOURCE, batch=100, marks=(0, 5), judged=300, cg_steps=(1, 20), warm=2,
        taus=(1e-2, 0.05, 1e2),
    )  # fmt: skip
    claims, result = run(conjugate_gradients.EXPERIMENTS, "proxprop-cg", settings)
    assert {claims[f"descent-{name}"].verdict for name in ("exact", "cg-1", "cg-20")} == {"holds"}
    assert claims["nearer-20"].verdict == "holds"
    assert {"more-steps", "exact", "gradient", "cheaper"} <= set(claims)
    assert {row[0] for row in result.tables[0].rows} == {"exact", "CG-1", "CG-20", "gradient"}


@pytest.mark.parametrize("name", ["sibp-mnist", "sibp-depth", "sibp-cifar10"])
def test_sibp_is_compared_with_every_other_method(name):
    methods = {
        "SIBP": Method(rule="sibp:eta={rate}", optimizer="sgd", rates=(0.3,)),
        "SGD": Method(optimizer="sgd", rates=(0.1,)),
        "ProxProp": Method(rule="proxprop:tau=1.0", optimizer="sgd", rates=(10.0,)),
    }
    claims, result = run(sibp_training.EXPERIMENTS, name, Early(protocols={"MLP": PROTOCOL}, methods={"MLP": methods}))
    others = [f"mlp-{key}-{other}" for other in ("sgd", "proxprop") for key in ("faster", "lower", "better")]
    assert set(claims) == {"mlp-larger-steps", *others}
    assert claims["mlp-faster-sgd"].verdict == "holds"
    assert result.settings["chosen rates"] == {"MLP": {"SIBP": 0.3, "SGD": 0.1, "ProxProp": 10.0}}


def by_rate(**ends):
    runs = {
        float(rate.strip("r")): [{"train loss": [2.3, loss], "held-out accuracy": [10.0, end]}]
        for rate, (loss, end) in ends.items()
    }
    return Tuned(rate=min(runs), by_rate=runs)


def test_the_longest_usable_step_is_the_largest_rate_that_learns_nearly_as_well_as_the_best():
    lost = (math.nan, math.nan)
    one = by_rate(r1=(0.5, 90.0), r3=(0.3, 95.0), r10=(0.4, 93.0), r30=(0.6, 91.9), r100=lost)
    assert longest_step(one, 0) == 10
    assert longest_step(one, 0, 100.0) == 1000


def test_a_rate_at_which_the_loss_does_not_fall_is_not_usable():
    assert longest_step(by_rate(r1=(2.29, 11.0), r3=(2.31, 12.0)), 0) == 1
    assert longest_step(by_rate(r1=(2.4, 11.0)), 0) == 0
