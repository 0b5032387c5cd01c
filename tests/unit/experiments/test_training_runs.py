"""A training run of an experiment is what its settings say, and its curves are those of an obvious loop."""

import math

import pytest
import torch
import torch.nn.functional as F

from backpass.data import load_digits
from backpass.errors import BackpassError
from backpass.experiments.images import Source, load_parts
from backpass.experiments.training_runs import Run, network, train_run

CPU = torch.device("cpu")
SOURCE = Source(data="digits", held_out=200)
RUN = Run(model="mlp:widths=12-8", rule="bp", rate=0.3, batch=100, marks=(0, 7, 15), seed=3)


def changed(run=RUN, **settings):
    return Run(**{**vars(run), **settings})


def test_the_held_out_images_are_the_last_and_not_learned_from():
    parts, whole = load_parts(Source(data="digits", train=50, held_out=200, test=30)), load_digits()
    assert torch.equal(parts.train.pixels, whole.train.pixels[:50])
    assert torch.equal(parts.held_out.pixels, whole.train.pixels[-200:])
    assert torch.equal(parts.test.labels, whole.test.labels[:30])
    assert len(load_parts(SOURCE).train) == len(whole.train) - 200


@pytest.mark.parametrize("unit", [False, True])
def test_the_curves_are_those_of_plain_sgd_with_one_permutation_an_epoch(unit):
    parts, run = load_parts(SOURCE), changed(unit=unit)
    model = network(run, parts, "digits")
    x, y = parts.train.x, parts.train.y
    order, expected = torch.Generator().manual_seed(3), []
    rows = [r for _ in range(2) for r in torch.randperm(len(y), generator=order).split(100)[: len(y) // 100]]
    for step in range(16):
        if step in run.marks:
            logits = model(x)
            expected.append((F.cross_entropy(logits, y).item(), 100 * (logits.argmax(1) == y).double().mean().item()))
        gradients = torch.autograd.grad(F.cross_entropy(model(x[rows[step]]), y[rows[step]]), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= 0.3 * (g / g.norm() if unit else g)
    found = train_run(run, SOURCE, CPU)
    assert found["train loss"] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    assert found["train accuracy"] == pytest.approx([accuracy for _, accuracy in expected])
    assert found["seconds"][0] == 0
    assert found["seconds"] == sorted(found["seconds"])


def test_a_rule_is_in_force():
    plain, linear = (train_run(changed(rule=rule), SOURCE, CPU) for rule in ("bp", "linbp"))
    assert plain["train loss"][0] == linear["train loss"][0]
    assert plain["train loss"][1] != linear["train loss"][1]


def test_weights_may_be_small_and_are_the_same_for_a_seed():
    parts = load_parts(SOURCE)
    small = network(changed(std=0.05, model="mlp:widths=400"), parts, "digits")
    assert small.linear1.weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert not small.linear1.bias.any()
    again = network(changed(std=0.05, model="mlp:widths=400"), parts, "digits")
    assert torch.equal(small.linear1.weight, again.linear1.weight)
    usual = network(changed(model="mlp:widths=400"), parts, "digits").linear1.weight
    assert usual.abs().max() <= 1 / math.sqrt(64)


@pytest.mark.parametrize(
    ("rule", "rate"),
    [("bp", 1e6), ("proxprop:tau=1.0", 1e12), ("sibp:eta=1000000.0", 1.0)],
    ids=["bp", "proxprop", "sibp"],
)
def test_a_run_that_diverges_is_nan_from_there_on(rule, rate):
    found = train_run(changed(rule=rule, rate=rate), SOURCE, CPU)
    for name, values in found.items():
        assert all(map(math.isfinite, values[:1])), name
        assert all(map(math.isnan, values[1:])), name


def test_a_rule_without_a_site_is_an_error_and_not_a_divergence():
    with pytest.raises(BackpassError, match="site"):
        train_run(changed(rule="linbp:start=7"), SOURCE, CPU)


def test_a_batch_larger_than_the_images_is_told():
    with pytest.raises(BackpassError, match="batch of 5000"):
        train_run(changed(batch=5000), SOURCE, CPU)
