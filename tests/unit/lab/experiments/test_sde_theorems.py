"""The SDE's theory as experiments: every problem counts, and the verdicts are those of the studies."""

import pytest

from backpass.lab.bench.experiment import Bench
from backpass.lab.bench.pieces import Pieces
from backpass.lab.experiments.sde import compare, long_run, theorems
from backpass.lab.experiments.sde.theorems import Orders

BY_NAME = {experiment.name: experiment for experiment in theorems.EXPERIMENTS}


def test_weak_orders_are_those_of_the_derivation_over_all_problems(tmp_path):
    settings = Orders(steps=(0, 2), rhos=(1.0,))
    bench = Bench(pieces=Pieces(tmp_path))
    found = BY_NAME["sde-weak-error"].measure(settings, bench)
    assert bench.pieces.computed == 2
    for claim in found.claims:
        order = 2 if claim.id in ("order-B", "order-C") else 1
        assert claim.n == 6
        assert claim.estimate == pytest.approx(order, abs=0.15)
        assert claim.verdict == "same direction"


def test_an_adversary_that_is_left_out_of_the_sde_costs_an_order(monkeypatch):
    slopes = {"b0": {"f": 1.0}, "b0+sigma": {"f": 1.0}, "B": {"f": 1.0}, "C": {"f": 2.0}}
    monkeypatch.setattr(theorems, "_slopes", lambda study: slopes)
    found = BY_NAME["sde-weak-error"].measure(Orders(), Bench())
    verdicts = {claim.id: claim.verdict for claim in found.claims}
    assert verdicts["order-B"] == "opposite direction"
    assert verdicts["order-C"] == "same direction"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sde-long-run", long_run.Study(dimension=1, paths=40, records=16, relaxations=4.0)),
        ("sde-robustness", compare.Study(paths=4, t=1.0, records=5, points=8)),
    ],
)
def test_the_studies_of_the_command_line_are_experiments(name, settings):
    found = BY_NAME[name].measure(settings, Bench())
    assert found.claims
    assert found.findings
    assert found.series
