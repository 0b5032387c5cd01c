"""Proportions of images and their paired differences, with 95 % intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from backpass.attacks import Rate
from backpass.attacks.paired import paired
from backpass.errors import BackpassError
from backpass.report.claims import FEWEST_PAIRS, Claim, worded
from backpass.report.statistics import LEVEL, Interval
from backpass.report.wording import interval_text

__all__ = ["PairedDifference", "judge_images", "paired_difference", "percent", "percent_text"]


def percent(rate: Rate) -> Interval:
    """Return a rate in per cent with its Wilson interval; all ``nan`` without trials."""
    if not rate.trials:
        return Interval(math.nan, math.nan, math.nan, 0)
    low, high = rate.interval
    return Interval(100 * rate.value, 100 * low, 100 * high, rate.trials)


def percent_text(rate: Rate) -> str:
    """Format a rate with its interval, for instance "86.4 [83.2, 89.1] %"."""
    return f"{interval_text(percent(rate))}\N{NO-BREAK SPACE}%" if rate.trials else "of no image"


class PairedDifference(NamedTuple):
    """Difference between two outcomes on the same images.

    Attributes:
        only_ours: number of images that only ours fools.
        only_theirs: number of images that only theirs fools.
        interval: difference of the two rates in percentage points, ours minus theirs.
        p: p-value of McNemar's exact two-sided test.
    """

    only_ours: int
    only_theirs: int
    interval: Interval
    p: float


def paired_difference(ours: Tensor, theirs: Tensor, level: float = LEVEL) -> PairedDifference:
    """Compare two outcomes on the same images, (N,) bool each; see `backpass.attacks.Paired`.

    Args:
        ours: (N,) bool, True where ours fools the image.
        theirs: (N,) bool, likewise.
        level: confidence level of the interval.

    Raises:
        BackpassError: the two differ in length, or are empty.
    """
    if ours.shape != theirs.shape or ours.numel() == 0:
        raise BackpassError(f"paired outcomes must be as many, at least one; got {len(ours)} and {len(theirs)}.")
    found = paired(ours, theirs)
    low, high = found.interval_at(level)
    interval = Interval(100 * found.difference, 100 * low, 100 * high, found.samples)
    return PairedDifference(found.only_first, found.only_second, interval, found.p_value)


def judge_images(
    id: str,  # noqa: A002  (the field's name in result.json)
    statement: str,
    difference: PairedDifference,
    *,
    theirs: str,
    reference: str | None = None,
) -> Claim:
    """Test the claim that ours fools more images than theirs, from outcomes on the same images.

    Args:
        id: unique in its experiment.
        statement: the claim, as an affirmative sentence.
        difference: paired difference, ours minus theirs.
        theirs: name of the baseline.
        reference: source of the claim.
    """
    interval = difference.interval
    decided = interval.n >= FEWEST_PAIRS and not interval.low <= 0 <= interval.high
    return Claim(
        id=id,
        statement=statement,
        quantity="images fooled, percentage points",
        verdict=worded(interval.mean > 0 if decided else None, "elsewhere"),
        estimate=interval.mean,
        interval=(interval.low, interval.high),
        n=interval.n,
        reference=reference,
        note=f"{difference.only_ours} images fooled by it only, {difference.only_theirs} by {theirs} only; exact "
        f"McNemar p = {difference.p:.2g}",
        p=difference.p if interval.n >= FEWEST_PAIRS else 1.0,
    )
