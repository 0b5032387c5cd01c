"""The claims that the demo puts to the test."""

from __future__ import annotations

from collections.abc import Sequence

from backpass.lab.claims import Claim, Direction, judge
from backpass.lab.experiments.demo import Measured
from backpass.lab.experiments.fit import Run

__all__ = ["claims", "diverged", "label"]

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
    plain, small, best = demo.rules[0], min(demo.rates), measured.best_rate
    found: list[Claim] = []

    def loss(key: str, epoch: int, rate: float | None, when: str, reference: str | None) -> None:
        for rule in demo.rules[1:]:
            found.append(
                judge(
                    f"{key}-{rule}",
                    f"{label(rule)}: lower training loss than {label(plain)} {when}",
                    ours=[run.losses[epoch] for run in measured.runs[rule, rate]],
                    theirs=[run.losses[epoch] for run in measured.runs[plain, rate]],
                    direction="lower",
                    quantity="training loss, difference in nats",
                    reference=reference,
                    seeds=range(demo.seeds),
                )
            )

    def higher(key: str, statement: str, ours: Sequence[float], theirs: Sequence[float], reference: str) -> None:
        direction: Direction = "higher"
        quantity = "percentage points"
        found.append(
            judge(
                key,
                statement,
                ours=ours,
                theirs=theirs,
                direction=direction,
                quantity=quantity,
                reference=reference,
                seeds=range(demo.seeds),
            )
        )

    loss("early-small-rate", demo.early, small, f"after {demo.early} epochs at the small rate {small:g}", _TRAINING)
    loss("end-small-rate", demo.epochs, small, f"at the end at the small rate {small:g}", _TRAINING)
    loss("end-best-rate", demo.epochs, best, f"at the end at BP's best rate {best:g}", _LARGE_RATE)
    loss("end-unit-step", demo.epochs, None, "at the end with steps of equal length", None)
    for key, rate, words in (("small", small, "the small rate"), ("best", best, "BP's best rate")):
        for rule in demo.rules[1:]:
            higher(
                f"accuracy-{key}-rate-{rule}",
                f"{label(rule)}: higher test accuracy than {label(plain)} at {words} {rate:g}",
                [run.accuracy for run in measured.runs[rule, rate]],
                [run.accuracy for run in measured.runs[plain, rate]],
                _ACCURACY,
            )
    for rule in demo.rules[1:]:
        for eps in demo.eps:
            higher(
                f"attack-{eps:g}-{rule}",
                f"{label(rule)}: PGD with its gradients fools more images at eps {eps:g}",
                measured.fooled[rule, eps],
                measured.fooled[plain, eps],
                _ATTACK,
            )
    return found
