"""Images made against some networks and shown to others, with plain gradients and with a rule's."""

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
"""Called with what is going on and with the part that is done, in [0, 1]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """What is attacked, who judges, and how.

    Attributes:
        sources: networks to attack, by name; rules are attached to them.
        targets: networks that judge the images, by name; may be the same.
        data: the images.
        protocol: where the attacks move and what eps means.
        attacks: in their text forms.
        radii: as the user has given them.
        options: settings for every attack that has them.
        rules: in their text forms; the others are compared with the first.
        batch_size: images searched at a time.
        device: where the networks are.
        shards: the folder that keeps finished parts.
        target: class that targeted attacks lead to, see `choose_targets`; None for attacks away from the label.
        gradients: budget of each image, at which all attacks and rules are compared; None for the attacks' own steps.
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
        """Every attack at every radius."""
        return make_plans(self.attacks, self.radii, self.options, self.protocol, self.gradients)

    def marks(self, plan: Plan) -> list[int] | None:
        """Return the numbers of gradients after which an attack is judged: 1, 2, 5, 10, ... and the budget."""
        if self.gradients is None or not isinstance(plan.attack, Iterative):
            return None
        least, budget = plan.attack.cost(1), self.gradients
        series = [first * 10**power for power in range(len(str(budget))) for first in (1, 2, 5)]
        return sorted({budget, *(mark for mark in series if least <= mark < budget)})

    def rules_of(self, plan: Plan) -> Sequence[str]:
        """The rules that can change an attack; for one without gradients, the first stands for all."""
        return self.rules if plan.uses_gradients else self.rules[:1]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Source and target, where they are not the same network."""
        return [(source, target) for source in self.sources for target in self.targets if source != target]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What was measured.

    Attributes:
        study: the settings.
        reports: by (plan, rule), who fools whom, image by image.
        seconds: how long it took.
    """

    study: Study
    reports: dict[tuple[str, str], TransferReport]
    seconds: float

    @property
    def correct(self) -> dict[str, Tensor]:
        """By target, (N,) bool: the images that it has right when they are clean."""
        return next(iter(self.reports.values())).correct

    @property
    def clean(self) -> dict[str, Rate]:
        """By target, right of all images."""
        return {target: Rate(int(right.sum()), len(right)) for target, right in self.correct.items()}

    def rate(self, plan: str, rule: str, source: str, target: str) -> Rate:
        """Fooled, of the images that the target has right."""
        return self.reports[plan, rule].rates[source][target]


def measure(study: Study, progress: Progress = lambda what, part: None) -> Measured:
    """Makes the images of every attack with every rule, and shows them to every target.

    Raises:
        BackpassError: the attacks cannot be run on these networks and images; the message says why.
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
