"""Settings and measurement of a transfer study: attacks on sources under rules, evaluated on targets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backpass.attacks import Iterative, Rate, TransferReport, transfer
from backpass.data import Labelled
from backpass.lab.placements import parse_rule_for
from backpass.lab.protocols import Protocol
from backpass.lab.studies.attack.images import AttackImages
from backpass.lab.studies.attack.plans import Plan, make_plans
from backpass.lab.subjects import Subject

__all__ = ["Measured", "Study", "measure"]

Progress = Callable[[str, float], None]
"""Called with a description of the current work and the finished fraction in [0, 1]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """Settings of a transfer study.

    Attributes:
        sources: networks to attack, by name; rules are attached to them.
        targets: networks to evaluate on, by name; may be the same.
        data: the images.
        protocol: input space of the attacks and unit of eps.
        attacks: text forms of the attacks.
        radii: radii as given by the user.
        options: settings for every attack that has them.
        rules: text forms of the rules; each is compared with the first.
        batch_size: images searched at a time.
        device: device of the networks.
        shards: folder of finished parts.
        target: target class of targeted attacks, see `choose_targets`; None for attacks away from the label.
        gradients: budget in gradients per image, at which all attacks and rules are compared; None for the attacks' own
            steps.
    """

    sources: Mapping[str, Subject]
    targets: Mapping[str, Subject]
    data: Labelled
    protocol: Protocol
    attacks: Sequence[str]
    radii: Sequence[float]
    options: dict[str, Any]
    rules: Sequence[str]
    batch_size: int
    device: torch.device
    shards: Path | None = None
    target: str | int | None = None
    gradients: int | None = None

    @property
    def plans(self) -> list[Plan]:
        """All attacks at all radii."""
        return make_plans(self.attacks, self.radii, self.options, self.protocol, self.gradients)

    def marks(self, plan: Plan) -> list[int] | None:
        """Return the numbers of gradients at which an attack is evaluated: 1, 2, 5, 10, ... and the budget."""
        if self.gradients is None or not isinstance(plan.attack, Iterative):
            return None
        least, budget = plan.attack.cost(1), self.gradients
        series = [first * 10**power for power in range(len(str(budget))) for first in (1, 2, 5)]
        return sorted({budget, *(mark for mark in series if least <= mark < budget)})

    def rules_of(self, plan: Plan) -> Sequence[str]:
        """Return the rules that affect an attack; only the first one for an attack without gradients."""
        return self.rules if plan.uses_gradients else self.rules[:1]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Pairs (source, target) of different networks."""
        return [(source, target) for source in self.sources for target in self.targets if source != target]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Measurements of a transfer study.

    Attributes:
        study: the settings.
        reports: transfer report by (plan, rule).
        seconds: duration in seconds.
    """

    study: Study
    reports: dict[tuple[str, str], TransferReport]
    seconds: float

    @property
    def correct(self) -> dict[str, Tensor]:
        """Correctly classified clean images (N,) bool, by target."""
        return next(iter(self.reports.values())).correct

    @property
    def clean(self) -> dict[str, Rate]:
        """Clean accuracy by target."""
        return {target: Rate(int(right.sum()), len(right)) for target, right in self.correct.items()}

    def rate(self, plan: str, rule: str, source: str, target: str) -> Rate:
        """Return the success rate on the images that the target classifies correctly."""
        return self.reports[plan, rule].rates[source][target]


def measure(study: Study, progress: Progress = lambda what, part: None) -> Measured:
    """Run every attack under every rule and evaluate the images on every target.

    Raises:
        BackpassError: the attacks cannot be run on these networks and images.
    """
    began = time.perf_counter()
    sources = {name: study.protocol.model(subject.model) for name, subject in study.sources.items()}
    targets = {name: study.protocol.model(subject.model) for name, subject in study.targets.items()}
    images = AttackImages(study.data, study.protocol)
    work = [(plan, rule) for plan in study.plans for rule in study.rules_of(plan)]
    reports: dict[tuple[str, str], TransferReport] = {}
    for number, (plan, rule) in enumerate(work):

        def report(done: int, total: int, number: int = number, what: str = f"{plan.name}, {rule}") -> None:
            progress(what, (number + done / total) / len(work))

        report(0, 1)
        with ExitStack() as attached:
            for subject in study.sources.values():
                attached.enter_context(parse_rule_for(subject.name, rule).attach(subject.network))
            reports[plan.name, rule] = transfer(
                sources,
                targets,
                images,
                plan.attack,
                batch_size=study.batch_size,
                classes=study.target,
                resume=study.shards,
                tag=rule,
                gradients=study.marks(plan),
                progress=report,
            )
    return Measured(study=study, reports=reports, seconds=time.perf_counter() - began)
