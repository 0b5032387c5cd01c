"""Intervals over seeds: Student's t for a mean and for a mean of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from backpass.errors import BackpassError

__all__ = [
    "LEVEL",
    "Interval",
    "geometric_interval",
    "holm_levels",
    "mean_interval",
    "paired_interval",
    "sign_test",
    "student_cdf",
    "student_quantile",
]

LEVEL = 0.95
"""The level of every interval in a report."""


class Interval(NamedTuple):
    """A mean with the ends of its confidence interval; the ends are ``nan`` where ``n`` is below 2."""

    mean: float
    low: float
    high: float
    n: int


def holm_levels(p_values: Sequence[float], level: float = LEVEL) -> list[float]:
    """Return the confidence level of each comparison at which Holm's procedure decides, the family's being `level`.

    The p of rank r among m is compared with (1 - level) / (m - r + 1). From the first that is not below it on, none is
    significant, and all are compared with that same number. A comparison is thus significant where its p is below one
    minus its level, which is where its interval at that level leaves out 0.

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    count, levels, failed = len(p_values), [level] * len(p_values), False
    share = 1.0 - level
    for rank, place in enumerate(sorted(range(count), key=p_values.__getitem__)):
        if not failed:
            share = (1.0 - level) / (count - rank)
            failed = p_values[place] >= share
        levels[place] = 1.0 - share
    return levels


def student_cdf(t: float, freedom: int) -> float:
    r"""The distribution function of Student's t for a whole number of degrees of freedom.

    The finite series in :math:`\theta = \arctan(t/\sqrt\nu)` (Abramowitz and Stegun 26.7.3 and 26.7.4), exact
    up to rounding.

    Raises:
        BackpassError: ``freedom`` is below 1.
    """
    if freedom < 1:
        raise BackpassError(f"Student's t needs at least 1 degree of freedom, got {freedom}.")
    theta = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term = cosine if odd else 1.0
    series = 0.0 if freedom == 1 else term
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        series += term
    two_sided = 2 / math.pi * (theta + sine * series) if odd else sine * series
    return 0.5 + 0.5 * two_sided


def student_quantile(probability: float, freedom: int) -> float:
    """The ``t`` with ``student_cdf(t, freedom) == probability``, by bisection to the last bits.

    Raises:
        BackpassError: ``probability`` is outside (0, 1) or ``freedom`` is below 1.
    """
    if not 0 < probability < 1:
        raise BackpassError(f"a quantile's probability must lie inside (0, 1), got {probability}.")
    if probability < 0.5:
        return -student_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    r"""The mean of ``values`` and its two-sided interval :math:`\bar v \pm t_{n-1} s/\sqrt n`.

    Args:
        values: one number per seed; a ``nan`` or an infinity makes mean and ends ``nan``.
        level: the interval's level, in (0, 1).

    Raises:
        BackpassError: there is no value, or ``level`` is outside (0, 1).
    """
    n = len(values)
    if n == 0:
        raise BackpassError("an interval needs at least one value, got none.")
    if not 0 < level < 1:
        raise BackpassError(f"an interval's level must lie inside (0, 1), got {level}.")
    if not all(math.isfinite(value) for value in values):
        return Interval(math.nan, math.nan, math.nan, n)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, math.nan, math.nan, n)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = student_quantile(0.5 + level / 2, n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def geometric_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    r"""The geometric mean :math:`\exp\overline{\ln v}` with its interval; for what is drawn on a logarithmic axis.

    Raises:
        BackpassError: a value is not positive, or as `mean_interval`.
    """
    if any(value <= 0 for value in values):
        raise BackpassError(f"a geometric mean needs positive values, got {min(values)}.")
    mean, low, high, n = mean_interval([math.log(value) for value in values], level)
    return Interval(math.exp(mean), math.exp(low), math.exp(high), n)


def paired_interval(ours: Sequence[float], theirs: Sequence[float], level: float = LEVEL) -> Interval:
    """The interval of the mean of ``ours[i] - theirs[i]``: what the two share (seed, batches) cancels.

    Raises:
        BackpassError: the two differ in length, or are empty.
    """
    if len(ours) != len(theirs):
        raise BackpassError(f"paired values must come in pairs, got {len(ours)} and {len(theirs)}.")
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)], level)


def sign_test(ours: int, theirs: int) -> float:
    """The chance that a fair coin of ``ours + theirs`` throws is at least as uneven: the exact two-sided sign test.

    On pairs of which only one side has succeeded it is McNemar's exact test.
    """
    throws = ours + theirs
    tail = term = 1
    for k in range(min(ours, theirs)):
        term = term * (throws - k) // (k + 1)  # exact: binomial coefficients in whole numbers
        tail += term
    return float(min(1.0, 2 * tail / 2**throws))
