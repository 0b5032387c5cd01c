"""The theory of adversarial training's SDE as experiments: weak orders, the long run, robustness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from backpass.lab.bench.experiment import Bench, Experiment, Outcome
from backpass.lab.experiments.sde import compare, compare_result, long_run, weak_error
from backpass.report.claims import judge_within
from backpass.report.result import Finding, Result, Table
from backpass.report.statistics import mean_interval
from backpass.sde import VARIANTS

__all__ = ["EXPERIMENTS", "Orders"]

_PAPER = "Gu and Guo, arXiv 2105.08037v1"
_DERIVED = f"derived for this project in the setting of {_PAPER}, whose abstract claims an error bound"
_TOLERANCE = 0.15
"""Largest difference of a measured slope from the order, as the learning rates are finite."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """The regressions and adversaries on which weak orders are measured.

    Attributes:
        dimensions: parameters of the regressions, 1 or 2.
        steps: numbers of steps K of the adversary.
        rhos: eta_inner / eta_outer, each used where there is an adversary.
        largest: the largest learning rate.
        halvings: how often it is halved.
    """

    dimensions: tuple[int, ...] = (1,)
    steps: tuple[int, ...] = (0, 2, 3)
    rhos: tuple[float, ...] = (1.0, 3.0)
    largest: float = 0.005
    halvings: int = 2

    @property
    def studies(self) -> list[weak_error.Study]:
        """Every regression with every adversary."""
        return [
            weak_error.Study(dimension=dimension, steps=k, rho=rho, largest=self.largest, halvings=self.halvings)
            for dimension in self.dimensions
            for k in self.steps
            for rho in (self.rhos if k else self.rhos[:1])
        ]


def _weak_orders(settings: Orders, bench: Bench) -> Outcome:
    slopes = {
        study: bench.pieces.value(
            f"{study.dimension}-D, K = {study.steps}, rho = {study.rho:g}",
            partial(_slopes, study),
            **asdict(study),
        )
        for study in settings.studies
    }
    together = {name: [slope for found in slopes.values() for slope in found[name].values()] for name in VARIANTS}
    ranges = "; ".join(f"{name} {min(values):.2f} to {max(values):.2f}" for name, values in together.items())
    return Outcome(
        findings=[
            Finding(
                "Weak orders",
                f"Slopes of the log error against the log learning rate, over {len(slopes)} problems with "
                f"{len(weak_error.FUNCTIONS)} test functions each: {ranges}. One term, K eta_I/2 E|grad_x L|^2 in the "
                "potential, makes the difference between order 1 and 2: it is what the adversary adds to SGD.",
            )
        ],
        series=[],
        claims=[
            judge_within(
                f"order-{name}",
                f"{weak_error.WORDS[name]} has weak order {VARIANTS[name].order}",
                values=values,
                low=VARIANTS[name].order - _TOLERANCE,
                high=VARIANTS[name].order + _TOLERANCE,
                quantity="slope",
                reference=_DERIVED,
            )
            for name, values in together.items()
        ],
        tables=[_slope_table(slopes)],
        data="four points in each regression, made",
        seeds=(),
        claims_note="Nothing here is random; n counts problems and test functions, and the interval is over them.",
    )


def _slopes(study: weak_error.Study) -> dict[str, dict[str, float]]:
    return weak_error.measure(study).errors.slopes


def _slope_table(slopes: dict[weak_error.Study, dict[str, dict[str, float]]]) -> Table:
    return Table(
        id="slopes",
        title="Slopes",
        columns=["Problem", *(weak_error.WORDS[name] for name in VARIANTS)],
        rows=[
            [
                f"{study.dimension}-D, K = {study.steps}, rho = {study.rho:g}",
                *(mean_interval(list(found[name].values())).mean for name in VARIANTS),
            ]
            for study, found in slopes.items()
        ],
        note="Means over the test functions.",
    )


def _robustness(settings: compare.Study, bench: Bench) -> Outcome:
    return _outcome(compare_result.describe(compare.measure(settings)), seeds=[settings.seed])


def _long_run(settings: long_run.Study, bench: Bench) -> Outcome:
    return _outcome(long_run.describe(long_run.measure(settings)), seeds=[settings.seed])


def _outcome(result: Result, *, seeds: Sequence[int]) -> Outcome:
    """Convert the result of a study of ``backpass sde`` to an experiment's outcome."""
    return Outcome(
        findings=result.findings,
        series=result.series,
        claims=result.claims,
        tables=result.tables,
        data=result.environment["data"],
        seeds=seeds,
        plots_note=result.plots_note,
        claims_note=result.claims_note,
    )


_SMALL = compare.Study(paths=40, t=10.0)

EXPERIMENTS = (
    Experiment(
        name="sde-weak-error",
        title="How close are the SDEs to adversarial training?",
        question=(
            "Expectations of the chain are compared with those of four SDEs, both without Monte Carlo, on regressions "
            "with several adversaries. The order is the slope of the error against the learning rate."
        ),
        source=f"{_PAPER}, abstract: error bound",
        scales={"small": Orders(), "paper": Orders(dimensions=(1, 2))},
        measure=_weak_orders,
    ),
    Experiment(
        name="sde-long-run",
        title="Where does adversarial training come to rest, and how fast?",
        question=(
            "Adversarial training of a linear regression on four points is run for many relaxation times; its "
            "stationary law is predicted without running it, by a shifted minimum and a Lyapunov equation."
        ),
        source=f"{_PAPER}, abstract: convergence analysis",
        scales={"small": long_run.Study(), "paper": long_run.Study(paths=4000)},
        measure=_long_run,
    ),
    Experiment(
        name="sde-robustness",
        title="Is adversarial training a gradient flow towards robustness?",
        question=(
            "A tanh network of 37 parameters learns by SGD and by adversarial training, many times from one start, and "
            "so do the SDEs that model them."
        ),
        source=f"{_PAPER}, abstract: robustness from a gradient-flow viewpoint",
        scales={"small": _SMALL, "paper": replace(_SMALL, paths=400, t=20.0)},
        measure=_robustness,
    ),
)
