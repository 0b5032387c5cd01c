"""Student's intervals and tests of a mean and of paired differences, the sign test, and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from backpass.errors import BackpassError

__all__ = [
    "LEVEL",
    "Corrected",
    "Interval",
    "geometric_interval",
    "holm",
    "mean_interval",
    "mean_test",
    "paired_interval",
    "sign_test",
    "student_p",
    "student_quantile",
]

LEVEL = 0.95
"""Confidence level of every interval in a report."""


class Interval(NamedTuple):
    """A mean with the ends of its confidence interval; the ends are ``nan`` where ``n`` is below 2."""

    mean: float
    low: float
    high: float
    n: int


def student_p(t: float, freedom: int) -> float:
    """Return the two-sided p-value of Student's t."""
    from scipy.special import stdtr

    return float(2 * stdtr(freedom, -abs(t)))


def student_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t.

    Raises:
        BackpassError: ``probability`` is outside (0, 1) or ``freedom`` is below 1.
    """
    from scipy.special import stdtrit

    if not 0 < probability < 1:
        raise BackpassError(f"a quantile's probability must lie inside (0, 1), got {probability}.")
    if freedom < 1:
        raise BackpassError(f"Student's t needs at least 1 degree of freedom, got {freedom}.")
    return float(stdtrit(freedom, probability))


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    r"""Return the mean of ``values`` with its two-sided interval :math:`\bar v \pm t_{n-1} s/\sqrt n`.

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
    r"""Return the geometric mean :math:`\exp\overline{\ln v}` with its interval, for logarithmic axes.

    Raises:
        BackpassError: a value is not positive, or as `mean_interval`.
    """
    if any(value <= 0 for value in values):
        raise BackpassError(f"a geometric mean needs positive values, got {min(values)}.")
    mean, low, high, n = mean_interval([math.log(value) for value in values], level)
    return Interval(math.exp(mean), math.exp(low), math.exp(high), n)


def paired_interval(ours: Sequence[float], theirs: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the interval of the mean of ``ours[i] - theirs[i]``; common variation (seed, batches) cancels.

    Raises:
        BackpassError: the two differ in length, or are empty.
    """
    if len(ours) != len(theirs):
        raise BackpassError(f"paired values must come in pairs, got {len(ours)} and {len(theirs)}.")
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)], level)


def mean_test(values: Sequence[float], center: float = 0.0) -> float:
    """Return the two-sided p-value of Student's t test that the mean is ``center``.

    It is below 1 - level exactly if the interval of `mean_interval` at that level excludes ``center``. It is 1 with
    fewer than two values, or if one is not finite.
    """
    mean, n = mean_interval(values).mean, len(values)
    if n < 2 or not math.isfinite(mean):
        return 1.0
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    if deviation == 0:
        return 1.0 if mean == center else 0.0
    return student_p((mean - center) * math.sqrt(n) / deviation, n - 1)


def sign_test(ours: int, theirs: int) -> float:
    """Return the p-value of the exact two-sided sign test.

    It is the probability that ``ours + theirs`` tosses of a fair coin are at least as uneven. On the discordant pairs
    it is McNemar's exact test.
    """
    from scipy.special import bdtr

    throws = ours + theirs
    return float(min(1.0, 2 * bdtr(min(ours, theirs), throws, 0.5))) if throws else 1.0


class Corrected(NamedTuple):
    """Holm's correction of one comparison.

    Attributes:
        p: corrected p-value. Rejecting where it is below alpha bounds the family-wise error rate by alpha under any
            dependence of the tests.
        level: level at which the procedure decides: the comparison is significant if its interval at this level
            excludes 0.
    """

    p: float
    level: float


def holm(p_values: Sequence[float], level: float = LEVEL) -> list[Corrected]:
    """Correct p-values for multiple comparisons, in the same order.

    The p of rank r among m is compared with (1 - level) / (m - r + 1). The first one that is not below it ends the
    procedure, and all later ones share its threshold.

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    made = [Corrected(1.0, level)] * len(p_values)
    largest, threshold = 0.0, 1.0 - level
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        left = len(p_values) - rank
        if largest < 1.0 - level:
            threshold = (1.0 - level) / left
        largest = max(largest, min(1.0, left * p_values[place]))
        made[place] = Corrected(largest, 1.0 - threshold)
    return made
