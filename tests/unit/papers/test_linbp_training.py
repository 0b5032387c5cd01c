"""The tables of LinBP in training, run on the digits, and what they say of planted numbers."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from backpass.experiments.adversarial_training import Adversarial, train_adversarially
from backpass.experiments.experiment import Context, Experiment, Runs
from backpass.experiments.images import Source
from backpass.experiments.judging import judge_all
from backpass.experiments.training_runs import train_run
from backpass.papers import linbp_training
from backpass.papers.linbp_adversarial import strategies
from backpass.papers.linbp_training import Published, alike, curves, fails, network, no_better, step_sizes
from support.experiments import judged

DIGITS = Source(data="digits", train=1000, test=200)
PUBLISHED = Published(train="Figure 5", test="Figure 6", early="lower", end="alike")
mlp = partial(network, "mlp:widths=16-16-16", DIGITS, rate=0.05, batch=64)
wide = partial(network, "mlp:widths=64", DIGITS, rate=1.0, batch=64)
TINY = Adversarial(
    data="digits", model="mlp", limit=600, eps=0.1, far=0.2, steps=3, step=0.05, epochs=2, judged=24, queries=20,
    rate=0.005,
)  # fmt: skip
ARMS = {arm.name: arm for arm in strategies(TINY, 3).arms}


def test_loss_and_accuracy_are_compared_early_and_in_the_end(tmp_path):
    one = mlp(epochs=2, per_epoch=2, schedule="exponential:gamma=0.9")
    claims, result = judged(tmp_path, curves({"MLP": one}, PUBLISHED, 3))
    assert len(claims) == 8
    steps, cpu = {"early": 8, "end": 30}, torch.device("cpu")  # 15 an epoch; evaluated after 0, 8, 15, 22 and 30
    alone = replace(one.training.run, marks=tuple(steps.values()))
    runs = [
        [train_run(replace(alone, rule=rule, seed=seed), DIGITS, cpu) for rule in (one.rule, "bp")] for seed in range(3)
    ]
    for place, moment in enumerate(steps):
        for key in ("train loss", "train accuracy", "test loss", "test accuracy"):
            claim = claims[f"mlp-{moment}-{key.replace(' ', '-')}"]
            assert claim.estimate == pytest.approx(sum(ours[key][place] - bp[key][place] for ours, bp in runs) / 3)
            assert claim.published == {"early": "lower", "end": "alike"}[moment]
    assert "after 0.5 of the first epoch" in claims["mlp-early-train-loss"].statement
    assert [list(series.curves[0].x) for series in result.series] == [[0, 0.5, 1, 1.5, 2]] * 3


def test_a_rule_that_changes_nothing_differs_by_nothing(tmp_path):
    claims, _ = judged(tmp_path, curves({"MLP": mlp(epochs=1, rule="bp")}, PUBLISHED, 3))
    assert {(claim.estimate, claim.verdict) for claim in claims.values()} == {(0, "undecided")}


def test_a_run_that_diverged_is_worse_and_reported(tmp_path):
    claims, result = judged(tmp_path, curves({"MLP": wide(epochs=2, rule="sibp:eta=1000000.0")}, PUBLISHED, 3))
    assert {claim.verdict for claim in claims.values()} == {"undecided"}  # three pairs are too few for a sign test
    assert all("diverged in 3 of 3 pairs" in claim.note for claim in claims.values())
    assert {row[0]: row[-1] for row in result.tables[0].rows} == {"BP": "0 of 3", "LinBP": "3 of 3"}


def test_large_steps_find_the_rule_that_fails(tmp_path):
    """At rate 1 plain SGD learns the digits; a slope of 40 at every site makes LinBP's steps far too long."""
    cases = {
        "Wild x2": (wide(epochs=5, rule="linbp:slope=40.0"), fails),
        "Same x2": (wide(epochs=5, rule="bp"), alike),
        "Wild, unit steps": (wide(epochs=5, rule="linbp:slope=40.0", unit=True), no_better),
    }
    claims, _ = judged(tmp_path, step_sizes(cases, 3))
    assert {name: claim.estimate for name, claim in claims.items() if "steps" not in name} == {
        "wild-x2-linbp-fails": 1,
        "wild-x2-bp-converges": 0,
        "same-x2-alike": 0,
    }
    assert {claim.verdict for name, claim in claims.items() if "steps" not in name} == {"same direction"}
    assert math.isfinite(claims["wild-unit-steps-no-better"].estimate)


def test_the_papers_scales_have_the_papers_networks_and_rates():
    known = {one.name: one.scales["paper"] for one in linbp_training.EXPERIMENTS}
    runs = {name: [of.run for arm in scale.arms for of in arm.candidates.values()] for name, scale in known.items()}
    assert {(run.model, run.rate, run.marks[-1]) for run in runs["linbp-fig5"]} == {
        ("mlp", 0.001, 50 * 937),
        ("lenet5", 0.005, 50 * 937),
    }
    big = {(model, 0.005, 100 * 390) for model in ("resnet50", "densenet161", "mobilenetv2")}
    for name in ("linbp-fig7", "linbp-fig10"):
        assert {(run.model, run.rate, run.marks[-1]) for run in runs[name]} == big
    assert {run.rule for every in runs.values() for run in every} == {"bp", "linbp:start=paper"}


@pytest.fixture(scope="module")
def found():
    return {name: train_adversarially(arm.candidates[""], 0, Context()) for name, arm in ARMS.items()}


@pytest.mark.slow
def test_an_adversarial_run_gives_numbers_in_their_order_of_strength(found):
    for one in found.values():
        assert 0 <= one["autoattack far"] <= one["autoattack"] <= one["test"] <= 100
        assert one["clean"] > 30
        assert len(one["robust"]) == 2


@pytest.mark.slow
def test_strategies_differ_and_runs_repeat(found):
    assert len({str(one) for one in found.values()}) == len(ARMS)
    assert train_adversarially(ARMS["both"].candidates[""], 0, Context()) == found["both"]


def test_an_adversarial_run_that_diverges_is_nan():
    one = train_adversarially(replace(TINY, rate=1e9), 0, Context())
    assert set(one) == {"robust", "clean", "train", "test", "autoattack", "autoattack far"}
    assert math.isnan(one["autoattack"])
    assert len(one["robust"]) == 2


def test_strategies_are_paired_over_seeds():
    # Planted: strategy 1 two points above BP, 2 one below with a gap of three, both level.
    planted = dict(zip(ARMS, ((70, 70), (72, 72), (72, 69), (70, 70)), strict=True))

    def outcome(name, seed):
        train, test = (value + 0.1 * seed for value in planted[name])
        test += 0.01 * ((7 * seed + len(name)) % 3)
        return {"train": train, "test": test, "autoattack": test - 2}

    runs = {
        ("", name): Runs(arm=arm, by_candidate={"": [outcome(name, seed) for seed in range(3)]}, chosen="")
        for name, arm in ARMS.items()
    }
    one = Experiment(name="tiny", title="T", question="Q?", source="P", scales={"tiny": strategies(TINY, 3)})
    assert {claim.id.partition(".")[2]: (claim.verdict, claim.n) for claim in judge_all(one, "tiny", runs)} == {
        "first-over-second": ("same direction", 3),
        "second-overfits": ("same direction", 3),
        "second-worse": ("same direction", 3),
        "first-over-plain": ("same direction", 3),
        "both-over-plain": ("undecided", 3),
    }
