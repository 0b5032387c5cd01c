"""Paired comparison of rules per attack, and the worst case over attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backpass.attacks import Rate
from backpass.lab.studies.attack.plans import Plan
from backpass.lab.studies.attack.study import Measured
from backpass.numbers import fraction_text
from backpass.report.claims import Claim
from backpass.report.proportions import PairedDifference, judge_images, paired_difference

__all__ = ["Comparison", "Worst", "claims", "compare", "rule_name", "worst_cases"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """One attack with one rule's gradients.

    Attributes:
        plan: the attack.
        rule: backward rule used for the attack's gradients.
        difference: paired difference to the first rule on the correctly classified images; ``None`` for the first rule
            and if no image is classified correctly.
    """

    plan: Plan
    rule: str
    difference: PairedDifference | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Worst:
    """Worst case over all attacks at one radius.

    Attributes:
        eps: the radius.
        by_rule: by rule, the rate of images that at least one attack fools.
        together: rate of images that at least one attack under at least one rule fools.
        further: number of these images that the first rule does not fool.
        fooled: (N,) bool, the images of `together`.
    """

    eps: float
    by_rule: dict[str, Rate]
    together: Rate
    further: int
    fooled: Tensor


def rule_name(rule: str) -> str:
    """Return the label of a rule in a legend."""
    return "BP" if rule == "bp" else rule


def compare(measured: Measured) -> list[Comparison]:
    """Compare every attack under every rule that affects it with the first rule."""
    study = measured.study
    base = measured.reports[study.rules[0]]
    right = base.correct
    found = []
    for plan in study.plans:
        for rule in study.rules:
            if rule not in measured.reports or plan.name not in measured.reports[rule].attacks:
                continue
            difference = None
            if rule != study.rules[0] and bool(right.any()):
                ours = measured.reports[rule].attacks[plan.name].success
                difference = paired_difference(ours[right], base.attacks[plan.name].success[right])
            found.append(Comparison(plan=plan, rule=rule, difference=difference))
    return found


def worst_cases(measured: Measured) -> list[Worst]:
    """Return the worst case over all attacks and rules, by radius."""
    study = measured.study
    base = measured.reports[study.rules[0]]
    right = int(base.correct.sum())
    found = []
    for eps in study.radii:
        names = [plan.name for plan in study.plans if plan.eps == eps]
        fooled: dict[str, Tensor] = {}
        for rule, report in measured.reports.items():
            # An attack without gradients was run once, and counts for every rule.
            own = [(report if name in report.attacks else base).attacks[name].success for name in names]
            fooled[rule] = torch.stack(own).any(0)
        together = torch.stack(list(fooled.values())).any(0)
        found.append(
            Worst(
                eps=eps,
                by_rule={rule: Rate(int(some.sum()), right) for rule, some in fooled.items()},
                together=Rate(int(together.sum()), right),
                further=int((together & ~fooled[study.rules[0]]).sum()),
                fooled=together,
            )
        )
    return found


def claims(comparisons: Sequence[Comparison], base: str) -> list[Claim]:
    """Return the claims that a rule fools more images than the first rule, for every attack."""
    made: list[Claim] = []
    for one in comparisons:
        if one.difference is None:
            continue
        made.append(
            judge_images(
                f"attack-{len(made) + 1}",
                f"{rule_name(one.rule)} fools more images than {rule_name(base)}: {one.plan.text}, "
                f"eps {fraction_text(one.plan.eps)}",
                one.difference,
                theirs=rule_name(base),
                reference=_TABLE if one.rule.startswith("linbp") and base == "bp" else None,
            )
        )
    return made


_TABLE = "Li et al., arXiv 2112.11018, Tables I and II: on deep CIFAR-10 networks"
