"""Figure 9: larger learning rates, and gradients of unit length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from backpass.lab.bench.experiment import Bench, Experiment, Outcome
from backpass.lab.bench.images import load_parts
from backpass.lab.bench.training import Curves, curves
from backpass.lab.experiments.linbp.training_settings import CIFAR10, MNIST, Network, Training
from backpass.report.claims import Claim, judge, judge_within
from backpass.report.result import Cell, Curve, Finding, Series, Table
from backpass.report.statistics import mean_interval
from backpass.report.wording import interval_text
from backpass.wording import listing

__all__ = ["EXPERIMENTS", "Case", "StepSizes"]

_PAPER = "Li et al., arXiv 2112.11018, Figure 9 and section 4.2.2"
_RULES = {"bp": "BP", "linbp": "LinBP"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network at one rate.

    Attributes:
        network: with this rate.
        expected: what the paper says: both rules are ``alike``, LinBP ``fails`` where BP does not, or LinBP is
            ``no better``.
        unit: scale the gradient of every weight tensor to l2 norm 1.
        data: which of the settings' trainings it follows.
    """

    network: Network
    expected: Literal["alike", "fails", "no better"]
    unit: bool = False
    data: str = "mnist"


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """The settings.

    Attributes:
        cases: by the name in the report.
        training: how is trained, by data.
        failed_below: a run has failed to converge where it diverged, or ends below this training accuracy, in per cent.
        alike_within: two training accuracies are alike when they differ by at most so many percentage points.
    """

    cases: Mapping[str, Case]
    training: Mapping[str, Training]
    failed_below: float = 50.0
    alike_within: float = 1.0


Found = dict[str, list[Curves]]
"""By ``bp`` and ``linbp``, the curves of every seed."""


def _measure(settings: StepSizes, bench: Bench) -> Outcome:
    claims: list[Claim] = []
    series: list[Series] = []
    rows: list[list[Cell]] = []
    lines = {}
    failures: dict[str, list[str]] = {rule: [] for rule in _RULES}
    for name, case in settings.cases.items():
        training = settings.training[case.data]
        parts = load_parts(training.source)
        lines[case.data] = parts.line
        steps = len(parts.train) // training.batch
        places = range(case.network.epochs * training.per_epoch + 1)
        marks = tuple(round(place * steps / training.per_epoch) for place in places)
        found = {
            rule: [
                curves(bench, training.run(case.network, text, marks, seed, unit=case.unit), training.source)
                for seed in range(training.seeds)
            ]
            for rule, text in (("bp", "bp"), ("linbp", case.network.rule))
        }
        claims += _claims(name, case, settings, found)
        series.append(_series(name, [place / training.per_epoch for place in places], found))
        for rule, label in _RULES.items():
            lost = int(sum(_failed(one, settings) for one in found[rule]))
            accuracy = mean_interval([one["train accuracy"][-1] for one in found[rule]])
            rows.append([f"{name}, {label}", case.network.rate, accuracy, f"{lost} of {training.seeds}"])
            if lost and case.expected == "fails":
                failures[rule].append(f"on {name} ({lost} of {training.seeds} runs)")
    seeds = max(training.seeds for training in settings.training.values())
    return Outcome(
        findings=_findings(settings, failures, rows),
        series=series,
        claims=claims,
        tables=[
            Table(
                id="end",
                title="At the end of training",
                columns=["Network, step and gradients", "rate", "training accuracy, %", "diverged or not learned"],
                rows=rows,
                note=f"Not learned: below {settings.failed_below:g} % on the training images at the end.",
            )
        ],
        data=" ".join(lines.values()),
        seeds=range(seeds),
    )


def _failed(one: Curves, settings: StepSizes) -> float:
    """1 for a run that failed to converge, 0 for another; a run that diverged has ``nan`` at its end."""
    return 0.0 if one["train accuracy"][-1] >= settings.failed_below else 1.0


def _claims(name: str, case: Case, settings: StepSizes, found: Found) -> list[Claim]:
    slug = name.lower().replace(" ", "-").replace(",", "")
    ours, theirs = found["linbp"], found["bp"]
    if case.expected == "alike":
        gaps = [a["train accuracy"][-1] - b["train accuracy"][-1] for a, b in zip(ours, theirs, strict=True)]
        return [
            judge_within(
                f"{slug}-alike",
                f"{name}: training is alike under LinBP and BP",
                values=gaps,
                low=-settings.alike_within,
                high=settings.alike_within,
                quantity="LinBP's training accuracy less BP's, percentage points",
                reference=_PAPER,
                published="similar on the MLP",
            )
        ]
    if case.expected == "fails":
        return [
            judge_within(
                f"{slug}-{key}",
                f"{name}: {statement}",
                values=[_failed(one, settings) for one in runs],
                low=low,
                high=high,
                quantity="share of the runs that fail to converge",
                reference=_PAPER,
                published=published,
            )
            for key, statement, runs, low, high, published in (
                ("linbp-fails", "LinBP fails to converge", ours, 0.5, math.inf, "failed to converge with LinBP"),
                ("bp-converges", "BP still converges", theirs, -math.inf, 0.5, "could still converge with BP"),
            )
        ]
    return [
        judge(
            f"{slug}-no-better",
            f"{name}: LinBP has the higher training loss, it is no better",
            ours=[one["train loss"][-1] for one in ours],
            theirs=[one["train loss"][-1] for one in theirs],
            direction="higher",
            quantity="training loss, nats",
            reference=_PAPER,
            published="LinBP performed no better than BP",
            seeds=range(len(ours)),
        )
    ]


def _series(name: str, epochs: Sequence[float], found: Found) -> Series:
    return Series(
        id=name.lower().replace(" ", "-").replace(",", ""),
        title=name,
        description=f"The training loss of {name} against epochs, by BP and by LinBP.",
        x_label="epochs",
        y_label="training loss, nats",
        curves=[
            Curve(label=_RULES[rule], x=epochs, runs=[one["train loss"] for one in runs])
            for rule, runs in found.items()
        ],
    )


def _findings(
    settings: StepSizes, failures: Mapping[str, Sequence[str]], rows: Sequence[Sequence[Cell]]
) -> list[Finding]:
    told = {rule: listing(list(names)) or "on none of them" for rule, names in failures.items()}
    accuracies = {str(row[0]): row[2] for row in rows}

    def both(name: str) -> str:
        ours, theirs = (_text(accuracies[f"{name}, {label}"]) for label in ("LinBP", "BP"))
        return f"{ours} and {theirs} ({name})"

    hard = [name for name, case in settings.cases.items() if case.expected == "fails"]
    alike = [name for name, case in settings.cases.items() if case.expected == "alike"]
    unit = [name for name, case in settings.cases.items() if case.unit]
    return [
        Finding(
            "Large steps",
            f"Of {listing(hard)}, LinBP fails to converge {told['linbp']}, and BP {told['bp']}. On the MLP the "
            "training accuracies in per cent, with LinBP and with BP, end at "
            f"{listing([both(name) for name in alike])}. The paper: with larger steps LeNet-5 failed to converge with "
            "LinBP and could still converge with BP, while on the MLP both were similar. Its factors are missing in "
            "the text that this was made from, so several are tried; where one of them is too small for the effect, "
            "the measured direction is the opposite.",
        ),
        Finding(
            "Steps of unit length",
            "Where every weight tensor's gradient is scaled to length 1, as in the released code, the training "
            "accuracies in per cent, with LinBP and with BP, end at "
            f"{listing([both(name) for name in unit])}. The paper: LinBP performed no better than BP.",
        ),
    ]


def _text(cell: Cell) -> str:
    return interval_text(cell) if isinstance(cell, tuple) else str(cell)


def _cases(training: Training, epochs: Mapping[str, Mapping[int, int]]) -> dict[str, Case]:
    """Every network at every factor, for so many epochs, and with unit steps for as many as at the largest."""
    cases = {}
    for name, one in training.networks.items():
        for factor, count in epochs[name].items():
            cases[f"{name} x{factor}"] = Case(
                network=replace(one, rate=one.rate * factor, epochs=count),
                expected="alike" if name == "MLP" else "fails",
            )
        cases[f"{name}, unit steps"] = Case(
            network=replace(one, epochs=min(epochs[name].values())), expected="no better", unit=True
        )
    return cases


def _without_networks(training: Training, per_epoch: int = 1) -> Training:
    return replace(training, networks={}, per_epoch=per_epoch)


_VGG16 = Case(network=Network(model="vgg16", rate=0.05, epochs=100), expected="fails", data="cifar10")

EXPERIMENTS = (
    Experiment(
        name="linbp-fig9",
        title="Does LinBP bear large steps?",
        question=(
            "The networks of Figure 5 with 2, 5 and 10 times their learning rates (at the small scale fewer epochs for "
            "larger rates), from the same weights and on the same batches; and with gradients of unit length, at their "
            "own rates. At the paper's scale also VGG-16 on CIFAR-10 at rate 0.05, for the paper's is missing too."
        ),
        source=_PAPER,
        scales={
            "small": StepSizes(
                cases=_cases(MNIST["small"], {"MLP": {2: 4, 5: 2, 10: 1}, "LeNet-5": {2: 2, 5: 1, 10: 1}}),
                training={"mnist": _without_networks(MNIST["small"], per_epoch=4)},
            ),
            "paper": StepSizes(
                cases={
                    **_cases(MNIST["paper"], dict.fromkeys(("MLP", "LeNet-5"), dict.fromkeys((2, 5, 10), 50))),
                    "VGG-16 at 0.05": _VGG16,
                },
                training={
                    "mnist": _without_networks(MNIST["paper"]),
                    "cifar10": _without_networks(CIFAR10["cosine"]["paper"]),
                },
            ),
        },
        measure=_measure,
        data=("mnist", "cifar10"),
    ),
)
