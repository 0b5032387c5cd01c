"""LinBP in adversarial training: every strategy is trained, judged alike, and claims follow from the numbers."""

import math

import pytest
import torch

from backpass.lab.bench.experiment import Bench
from backpass.lab.experiments.linbp.adversarial_training import (
    EXPERIMENTS,
    STRATEGIES,
    Strategies,
    measure_strategies,
)

TINY = Strategies(
    data="digits",
    model="mlp",
    limit=600,
    eps=0.1,
    far=0.2,
    steps=3,
    step=0.05,
    epochs=2,
    judged=24,
    queries=20,
    rate=0.005,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found():
    return {name: measure_strategies(TINY, name, 0, CPU) for name in STRATEGIES}


@pytest.mark.slow
def test_a_run_gives_numbers_in_their_order_of_strength(found):
    for numbers in found.values():
        clean, pgd, auto, far = (numbers[name][0] for name in ("clean", "test", "autoattack", "autoattack far"))
        assert 0 <= far <= auto <= pgd <= 100
        assert clean > 30
        assert len(numbers["robust"]) == 2


@pytest.mark.slow
def test_strategies_differ_and_runs_repeat(found):
    assert len({str(numbers) for numbers in found.values()}) == len(STRATEGIES)
    assert measure_strategies(TINY, "both", 0, CPU) == found["both"]


def test_a_run_that_diverges_is_recorded_as_diverged():
    numbers = measure_strategies(Strategies(**{**vars(TINY), "rate": 1e9}), "BP", 0, CPU)
    assert math.isnan(numbers["autoattack"][0])
    assert len(numbers["robust"]) == 2


def test_claims_are_paired_over_seeds(monkeypatch):
    # Numbers made for the purpose: strategy 1 two points above BP, 2 one below with a gap of three, both level.
    made = {
        "BP": (70, 70),
        "1, LinBP for the weights": (72, 72),
        "2, LinBP for the examples": (72, 69),
        "both": (70, 70),
    }

    def numbers(settings, strategy, seed, device):
        train, test = (value + 0.1 * seed for value in made[strategy])
        wiggle = 0.01 * ((7 * seed + len(strategy)) % 3)
        return {
            "robust": [50.0, test],
            "clean": [95.0],
            "train": [train],
            "test": [test + wiggle],
            "autoattack": [test + wiggle - 2],
            "autoattack far": [20.0],
        }

    monkeypatch.setattr("backpass.lab.experiments.linbp.adversarial_training.measure_strategies", numbers)
    outcome = EXPERIMENTS[0].measure(TINY, Bench())
    verdicts = {claim.id: claim.verdict for claim in outcome.claims}
    assert verdicts == {
        "first-over-second": "same direction",
        "second-overfits": "same direction",
        "second-worse": "same direction",
        "first-over-plain": "same direction",
        "both-over-plain": "undecided",
    }
    assert all(claim.n == 3 for claim in outcome.claims)
    assert len(outcome.tables[0].rows) == len(STRATEGIES)
