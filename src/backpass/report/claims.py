"""Claims, their tests over paired runs, and their verdicts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from backpass.report.statistics import LEVEL, holm, mean_interval, mean_test, paired_interval, sign_test

__all__ = [
    "CORRECTED",
    "FEWEST_PAIRS",
    "Claim",
    "Direction",
    "Diverged",
    "Setting",
    "Verdict",
    "agreement",
    "corrected",
    "count_verdicts",
    "judge",
    "judge_within",
    "worded",
]

Verdict = Literal["replicated", "contradicted", "same direction", "opposite direction", "undecided"]
Setting = Literal["the claim's", "elsewhere"]
Direction = Literal["higher", "lower"]
Diverged = Literal["undecided", "worse"]

CORRECTED = (
    "Verdicts are corrected for the number of claims of the experiment (Holm): with no true difference at all, the "
    "probability of one or more false verdicts is at most 5 %."
)
"""Note for reports whose claims were corrected by `corrected`."""

FEWEST_PAIRS = 3
"""Minimum number of paired runs for a verdict other than undecided."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement, its measurement, and the verdict.

    Attributes:
        id: identifier, unique in the experiment.
        statement: the claim, as an affirmative sentence.
        quantity: what ``estimate`` and ``interval`` measure, with its unit.
        verdict: in the setting of the claim ``replicated``, ``contradicted`` or ``undecided``; elsewhere
            ``same direction``, ``opposite direction`` or ``undecided``, which does not decide the claim.
        estimate: mean paired difference; ``nan`` if a run diverged.
        interval: 95 % confidence interval of the estimate.
        n: number of pairs.
        reference: source of the claim.
        published: published value; empty if there is none.
        note: further information, for instance which runs diverged.
        setting: ``the claim's`` for the network, data and protocol that the claim is about, trained to within 3 points
            of the published accuracy; else ``elsewhere``.
        p: uncorrected p-value of the test that matches the interval; None in results of version 0.1.0.
        p_corrected: p-value after Holm's correction over all claims of the experiment, which decides the verdict; None
            if it was not corrected.
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
    setting: Setting = "elsewhere"
    p: float | None = None
    p_corrected: float | None = None


def worded(agrees: bool | None, setting: Setting) -> Verdict:
    """Return the name of a verdict: for the claim, against it, or undecided (None), in the given setting."""
    if agrees is None:
        return "undecided"
    if setting == "elsewhere":
        return "same direction" if agrees else "opposite direction"
    return "replicated" if agrees else "contradicted"


def agreement(verdict: Verdict) -> bool | None:
    """Return True if a verdict supports the claim, False if it contradicts it, None if it is undecided."""
    return None if verdict == "undecided" else verdict in ("replicated", "same direction")


def count_verdicts(claims: Iterable[Claim]) -> dict[str, int]:
    """Count the claims by verdict; verdicts that do not occur are left out."""
    counts = Counter(claim.verdict for claim in claims)
    return {verdict: counts[verdict] for verdict in get_args(Verdict) if counts[verdict]}


def corrected(claims: Sequence[Claim]) -> list[Claim]:
    """Apply Holm's correction for multiple comparisons to the claims of an experiment.

    A claim whose interval excludes zero becomes undecided if its corrected p-value is above 5 %; its note reports this.
    Claims without a p-value are unchanged, but count towards the number of comparisons.
    """
    found = holm([1.0 if claim.p is None else claim.p for claim in claims])
    made = []
    for claim, (p, _) in zip(claims, found, strict=True):
        if claim.p is None:
            made.append(claim)
        elif claim.verdict == "undecided" or p <= 1 - LEVEL:
            made.append(replace(claim, p_corrected=p))
        else:
            told = f"p = {claim.p:.2g} alone, {p:.2g} corrected for {len(claims)} claims"
            note = "; ".join(filter(None, (claim.note, told)))
            made.append(replace(claim, p_corrected=p, verdict="undecided", note=note))
    return made


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
    diverged: Diverged = "undecided",
    setting: Setting = "elsewhere",
) -> Claim:
    """Test a claim about ``ours - theirs`` over paired runs.

    The verdict is undecided if the 95 % interval contains zero, if there are fewer than `FEWEST_PAIRS` pairs, or if a
    run diverged.

    Args:
        id: unique in its experiment.
        statement: the claim in words.
        ours: values of the method that the claim is about, one per pair.
        theirs: values of the baseline, one per pair.
        direction: claimed direction of ours, ``higher`` or ``lower``.
        quantity: what the values measure, with the unit.
        reference: where the claim comes from.
        published: the source's own number.
        seeds: the pairs' seeds, to name the runs that diverged.
        diverged: treatment of diverged runs. ``undecided``: the claim stays undecided. ``worse``: a diverged run ranks
            below every other run, and the exact sign test over the pairs decides at the same level.
        setting: where it was measured.

    Raises:
        BackpassError: the two sides differ in length, or are empty.
    """
    difference = paired_interval(ours, theirs)
    p = mean_test([a - b for a, b in zip(ours, theirs, strict=True)])
    ahead = (difference.mean > 0) == (direction == "higher")
    names = list(seeds) or list(range(len(ours)))
    lost = [name for name, a, b in zip(names, ours, theirs, strict=True) if not (math.isfinite(a) and math.isfinite(b))]
    note = ""
    if lost:
        note = f"a run diverged in {len(lost)} of {len(ours)} pairs, seed {', '.join(map(str, lost))}"
        if diverged == "worse":
            p, ahead, told = _by_signs(ours, theirs, direction)
            note = f"{note}; {told}"
    if difference.n < FEWEST_PAIRS:
        p = 1.0
        note = note or f"fewer than {FEWEST_PAIRS} pairs: no verdict"
    return Claim(
        id=id,
        statement=statement,
        quantity=quantity,
        verdict=worded(ahead if p <= 1 - LEVEL else None, setting),
        estimate=difference.mean,
        interval=(difference.low, difference.high),
        n=difference.n,
        reference=reference,
        published=published,
        note=note,
        setting=setting,
        p=p,
    )


def _by_signs(ours: Sequence[float], theirs: Sequence[float], direction: Direction) -> tuple[float, bool, str]:
    """Return the p-value of the sign test, True if ours wins more pairs, and a note; a diverged run loses."""
    sign = 1 if direction == "higher" else -1
    scores = [
        tuple(sign * value if math.isfinite(value) else -math.inf for value in pair)
        for pair in zip(ours, theirs, strict=True)
    ]
    ahead, behind = sum(a > b for a, b in scores), sum(a < b for a, b in scores)
    p = sign_test(ahead, behind)
    told = f"counting these as worse it is ahead in {ahead} pairs and behind in {behind}, sign test p = {p:.2g}"
    return p, ahead > behind, told


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
    setting: Setting = "elsewhere",
) -> Claim:
    """Test the claim that the mean of a quantity over independent runs lies in ``[low, high]``.

    The verdict supports the claim if the 95 % interval of the mean lies inside the range and contradicts it if the two
    are disjoint. Otherwise, with fewer than `FEWEST_PAIRS` runs, or if a run diverged, it is ``undecided``.

    Args:
        id: unique in its experiment.
        statement: the claim in words.
        values: one per run; a deterministic quantity has one per problem.
        low: lower end of the range; ``-inf`` for none.
        high: upper end of the range.
        quantity: what the values measure, with the unit.
        reference: where the claim comes from.
        published: the source's own number.
        note: what a reader must know beside the numbers.
        setting: where it was measured.

    Raises:
        BackpassError: ``values`` is empty.
    """
    mean = mean_interval(values)
    inside = low <= mean.mean <= high
    # The interval lies inside if it contains neither end, and outside if it does not contain the nearer one.
    ends = (low, high) if inside else (low,) if mean.mean < low else (high,)
    p = max((mean_test(values, end) for end in ends if math.isfinite(end)), default=1.0)
    if mean.low == mean.high:
        p = 0.0
    if mean.n < FEWEST_PAIRS or not math.isfinite(mean.low):
        p = 1.0
        note = note or ("a run diverged" if mean.n >= FEWEST_PAIRS else f"fewer than {FEWEST_PAIRS} runs: no verdict")
    return Claim(
        id=id,
        statement=statement,
        quantity=f"{quantity}; claimed: {_range(low, high)}",
        verdict=worded(inside if p <= 1 - LEVEL else None, setting),
        estimate=mean.mean,
        interval=(mean.low, mean.high),
        n=mean.n,
        reference=reference,
        published=published,
        note=note,
        setting=setting,
        p=p,
    )


def _range(low: float, high: float) -> str:
    if low == -math.inf:
        return f"at most {high:g}"
    return f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
