"""A claim, its measurement over paired runs, and its verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from backpass.report.statistics import LEVEL, Interval, mean_interval, paired_interval, sign_test

__all__ = ["FEWEST_PAIRS", "Claim", "Direction", "Verdict", "judge", "judge_within", "verdict"]

Verdict = Literal["holds", "does not hold", "undecided"]
Direction = Literal["higher", "lower"]

FEWEST_PAIRS = 3
"""No verdict rests on fewer paired runs than this."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement, what was measured of it, and what the measurement says.

    Attributes:
        id: unique in its experiment.
        statement: the claim in words, as if it were true.
        quantity: what ``estimate`` and ``interval`` measure, with its unit.
        verdict: ``holds``, ``does not hold`` or ``undecided``.
        estimate: the mean paired difference; ``nan`` where a run diverged.
        interval: its 95 % interval.
        n: the number of pairs.
        reference: where the claim comes from.
        published: the source's own number, in words; empty where it gives none.
        note: what a reader must know beside the numbers, for instance which runs diverged.
    """

    id: str
    statement: str
    quantity: str
    verdict: Verdict
    estimate: float
    interval: tuple[float, float]
    n: int
    reference: str | None = None
    published: str = ""
    note: str = ""


def verdict(difference: Interval, direction: Direction) -> Verdict:
    """What an interval of a difference says of "the difference is above (or below) zero".

    ``holds`` where the whole interval lies on the claimed side of zero, ``does not hold`` where it lies on
    the other side, and ``undecided`` where it contains zero, rests on fewer than `FEWEST_PAIRS` pairs, or is
    not finite because a run diverged.
    """
    low, high = difference.low, difference.high
    if difference.n < FEWEST_PAIRS or not (math.isfinite(low) and math.isfinite(high)) or low <= 0 <= high:
        return "undecided"
    return "holds" if (low > 0) == (direction == "higher") else "does not hold"


def judge(
    id: str,  # noqa: A002  (the field's name in result.json)
    statement: str,
    *,
    ours: Sequence[float],
    theirs: Sequence[float],
    direction: Direction,
    quantity: str,
    reference: str | None = None,
    published: str = "",
    seeds: Sequence[int] = (),
    diverged: Literal["undecided", "worse"] = "undecided",
) -> Claim:
    """Measure ``ours - theirs`` over paired runs and give the verdict.

    Args:
        id: unique in its experiment.
        statement: the claim in words.
        ours: one value per pair, of what the claim is about.
        theirs: one value per pair, of what it is compared with.
        direction: whether the claim says that ours is ``higher`` or ``lower``.
        quantity: what the values measure, with the unit.
        reference: where the claim comes from.
        published: the source's own number.
        seeds: the pairs' seeds, to name the runs that diverged.
        diverged: what becomes of a claim with diverged runs, which have no difference: it stays ``undecided``, or a
            diverged run is ``worse`` than any other and the exact sign test over the pairs decides at the same level.

    Raises:
        BackpassError: the two sides differ in length, or are empty.
    """
    difference = paired_interval(ours, theirs)
    decided = verdict(difference, direction)
    names = list(seeds) or list(range(len(ours)))
    lost = [name for name, a, b in zip(names, ours, theirs, strict=True) if not (math.isfinite(a) and math.isfinite(b))]
    note = ""
    if lost:
        note = f"a run diverged in {len(lost)} of {len(ours)} pairs, seed {', '.join(map(str, lost))}"
        if diverged == "worse":
            decided, told = _by_signs(ours, theirs, direction)
            note = f"{note}; {told}"
    elif difference.n < FEWEST_PAIRS:
        note = f"fewer than {FEWEST_PAIRS} pairs: no verdict"
    return Claim(
        id=id,
        statement=statement,
        quantity=quantity,
        verdict=decided,
        estimate=difference.mean,
        interval=(difference.low, difference.high),
        n=difference.n,
        reference=reference,
        published=published,
        note=note,
    )


def _by_signs(ours: Sequence[float], theirs: Sequence[float], direction: Direction) -> tuple[Verdict, str]:
    """Which side is ahead in how many pairs, a diverged run being behind, and what that says."""
    sign = 1 if direction == "higher" else -1
    scores = [
        tuple(sign * value if math.isfinite(value) else -math.inf for value in pair)
        for pair in zip(ours, theirs, strict=True)
    ]
    ahead, behind = sum(a > b for a, b in scores), sum(a < b for a, b in scores)
    p = sign_test(ahead, behind)
    told = f"counting these as worse it is ahead in {ahead} pairs and behind in {behind}, sign test p = {p:.2g}"
    if p > 1 - LEVEL:
        return "undecided", told
    return "holds" if ahead > behind else "does not hold", told


def judge_within(
    id: str,  # noqa: A002  (the field's name in result.json)
    statement: str,
    *,
    values: Sequence[float],
    low: float,
    high: float,
    quantity: str,
    reference: str | None = None,
    published: str = "",
    note: str = "",
) -> Claim:
    """Measure a quantity over independent runs and say whether it lies in ``[low, high]``.

    ``holds`` where the 95 % interval of the mean lies inside of the range, ``does not hold`` where the two do not meet,
    ``undecided`` otherwise, with fewer than `FEWEST_PAIRS` runs, or where a run diverged.

    Args:
        id: unique in its experiment.
        statement: the claim in words.
        values: one per run; a quantity computed without chance has one per problem.
        low: the least value that agrees with the claim; ``-inf`` for none.
        high: the greatest.
        quantity: what the values measure, with the unit.
        reference: where the claim comes from.
        published: the source's own number.
        note: what a reader must know beside the numbers.

    Raises:
        BackpassError: there is no value.
    """
    mean = mean_interval(values)
    decided: Verdict = "undecided"
    if mean.n >= FEWEST_PAIRS and math.isfinite(mean.low):
        if low <= mean.low and mean.high <= high:
            decided = "holds"
        elif mean.high < low or mean.low > high:
            decided = "does not hold"
    elif not note:
        note = "a run diverged" if mean.n >= FEWEST_PAIRS else f"fewer than {FEWEST_PAIRS} runs: no verdict"
    return Claim(
        id=id,
        statement=statement,
        quantity=f"{quantity}; claimed: {_range(low, high)}",
        verdict=decided,
        estimate=mean.mean,
        interval=(mean.low, mean.high),
        n=mean.n,
        reference=reference,
        published=published,
        note=note,
    )


def _range(low: float, high: float) -> str:
    if low == -math.inf:
        return f"at most {high:g}"
    return f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
