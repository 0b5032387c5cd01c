"""Validity conditions of an SDE approximation, each with interval and verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from backpass.sde.diagnostics import Local

__all__ = [
    "Check",
    "Estimate",
    "check_agreement",
    "check_normality",
    "check_sampling",
    "check_stability",
    "check_tails",
]

_LEVEL = 1.96
_STABLE = 0.5
_HEAVY = 0.5
_LONGEST = 20.0
_TAIL = 2.2
_NOISE_SHARE = 0.8

Verdict = Literal["passed", "failed", "undecided"]


class Estimate(NamedTuple):
    """Estimate with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Check:
    """Condition for the SDE to describe a training run.

    Attributes:
        name: short name.
        estimate: measured value.
        limit: the condition as text.
        verdict: ``"failed"`` only if the whole interval violates the condition.
    """

    name: str
    estimate: Estimate
    limit: str
    verdict: Verdict


def check_agreement(name: str, amplification: int, ours: Tensor, amplified: Tensor, tolerance: float) -> Check:
    """Check the agreement of two means: Welch's interval of their difference relative to the mean of training."""
    a, b = ours.double(), amplified.double()
    mean = float(a.mean())
    if torch.equal(a, b):  # also for vanishing input gradients, where both are 0
        difference = error = 0.0
    elif torch.isfinite(torch.cat([a, b])).all() and mean != 0:
        difference = float(b.mean() - a.mean()) / abs(mean)
        error = math.sqrt(float(a.var() / len(a) + b.var() / len(b))) / abs(mean)
    else:
        difference, error = math.inf, 0.0
    low, high = difference - _LEVEL * error, difference + _LEVEL * error
    if low > tolerance or high < -tolerance:
        verdict: Verdict = "failed"
    else:
        verdict = "passed" if -tolerance <= low and high <= tolerance else "undecided"
    words = {"expected_loss": "clean loss", "adversarial_loss": "robust loss", "gradient_penalty": "input gradient"}
    return Check(
        name=f"{words[name]}, l = {amplification}",
        estimate=Estimate(difference, low, high),
        limit=f"within {tolerance:g} of training",
        verdict=verdict,
    )


def check_stability(eta: float, local: Local) -> Check:
    """Check eta times the largest curvature against the stability limit."""
    value = eta * local.largest
    return Check(
        name="eta times curvature",
        estimate=Estimate(value, value, value),
        limit=f"at most {_STABLE:g}; unstable above 2",
        verdict="passed" if value <= _STABLE else "failed",  # a curvature that is not finite fails
    )


def check_normality(eta: float, batch_size: int, steps: int, local: Local) -> Check:
    """Check the excess kurtosis of the noise accumulated over the memory of the process."""
    relaxation = 1 / (eta * local.curvature) if local.curvature > 0 else math.inf
    memory = max(1.0, min(float(steps), relaxation, _LONGEST))
    scale = 1 / (batch_size * memory)
    value, error = (scale * part for part in local.kurtosis)
    low, high = value - _LEVEL * error, value + _LEVEL * error
    return Check(
        name="kurtosis of the noise",
        estimate=Estimate(value, low, high),
        limit=f"at most {_HEAVY:g}, over {memory:.0f} steps",
        verdict="failed" if low > _HEAVY else "passed" if high <= _HEAVY else "undecided",
    )


def check_tails(local: Local) -> Check:
    """Check Hill's tail index of the gradient noise against the limit of finite variance, with a margin."""
    value, error = local.tail
    low, high = value - _LEVEL * error, value + _LEVEL * error
    estimate = Estimate(*(math.inf if one <= 0 else 1 / one for one in (value, high, low)))
    return Check(
        name="tail index of the noise",
        estimate=estimate,
        limit=f"at least {_TAIL:g}; the variance is infinite below 2",
        verdict="failed" if estimate.high < _TAIL else "passed" if estimate.low >= _TAIL else "undecided",
    )


def check_sampling(permuted: Tensor, independent: Tensor) -> Check:
    """Check the ratio of tr Cov of the replicas' parameters; the interval is that of the log ratio of mean squares."""
    squares = [(part - part.mean(0)).double().square().sum(1) for part in (permuted, independent)]
    finite = all(bool(torch.isfinite(one).all()) and float(one.sum()) > 0 for one in squares)
    if not finite:
        return Check(
            name="spread, permuted batches",
            estimate=Estimate(math.nan, math.nan, math.nan),
            limit="no spread to compare",
            verdict="undecided",
        )
    ratio = float(squares[0].mean() / squares[1].mean())
    error = math.sqrt(sum(float(one.var() / one.mean() ** 2) / len(one) for one in squares))
    low, high = ratio * math.exp(-_LEVEL * error), ratio * math.exp(_LEVEL * error)
    return Check(
        name="spread, permuted batches",
        estimate=Estimate(ratio, low, high),
        limit=f"at least {_NOISE_SHARE:g} of that of independent batches",
        verdict="failed" if high < _NOISE_SHARE else "passed" if low >= _NOISE_SHARE else "undecided",
    )
