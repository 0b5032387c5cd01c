"""Proportions of images, and their differences, with 95 % intervals."""

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
    """A rate in per cent, with its Wilson interval; nothing but ``nan`` without trials."""
    if not rate.trials:
        return Interval(math.nan, math.nan, math.nan, 0)
    low, high = rate.interval
    return Interval(100 * rate.value, 100 * low, 100 * high, rate.trials)


def percent_text(rate: Rate) -> str:
    """A rate with its interval in words, as in "86.4 [83.2, 89.1] %"."""
    return f"{interval_text(percent(rate))}\N{NO-BREAK SPACE}%" if rate.trials else "of no image"


class PairedDifference(NamedTuple):
    """How two outcomes on the same images differ.

    Attributes:
        only_ours: images that only ours fools.
        only_theirs: images that only theirs fools.
        interval: the difference of the two rates in percentage points, ours less theirs.
        p: of McNemar's exact two-sided test.
    """

    only_ours: int
    only_theirs: int
    interval: Interval
    p: float


def paired_difference(ours: Tensor, theirs: Tensor, level: float = LEVEL) -> PairedDifference:
    """Compare two outcomes on the same images, (N,) bool each; see `backpass.attacks.Paired`.

    Args:
        ours: whether ours fools each image.
        theirs: whether the other does.
        level: confidence of the interval.

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
    """The verdict on "ours fools more images than theirs", from outcomes on the same images.

    Args:
        id: unique in its experiment.
        statement: the claim in words.
        difference: ours less theirs.
        theirs: the name of what ours is compared with.
        reference: where the claim comes from.
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
