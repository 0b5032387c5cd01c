"""The optimal learning-rate schedule of a linear-quadratic problem, drawn beside the best fixed rate."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from backpass.errors import BackpassError
from backpass.lab.threads import one_thread
from backpass.report.result import Curve, Finding, Result, Series, Table, environment
from backpass.report.statistics import Interval
from backpass.sde import Schedule, optimal_lr

__all__ = ["Measured", "Study", "describe", "measure"]

_MOST_STEPS = 10**6

_POINTS = 200
"""Points of each curve."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The problem.

    Attributes:
        curvature: a of the loss.
        noise: s^2, the variance of a minibatch gradient.
        eta: the largest learning rate.
        start: the excess risk at the start.
        t: the horizon, in SDE time: steps * eta.
        adversarial: K eta_I V'' that an adversary adds to the curvature.
    """

    curvature: float = 1.0
    noise: float = 1.0
    eta: float = 0.1
    start: float = 0.5
    t: float = 10.0
    adversarial: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Computed schedules.

    Attributes:
        study: the problem.
        closed: the schedule in closed form.
        numeric: the one from the Hamilton-Jacobi-Bellman equation.
        chain: the excess risk of the chain after each step under the schedule, exactly.
        chain_fixed: the same under the best fixed rate.
        seconds: how long it took.
    """

    study: Study
    closed: Schedule
    numeric: Schedule
    chain: Sequence[float]
    chain_fixed: Sequence[float]
    seconds: float


@one_thread()
def measure(study: Study) -> Measured:
    """Both schedules, and the chain's risk under them.

    Raises:
        BackpassError: a number is out of its range.
    """
    began = time.perf_counter()
    problem = asdict(study)
    horizon = problem.pop("t")
    closed = optimal_lr(**problem, horizon=horizon)
    numeric = optimal_lr(**problem, horizon=horizon, method="hjb")
    steps = max(1, round(horizon / study.eta))
    if steps > _MOST_STEPS:
        raise BackpassError(
            f"t / eta is {steps:.3g} steps of the chain, and the limit is {_MOST_STEPS:,}: take a smaller t."
        )
    return Measured(
        study=study,
        closed=closed,
        numeric=numeric,
        chain=_chain(study, [closed.factor(k) for k in range(steps)]),
        chain_fixed=_chain(study, [closed.fixed[0]] * steps),
        seconds=time.perf_counter() - began,
    )


def _chain(study: Study, controls: Sequence[float]) -> list[float]:
    """E of theta' = theta - u eta (a theta + s xi), by its exact recursion."""
    a, risks = study.curvature + study.adversarial, [study.start]
    for u in controls:
        rate = u * study.eta
        risks.append((1 - rate * a) ** 2 * risks[-1] + a * rate**2 * study.noise / 2)
    return risks


def describe(measured: Measured) -> Result:
    """The result that the report shows."""
    study, closed, numeric = measured.study, measured.closed, measured.numeric
    times = [study.t * k / (_POINTS - 1) for k in range(_POINTS)]
    fixed, fixed_risk = closed.fixed
    every = max(1, len(measured.chain) // _POINTS)
    steps = range(0, len(measured.chain), every)
    return Result(
        experiment="sde-control",
        title="Which learning-rate schedule is best?",
        question=(
            "Near a minimum of curvature a, with gradient noise of variance s^2, the excess risk m of stochastic "
            "gradient descent obeys m' = -2 a u m + a eta s^2 u^2 / 2, where u in [0, 1] scales the learning rate. An "
            "adversary adds to a. The best u has a closed form; the Hamilton-Jacobi-Bellman equation in m, by finite "
            "differences, is a check on it."
        ),
        scale="standard",
        findings=_findings(measured),
        environment={
            **environment(device="cpu", threads=1, data="none: nothing is random here", seeds=()),
            "seconds": round(measured.seconds, 2),
        },
        settings=asdict(study),
        series=[
            _series(
                "control",
                "Learning rate",
                "learning rate",
                study.eta,
                [
                    ("closed form", times, [closed.at(t) for t in times]),
                    ("finite differences", times, [numeric.at(t) for t in times]),
                    ("best fixed", times, [fixed] * _POINTS),
                ],
            ),
            _series(
                "risk",
                "Excess risk",
                "excess risk m",
                1.0,
                [
                    ("closed form", times, [closed.problem.optimal(t)[1] for t in times]),
                    ("the chain under it", [k * study.eta for k in steps], [measured.chain[k] for k in steps]),
                    ("best fixed", times, [closed.problem.fixed(fixed, t) for t in times]),
                ],
            ),
        ],
        tables=[
            Table(
                id="ends",
                title="Excess risk at the end",
                columns=["Schedule", "risk", "over best fixed"],
                rows=[
                    [name, f"{risk:.6f}", f"{risk / fixed_risk:.3f}"]
                    for name, risk in (
                        ("closed form", closed.value),
                        ("HJB, its value", numeric.value),
                        ("HJB, its policy", numeric.risk[-1]),
                        ("best fixed", fixed_risk),
                        ("the chain under it", measured.chain[-1]),
                        ("the chain, best fixed", measured.chain_fixed[-1]),
                    )
                ],
            )
        ],
        claims=[],
        plots_note="Nothing here is random, so there are no bands.",
    )


def _findings(measured: Measured) -> list[Finding]:
    study, closed, numeric = measured.study, measured.closed, measured.numeric
    fixed, fixed_risk = closed.fixed
    growth = study.curvature + study.adversarial
    return [
        Finding(
            "The schedule",
            f"Hold the largest rate up to t = {closed.switch:.3g} ({closed.switch / study.eta:.0f} steps), then let "
            f"the inverse grow by {growth:.3g} a step. It ends at an excess risk of {closed.risk[-1]:.6f}, the best "
            f"fixed rate ({fixed * study.eta:.4g}) at {fixed_risk:.6f}: {100 * closed.gain:.0f} % less.",
        ),
        Finding(
            "The check",
            f"The Hamilton-Jacobi-Bellman equation gives {numeric.value:.6f} on its grid "
            f"({100 * (numeric.value / closed.value - 1):+.2f} %), and its policy, followed, {numeric.risk[-1]:.6f}.",
        ),
        Finding(
            "The chain",
            f"In the chain itself, step by step and exactly, the schedule ends at {measured.chain[-1]:.6f} and the "
            f"fixed rate at {measured.chain_fixed[-1]:.6f}.",
        ),
    ]


def _series(
    id_: str, title: str, label: str, unit: float, curves: Sequence[tuple[str, Sequence[float], Sequence[float]]]
) -> Series:
    return Series(
        id=id_,
        title=title,
        description=f"{title} against SDE time, steps times the largest learning rate.",
        x_label="t",
        y_label=label,
        curves=[
            Curve(label=name, x=x, given=[Interval(unit * y, math.nan, math.nan, 1) for y in values])
            for name, x, values in curves
        ],
        log_y=True,
    )
