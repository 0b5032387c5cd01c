"""The weak order of the SDEs, by an oracle without Monte Carlo."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from backpass.errors import BackpassError
from backpass.lab.experiments.sde.regression import choose, squared_loss
from backpass.lab.threads import one_thread
from backpass.report.claims import Claim, Direction, agreement, judge
from backpass.report.result import Curve, Finding, Result, Series, Table, environment
from backpass.report.statistics import Interval
from backpass.sde import VARIANTS, AdversarialSDE, WeakErrors, weak_error

__all__ = ["FUNCTIONS", "Measured", "Study", "describe", "measure"]

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sin 2 theta_1": lambda p: (2 * p[..., 0]).sin(),
    "|theta|^2": lambda p: p.square().sum(-1),
    "exp(-|theta|^2)": lambda p: (-p.square().sum(-1)).exp(),
}
"""Several, because one error can change its sign with eta and then fakes a slope."""

WORDS = {
    "b0": "b0: gradient flow",
    "b0+sigma": "b0 + sigma: noise",
    "B": "B: expanded",
    "C": "C: exact attack",
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of the comparison.

    Attributes:
        dimension: parameters of the regression, 1 or 2.
        steps: K of the adversary.
        rho: eta_inner / eta_outer.
        batch_size: B.
        t: the horizon.
        largest: the largest learning rate.
        halvings: how often it is halved.
    """

    dimension: int = 1
    steps: int = 2
    rho: float = 1.0
    batch_size: int = 1
    t: float = 2.0
    largest: float = 0.02
    halvings: int = 4

    def __post_init__(self) -> None:
        if not (math.isfinite(self.largest) and self.largest > 0) or self.halvings < 1:
            raise BackpassError(f"eta must be > 0 and halved at least once; got {self.largest} and {self.halvings}.")

    @property
    def etas(self) -> tuple[float, ...]:
        """The learning rates."""
        return tuple(self.largest / 2**k for k in range(self.halvings + 1))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measured numbers.

    Attributes:
        study: the settings.
        errors: by SDE, test function and learning rate.
        seconds: how long it took.
    """

    study: Study
    errors: WeakErrors
    seconds: float


@one_thread()
def measure(study: Study) -> Measured:
    """Every SDE against the chain at every learning rate.

    Raises:
        BackpassError: a setting is out of its range, or the adversary drives the chain out of the oracle's box.
    """
    began = time.perf_counter()
    problem = choose(study.dimension)
    errors = weak_error(
        AdversarialSDE(
            squared_loss,
            problem.data,
            eta_outer=1.0,
            eta_inner=study.rho,
            steps=study.steps,
            batch_size=study.batch_size,
        ),
        bounds=problem.bounds,
        theta0=torch.tensor(problem.start, dtype=torch.float64),
        functions=FUNCTIONS,
        t=study.t,
        etas=study.etas,
        nodes=problem.nodes,
    )
    return Measured(study=study, errors=errors, seconds=time.perf_counter() - began)


def describe(measured: Measured) -> Result:
    """The result that the report shows."""
    study = measured.study
    problem = choose(study.dimension)
    claims = _claims(measured.errors)
    return Result(
        experiment="sde-weak-error",
        title="How close are the SDEs to adversarial training?",
        question=(
            "Adversarial training of a linear regression on four points is a Markov chain. Its expectations are "
            "compared with those of four SDEs, both without Monte Carlo: the chain's transfer operator and the SDE's "
            "generator act on functions given by their values on Chebyshev nodes. The error is the largest over "
            "all steps up to the horizon, and its order is the slope against the learning rate."
        ),
        scale="standard",
        findings=_findings(measured, claims),
        environment={
            **environment(device="cpu", threads=1, data="four points, given in the settings", seeds=()),
            "seconds": round(measured.seconds, 1),
        },
        settings={**asdict(study), "etas": study.etas, **asdict(problem)},
        series=[_series(measured, function) for function in FUNCTIONS],
        tables=[_table(measured.errors)],
        claims=claims,
        plots_note="Nothing here is random, so there are no bands.",
        claims_note=(
            "Each slope is measured with three test functions; the interval is Student's t over them, of the slope "
            "less 1.5, which is half-way between the orders 1 and 2."
        ),
    )


def _series(measured: Measured, function: str) -> Series:
    found = measured.errors
    return Series(
        id="weak-error-" + "-".join(part for part in "".join(c if c.isalnum() else " " for c in function).split()),
        title=f"Weak error of {function}",
        description=f"Largest error of E {function} up to time {measured.study.t:g} against the learning rate.",
        x_label="learning rate eta",
        y_label="weak error",
        curves=[
            Curve(
                label=WORDS[name],
                x=found.etas,
                given=[Interval(error, math.nan, math.nan, 1) for error in row[function]],
            )
            for name, row in found.errors.items()
        ],
        log_x=True,
        log_y=True,
    )


def _table(found: WeakErrors) -> Table:
    return Table(
        id="weak-errors",
        title="Weak errors",
        columns=["SDE", "test function", "slope", *(f"eta {eta:g}" for eta in found.etas), "of that the oracle's"],
        rows=[
            [
                name,
                function,
                f"{found.slope(name, function):.2f}",
                *(f"{error:.2e}" for error in errors),
                f"{found.resolution[name][function]:.0e}",
            ]
            for name, row in found.errors.items()
            for function, errors in row.items()
        ],
        note=(
            "The slope of log error against log eta, by least squares. Last column: the largest relative change of an "
            "error when the oracle has three nodes less per dimension."
        ),
    )


def _claims(found: WeakErrors) -> list[Claim]:
    claims = []
    for name, row in found.slopes.items():
        order = VARIANTS[name].order
        direction: Direction = "higher" if order == 2 else "lower"
        claims.append(
            judge(
                f"order-{name}",
                f"{WORDS[name]} has weak order {order}",
                ours=list(row.values()),
                theirs=[1.5] * len(row),
                direction=direction,
                quantity="slope less 1.5",
                reference="derived for this project in the setting of Gu and Guo, arXiv 2105.08037v1",
            )
        )
    return claims


def _findings(measured: Measured, claims: list[Claim]) -> list[Finding]:
    found = measured.errors
    slopes = {name: list(row.values()) for name, row in found.slopes.items()}
    ranges = "; ".join(f"{name} {min(values):.2f} to {max(values):.2f}" for name, values in slopes.items())
    agree = sum(agreement(claim.verdict) is True for claim in claims)
    worst = max(value for row in found.resolution.values() for value in row.values())
    smallest = found.errors["C"]["|theta|^2"][-1], found.errors["B"]["|theta|^2"][-1]
    return [
        Finding("Weak orders", f"Slopes over the test functions: {ranges}. {agree} of {len(claims)} claims agree."),
        Finding(
            "Exact or expanded",
            f"At eta {found.etas[-1]:g} the error of E |theta|^2 is {smallest[0]:.1e} with the attack kept exact and "
            f"{smallest[1]:.1e} with it expanded.",
        ),
        Finding("The oracle", f"With three nodes less no error changes by more than {worst:.0e} of itself."),
    ]
