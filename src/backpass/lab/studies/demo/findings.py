"""What the demo's numbers support and what they do not, in sentences made from verdicts and estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from backpass.lab.studies.demo.claims import diverged, label
from backpass.lab.studies.demo.measure import Measured
from backpass.report.claims import Claim, Verdict
from backpass.report.result import Finding
from backpass.report.statistics import Interval
from backpass.report.wording import interval_text
from backpass.wording import listing

__all__ = ["findings"]


def findings(measured: Measured, judged: Sequence[Claim]) -> list[Finding]:
    """The findings, in the order in which a reader asks.

    Args:
        measured: the numbers.
        judged: the claims of `claims.claims` on these numbers.
    """
    demo = measured.demo
    by_id = {claim.id: claim for claim in judged}
    small, best = min(demo.rates), measured.best_rates[demo.rules[0]]
    found = [_balance(judged)]
    for rule in demo.rules[1:]:
        early, end, accuracy = (by_id[f"{key}-small-rate-{rule}"] for key in ("early", "end", "accuracy"))
        at_best, own, unit = (by_id[f"end-{key}-{rule}"] for key in ("best-rate", "own-rate", "unit-step"))
        own_accuracy, own_rate = by_id[f"accuracy-own-rate-{rule}"], measured.best_rates[rule]
        found.append(
            Finding(
                f"Learning with {label(rule)}",
                f"At the small rate {small:g} the training loss is {_told(early)} after {demo.early} epochs and "
                f"{_told(end)} after {demo.epochs}; test accuracy is {_told(accuracy)}. At BP's best rate {best:g} the "
                f"final training loss is {_told(at_best)}. With each at its own best rate "
                f"({own_rate or 'none'} for this rule), it is {_told(own)}, and test accuracy is "
                f"{_told(own_accuracy)}. With every step scaled to the same length, so that only directions differ, "
                f"the final training loss is {_told(unit)}.",
            )
        )
    found.append(_stability(measured))
    for rule in demo.rules[1:]:
        found.append(_attack(rule, [by_id[f"attack-{eps:g}-{rule}"] for eps in demo.eps], demo.eps))
    found.append(
        Finding(
            "What this cannot say",
            f"This is one small network ({demo.model}), one small data set and plain SGD; the intervals are over "
            f"{demo.seeds} seeds of weights and batches, not over images, and {len(judged)} claims were tested at "
            "once. It is no evidence about deep networks, or about transfer to other models, for which linear "
            "backpropagation was proposed.",
        )
    )
    return found


def _balance(judged: Sequence[Claim]) -> Finding:
    """How many claims in favour of LinBP came out how, for learning and for attack."""

    def counted(topic: str, chosen: list[Claim]) -> str:
        verdicts = [claim.verdict for claim in chosen]
        return (
            f"{topic}: {verdicts.count('holds')} of {len(chosen)} hold, {verdicts.count('does not hold')} do not, "
            f"{verdicts.count('undecided')} are undecided"
        )

    attacks = [claim for claim in judged if claim.id.startswith("attack-")]
    learning = [claim for claim in judged if claim not in attacks]
    return Finding(
        "In short",
        f"Every claim below says that linear backpropagation does better than plain. "
        f"{counted('On learning', learning)}. {counted('On white-box attack', attacks)}.",
    )


def _told(claim: Claim) -> str:
    """Lower or higher than BP's and by how much, or that the two cannot be told apart or compared."""
    if math.isnan(claim.estimate):
        return f"not comparable with BP's ({claim.note})"
    if claim.verdict == "undecided":
        return "not told apart from BP's"
    low, high = claim.interval
    if claim.estimate > 0:
        return f"higher than BP's by {interval_text(Interval(claim.estimate, low, high, claim.n))}"
    return f"lower than BP's by {interval_text(Interval(-claim.estimate, -high, -low, claim.n))}"


def _stability(measured: Measured) -> Finding:
    demo = measured.demo
    lost = {
        rule: [
            f"{count} of {demo.seeds} at rate {rate:g}"
            for rate in demo.rates
            if (count := diverged(measured.runs[rule, rate]))
        ]
        for rule in demo.rules
    }
    words = "; ".join(f"{label(rule)}: {listing(parts)}" for rule, parts in lost.items() if parts)
    return Finding("Stability", f"Runs that diverged: {words}." if words else "No run diverged at any rate.")


def _attack(rule: str, judged: Sequence[Claim], eps: Sequence[float]) -> Finding:
    def where(verdict: Verdict) -> str:
        return listing([f"{e:g}" for e, claim in zip(eps, judged, strict=True) if claim.verdict == verdict])

    parts = []
    if more := where("holds"):
        parts.append(f"more images at eps {more}")
    if fewer := where("does not hold"):
        parts.append(f"fewer images at eps {fewer}")
    if unclear := where("undecided"):
        parts.append(f"as many, as far as {judged[0].n} seeds can tell, at eps {unclear}")
    largest = max(judged, key=lambda claim: abs(claim.estimate))
    numbers = interval_text(Interval(largest.estimate, *largest.interval, largest.n), signed=True)
    return Finding(
        f"White-box attack, gradients of {label(rule)}",
        f"Compared with plain gradients, PGD fools {listing(parts)}. The largest difference is {numbers} percentage "
        "points.",
    )
