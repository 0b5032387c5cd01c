"""The optimal learning-rate schedule of a linear-quadratic problem beside the best fixed rate."""

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

__all__ = ["Quadratic", "compare_schedules"]

_MOST_STEPS = 10**6
_POINTS = 200
"""Points of each curve."""


@dataclass(frozen=True, kw_only=True)
class Quadratic:
    """Settings of the problem.

    Attributes:
        curvature: a of the loss.
        noise: s^2, the variance of a minibatch gradient.
        eta: largest learning rate.
        start: excess risk at the start.
        t: horizon in SDE time, steps * eta.
        adversarial: K eta_I V'' that an adversary adds to the curvature.
    """

    curvature: float = 1.0
    noise: float = 1.0
    eta: float = 0.1
    start: float = 0.5
    t: float = 10.0
    adversarial: float = 0.0

    def chain(self, controls: Sequence[float]) -> list[float]:
        """Return the excess risk of theta' = theta - u eta (a theta + s xi) after each step, by its exact recursion."""
        a, risks = self.curvature + self.adversarial, [self.start]
        for u in controls:
            rate = u * self.eta
            risks.append((1 - rate * a) ** 2 * risks[-1] + a * rate**2 * self.noise / 2)
        return risks


@one_thread()
def compare_schedules(settings: Quadratic) -> Result:
    """Compute the schedule in closed form and by finite differences, and follow it in the chain.

    Raises:
        BackpassError: a number is out of its range.
    """
    began = time.perf_counter()
    problem = asdict(settings)
    horizon = problem.pop("t")
    closed = optimal_lr(**problem, horizon=horizon)
    numeric = optimal_lr(**problem, horizon=horizon, method="hjb")
    steps = max(1, round(horizon / settings.eta))
    if steps > _MOST_STEPS:
        raise BackpassError(
            f"t / eta is {steps:.3g} steps of the chain, and the limit is {_MOST_STEPS:,}: take a smaller t."
        )
    fixed, fixed_risk = closed.fixed
    chain = settings.chain([closed.factor(k) for k in range(steps)])
    ends = {
        "closed form": closed.value,
        "HJB, its value": numeric.value,
        "HJB, its policy": numeric.risk[-1],
        "best fixed": fixed_risk,
        "the chain under it": chain[-1],
        "the chain, best fixed": settings.chain([fixed] * steps)[-1],
    }
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
        findings=_findings(settings, closed, ends),
        environment={
            **environment(device="cpu", threads=1, data="none: nothing is random here", seeds=()),
            "seconds": round(time.perf_counter() - began, 2),
        },
        settings=asdict(settings),
        series=_series(settings, closed, numeric, chain),
        tables=[
            Table(
                id="ends",
                title="Excess risk at the end",
                columns=["Schedule", "risk", "over best fixed"],
                rows=[[name, f"{risk:.6f}", f"{risk / fixed_risk:.3f}"] for name, risk in ends.items()],
            )
        ],
        claims=[],
        plots_note="Nothing here is random, so there are no bands.",
    )


def _findings(settings: Quadratic, closed: Schedule, ends: dict[str, float]) -> list[Finding]:
    fixed, fixed_risk = closed.fixed
    growth = settings.curvature + settings.adversarial
    difference = 100 * (ends["HJB, its value"] / closed.value - 1)
    return [
        Finding(
            "The schedule",
            f"Hold the largest rate up to t = {closed.switch:.3g} ({closed.switch / settings.eta:.0f} steps), then let "
            f"the inverse grow by {growth:.3g} a step. It ends at an excess risk of {closed.risk[-1]:.6f}, the best "
            f"fixed rate ({fixed * settings.eta:.4g}) at {fixed_risk:.6f}: {100 * closed.gain:.0f} % less.",
        ),
        Finding(
            "The check",
            f"The Hamilton-Jacobi-Bellman equation gives {ends['HJB, its value']:.6f} on its grid ({difference:+.2f} "
            f"%), and its policy, followed, {ends['HJB, its policy']:.6f}.",
        ),
        Finding(
            "The chain",
            f"In the chain itself, step by step and exactly, the schedule ends at {ends['the chain under it']:.6f} and "
            f"the fixed rate at {ends['the chain, best fixed']:.6f}.",
        ),
    ]


def _series(settings: Quadratic, closed: Schedule, numeric: Schedule, chain: Sequence[float]) -> list[Series]:
    times = [settings.t * k / (_POINTS - 1) for k in range(_POINTS)]
    fixed = closed.fixed[0]
    steps = range(0, len(chain), max(1, len(chain) // _POINTS))
    rates = {
        "closed form": (times, [settings.eta * closed.at(t) for t in times]),
        "finite differences": (times, [settings.eta * numeric.at(t) for t in times]),
        "best fixed": (times, [settings.eta * fixed] * _POINTS),
    }
    risks = {
        "closed form": (times, [closed.problem.optimal(t)[1] for t in times]),
        "the chain under it": ([k * settings.eta for k in steps], [chain[k] for k in steps]),
        "best fixed": (times, [closed.problem.fixed(fixed, t) for t in times]),
    }
    return [
        Series(
            id=name,
            title=title,
            description=f"{title} against SDE time, steps times the largest learning rate.",
            x_label="t",
            y_label=label,
            curves=[
                Curve(label=curve, x=x, given=[Interval(y, math.nan, math.nan, 1) for y in values])
                for curve, (x, values) in curves.items()
            ],
            log_y=True,
        )
        for name, title, label, curves in (
            ("control", "Learning rate", "learning rate", rates),
            ("risk", "Excess risk", "excess risk m", risks),
        )
    ]
