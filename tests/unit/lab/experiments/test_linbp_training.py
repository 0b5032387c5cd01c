"""The LinBP training figures run on the digits, and say what was planted."""

import math

import pytest

from backpass.lab.bench.experiment import Bench, Experiment
from backpass.lab.bench.images import Source
from backpass.lab.experiments.linbp import step_sizes, training
from backpass.lab.experiments.linbp.step_sizes import Case, StepSizes
from backpass.lab.experiments.linbp.training_settings import CIFAR10, MNIST, Network, Training

ONE = Network(model="mlp:widths=16-16-16", rate=0.05, epochs=2)
SETTINGS = Training(source=Source(data="digits"), networks={"MLP": ONE}, batch=64, schedule="exponential:gamma=0.9")


def run(experiments, name, settings):
    (found,) = (one for one in experiments if one.name == name)
    return Experiment(**{**vars(found), "scales": {"tiny": settings}}).run("tiny", Bench())


@pytest.mark.parametrize("name", ["linbp-fig5", "linbp-fig7", "linbp-fig10"])
def test_a_figure_compares_loss_and_accuracy_early_and_in_the_end(name):
    result = run(training.EXPERIMENTS, name, SETTINGS)
    assert len(result.claims) == 8
    assert {claim.n for claim in result.claims} == {3}
    assert all(math.isfinite(claim.estimate) for claim in result.claims)
    assert all(claim.published for claim in result.claims)
    early, end = (next(c for c in result.claims if c.id == f"{name}.mlp-{k}-train-loss") for k in ("early", "end"))
    curves = {curve.label: curve.runs for curve in result.series[0].curves}
    for claim, place in ((early, 1), (end, 2)):
        gaps = [a[place] - b[place] for a, b in zip(curves["LinBP"], curves["BP"], strict=True)]
        assert claim.estimate == pytest.approx(sum(gaps) / 3)
    result.as_json()


def test_a_rule_that_changes_nothing_differs_by_nothing():
    plain = Network(model="mlp:widths=16-16-16", rule="bp", rate=0.05, epochs=1)
    result = run(training.EXPERIMENTS, "linbp-fig5", Training(**{**vars(SETTINGS), "networks": {"MLP": plain}}))
    assert {(claim.estimate, claim.verdict) for claim in result.claims} == {(0, "undecided")}


def test_a_run_that_diverged_is_told_and_not_compared():
    wild = Network(model="mlp:widths=64", rule="linbp:slope=1000.0", rate=1.0, epochs=2)
    result = run(training.EXPERIMENTS, "linbp-fig5", Training(**{**vars(SETTINGS), "networks": {"MLP": wild}}))
    assert "diverged, 3 of 3 with LinBP and 0 of 3 with BP" in result.findings[0].text
    assert {claim.verdict for claim in result.claims} == {"undecided"}


def test_large_steps_find_the_rule_that_fails():
    """At rate 1 plain SGD learns the digits; a slope of 40 at every site makes LinBP's steps far too long."""
    wild = Network(model="mlp:widths=64", rule="linbp:slope=40.0", rate=1.0, epochs=5)
    same = Network(model="mlp:widths=64", rule="bp", rate=1.0, epochs=5)
    settings = StepSizes(
        cases={
            "Wild x2": Case(network=wild, expected="fails", data="digits"),
            "Same x2": Case(network=same, expected="alike", data="digits"),
            "Wild, unit steps": Case(network=wild, expected="no better", unit=True, data="digits"),
        },
        training={"digits": Training(**{**vars(SETTINGS), "networks": {}, "schedule": ""})},
    )
    result = run(step_sizes.EXPERIMENTS, "linbp-fig9", settings)
    verdicts = {claim.id.partition(".")[2]: (claim.estimate, claim.verdict) for claim in result.claims}
    assert verdicts["wild-x2-linbp-fails"] == (1, "same direction")
    assert verdicts["wild-x2-bp-converges"] == (0, "same direction")
    assert verdicts["same-x2-alike"] == (0, "same direction")
    assert "wild-unit-steps-no-better" in verdicts
    assert "Wild x2 (3 of 3 runs)" in result.findings[0].text
    result.as_json()


def test_the_papers_scales_have_the_papers_networks_and_rates():
    assert {name: (one.rate, one.rule) for name, one in MNIST["paper"].networks.items()} == {
        "MLP": (0.001, "linbp:start=paper"),
        "LeNet-5": (0.005, "linbp:start=paper"),
    }
    big = CIFAR10["cosine"]["paper"]
    assert {one.model for one in big.networks.values()} == {"resnet50", "densenet161", "mobilenetv2"}
    assert {one.epochs for one in big.networks.values()} == {100}
