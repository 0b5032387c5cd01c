"""The claims that the demo puts to the test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from backpass.lab.studies.demo.fit import Run
from backpass.lab.studies.demo.measure import Measured
from backpass.report.claims import Claim, Direction, judge

__all__ = ["claims", "diverged", "label"]

Rate = float | None | Literal["own"]
"""A learning rate, ``None`` for steps of equal length, or each rule's own best rate."""

OWN: Literal["own"] = "own"

_TRAINING = "Li et al., arXiv 2112.11018, Figure 5: lower loss under LinBP, above all early"
_ACCURACY = "Li et al., arXiv 2112.11018, Figure 5: higher accuracy under LinBP"
_LARGE_RATE = "Li et al., arXiv 2112.11018, Figure 9: at larger rates similar (MLP) or no convergence (LeNet-5)"
_ATTACK = "Li et al., arXiv 2112.11018, Table I: stronger white-box attacks (on deep CIFAR-10 networks)"


def label(rule: str) -> str:
    """A rule's text form in the words of a legend."""
    if rule == "bp":
        return "BP"
    if rule == "linbp":
        return "LinBP, every site"
    last = rule.removeprefix("linbp:start=-")
    return f"LinBP, last {last} sites" if last.isdigit() else rule


def diverged(runs: Sequence[Run]) -> int:
    """How many of the runs diverged."""
    return sum(run.diverged for run in runs)


def claims(measured: Measured) -> list[Claim]:
    """Every claim for every rule but the first, each against the first, paired over the seeds."""
    demo = measured.demo
    plain, small = demo.rules[0], min(demo.rates)
    best = measured.best_rates[plain]
    found: list[Claim] = []

    def compare(
        key: str,
        statement: str,
        values: Callable[[str], Sequence[float]],
        direction: Direction,
        quantity: str,
        reference: str | None,
    ) -> None:
        for rule in demo.rules[1:]:
            found.append(
                judge(
                    f"{key}-{rule}",
                    f"{label(rule)}: {statement}",
                    ours=values(rule),
                    theirs=values(plain),
                    direction=direction,
                    quantity=quantity,
                    reference=reference,
                    seeds=range(demo.seeds),
                )
            )

    for key, epoch, rate, when, reference in (
        ("early-small-rate", demo.early, small, f"after {demo.early} epochs, at the small rate {small:g}", _TRAINING),
        ("end-small-rate", demo.epochs, small, f"in the end, at the small rate {small:g}", _TRAINING),
        ("end-best-rate", demo.epochs, best, f"in the end, at BP's best rate {best:g}", _LARGE_RATE),
        ("end-own-rate", demo.epochs, OWN, "in the end, each at its own best rate", _TRAINING),
        ("end-unit-step", demo.epochs, None, "in the end, with steps of equal length", None),
    ):
        losses = partial(_losses, measured, epoch=epoch, rate=rate)
        compare(key, f"lower training loss than BP {when}", losses, "lower", "training loss, in nats", reference)
    for key, at, when in (
        ("accuracy-small-rate", small, f"at the small rate {small:g}"),
        ("accuracy-own-rate", OWN, "each at its own best rate"),
    ):
        accuracies = partial(_accuracies, measured, rate=at)
        compare(key, f"higher test accuracy than BP, {when}", accuracies, "higher", "percentage points", _ACCURACY)
    for eps in demo.eps:
        compare(
            f"attack-{eps:g}",
            f"PGD with its gradients fools more images at eps {eps:g}",
            partial(_fooled, measured, eps=eps),
            "higher",
            "percentage points",
            _ATTACK,
        )
    return found


def _runs(measured: Measured, rule: str, rate: Rate) -> list[Run] | None:
    """The runs at a rate; none for the own best rate of a rule that diverged at every rate."""
    if rate == OWN:
        rate = measured.best_rates[rule]
        return None if rate is None else measured.runs[rule, rate]
    return measured.runs[rule, rate]


def _losses(measured: Measured, rule: str, *, epoch: int, rate: Rate) -> list[float]:
    runs = _runs(measured, rule, rate)
    return [math.nan] * measured.demo.seeds if runs is None else [run.losses[epoch] for run in runs]


def _accuracies(measured: Measured, rule: str, *, rate: Rate) -> list[float]:
    runs = _runs(measured, rule, rate)
    return [math.nan] * measured.demo.seeds if runs is None else [run.accuracy for run in runs]


def _fooled(measured: Measured, rule: str, *, eps: float) -> list[float]:
    return measured.fooled[rule, eps]
