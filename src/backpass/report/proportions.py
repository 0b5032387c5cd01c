"""Proportions of images and their paired differences, with 95 % intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from backpass.attacks import Rate
from backpass.attacks.paired import paired
from backpass.errors import BackpassError
from backpass.report.claims import FEWEST_PAIRS, Claim, Direction, Setting, worded
from backpass.report.statistics import LEVEL, Interval
from backpass.report.wording import interval_text

__all__ = [
    "PairedDifference",
    "judge_images",
    "marks",
    "marks_difference",
    "paired_difference",
    "percent",
    "percent_text",
    "rate_of",
]


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


def marks(outcome: Tensor, counted: Tensor | None = None) -> str:
    """Return one character per image (N,): ``1`` or ``0`` for its outcome, ``-`` if it is not counted."""
    rows = zip(outcome.tolist(), ([True] * len(outcome)) if counted is None else counted.tolist(), strict=True)
    return "".join(str(int(one)) if kept else "-" for one, kept in rows)


def rate_of(text: str) -> Rate:
    """Return the share of ``1`` among the counted images of `marks`."""
    return Rate(text.count("1"), text.count("1") + text.count("0"))


def marks_difference(ours: str, theirs: str) -> PairedDifference:
    """Compare the `marks` of two outcomes on the images that both count; all ``nan`` without such an image.

    Raises:
        BackpassError: the two differ in length.
    """
    if len(ours) != len(theirs):
        raise BackpassError(f"paired outcomes must be of the same images, got {len(ours)} and {len(theirs)}.")
    pairs = [(a == "1", b == "1") for a, b in zip(ours, theirs, strict=True) if "-" not in (a, b)]
    if not pairs:
        return PairedDifference(0, 0, Interval(math.nan, math.nan, math.nan, 0), 1.0)
    both = torch.tensor(pairs, dtype=torch.bool)
    return paired_difference(both[:, 0], both[:, 1])


def judge_images(
    id: str,  # noqa: A002  (the field's name in result.json)
    statement: str,
    *,
    ours: str,
    theirs: str,
    quantity: str,
    direction: Direction = "higher",
    reference: str | None = None,
    published: str = "",
    setting: Setting = "elsewhere",
) -> Claim:
    """Test a claim about the share of images, from the `marks` of two outcomes, by McNemar's exact test.

    The verdict is undecided if the interval contains zero or both count fewer than `FEWEST_PAIRS` images.

    Args:
        id: unique in its experiment.
        statement: the claim, as an affirmative sentence.
        ours: marks of the method that the claim is about.
        theirs: marks of the baseline.
        quantity: what the share measures, with the unit.
        direction: claimed direction of ours, ``higher`` or ``lower``.
        reference: source of the claim.
        published: the source's own number.
        setting: where it was measured.
    """
    found = marks_difference(ours, theirs)
    interval, p = found.interval, found.p if found.interval.n >= FEWEST_PAIRS else 1.0
    ahead = (interval.mean > 0) == (direction == "higher")
    return Claim(
        setting=setting,
        id=id,
        statement=statement,
        quantity=quantity,
        reference=reference,
        published=published,
        verdict=worded(ahead if p < 1 - LEVEL else None, setting),
        estimate=interval.mean,
        interval=(interval.low, interval.high),
        n=interval.n,
        note=f"{found.only_ours} images only with ours, {found.only_theirs} only with theirs; exact McNemar test",
        p=p,
    )
