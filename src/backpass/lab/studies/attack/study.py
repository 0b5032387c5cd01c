"""Settings and measurements of an attack study on one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backpass.attacks import Rate, Report
from backpass.data import Labelled
from backpass.errors import BackpassError
from backpass.lab.placement_search import Choice, is_automatic
from backpass.lab.placements import parse_rule_for
from backpass.lab.protocols import Protocol
from backpass.lab.studies.attack.plans import Plan, make_plans
from backpass.lab.subjects import Subject
from backpass.rules import LinBP, parse_rule
from backpass.rules.registry import PLACEHOLDERS

__all__ = ["Measured", "Placing", "Sample", "Study", "Sweep", "check_rules", "order_rules"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Placing:
    """Selected start of ``linbp:start=auto``.

    Attributes:
        choice: the rule, and how every start did.
        plan: attack used for the selection.
        images: on which.
    """

    choice: Choice
    plan: str
    images: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """Settings of an attack study.

    Attributes:
        subject: the network.
        data: the images.
        protocol: input space of the attacks and unit of eps.
        attacks: text forms of the attacks.
        radii: radii as given by the user.
        options: settings for every attack that has them.
        rules: text forms of the rules; each is compared with the first.
        batch_size: images searched at a time, and in one shard.
        device: device of the network.
        swept: number of images for the curves over eps and steps; 0 disables the curves.
        shown: number of example images.
        shards: folder of finished parts.
        target: target class of targeted attacks, see `choose_targets`; None for attacks away from the label.
        placings: selected start by text form of the rule with ``start=auto``.
    """

    subject: Subject
    data: Labelled
    protocol: Protocol
    attacks: Sequence[str]
    radii: Sequence[float]
    options: dict[str, Any]
    rules: Sequence[str]
    batch_size: int
    device: torch.device
    swept: int
    shown: int
    shards: Path | None
    target: str | int | None = None
    placings: Mapping[str, Placing] = field(default_factory=dict)

    @property
    def plans(self) -> list[Plan]:
        """All attacks at all radii."""
        return make_plans(self.attacks, self.radii, self.options, self.protocol)

    def plans_of(self, rule: str) -> list[Plan]:
        """Return the plans that a rule affects; all of them for the first rule."""
        return [plan for plan in self.plans if plan.uses_gradients or rule == self.rules[0]]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Success rate as a function of one setting of an attack.

    Attributes:
        attack: text form of the attack.
        over: varied setting, ``eps`` or ``steps``.
        places: values of the setting.
        fixed: fixed settings, as text.
        rates: by rule, success rate on the correctly classified images at every value.
        images: number of images, correctly classified or not.
    """

    attack: str
    over: str
    places: list[float]
    fixed: str
    rates: dict[str, list[Rate]]
    images: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Example image, before and after the attack under each rule.

    Attributes:
        index: index in the data.
        label: label.
        before: (C, H, W) pixels.
        after: by rule, pixels, outside [0, 1] where the protocol allows it.
        seen: by rule, predicted class of the adversarial image.
        confidence: softmax probability of the label before the attack.
        confidences: by rule, softmax probability of the predicted class.
    """

    index: int
    label: int
    before: Tensor
    after: dict[str, Tensor]
    seen: dict[str, int]
    confidence: float
    confidences: dict[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Measurements of an attack study.

    Attributes:
        study: the settings.
        reports: by rule; attacks by their plan's name.
        sweeps: the curves.
        samples: images that the first plan fools.
        computed: shards computed.
        reused: shards found finished.
        seconds: duration in seconds.
    """

    study: Study
    reports: dict[str, Report]
    sweeps: list[Sweep]
    samples: list[Sample]
    computed: int
    reused: int
    seconds: float


def order_rules(rules: Sequence[str], model: str | None = None) -> list[str]:
    """Return the rules with plain backpropagation, the baseline of the comparison, first if it is among them.

    Args:
        rules: text forms.
        model: the one network that they are for; then ``start=paper`` becomes the place that it names there.

    Raises:
        UnknownNameError: a rule has no known name.
        BackpassError: a rule cannot be read, stands twice, or is to be chosen without a network to choose for.
    """
    texts = [
        str(parse_rule(rule, placeholders=PLACEHOLDERS) if model is None else parse_rule_for(model, rule))
        for rule in rules
    ]
    for index, text in enumerate(texts):
        if text in texts[:index]:
            raise BackpassError(f"--rule {text} stands twice.")
        if model is None and is_automatic(text):
            raise BackpassError(
                f"--rule {text} is chosen by success against one network, which is not success against others: say "
                "where, as in linbp:start=-2, or let backpass attack choose for each source."
            )
    return sorted(texts, key=lambda text: text != "bp")


def check_rules(subject: Subject, rules: Sequence[str], x: Tensor, data: str) -> None:
    """Check that every rule has a site in the subject for images x (N, C, H, W) of ``data``.

    Raises:
        NoSiteError: a rule has no site.
    """
    for text in rules:
        rule = parse_rule_for(subject.name, text)
        if isinstance(rule, LinBP) and is_automatic(rule):
            rule = replace(rule, start=None)
        with rule.attach(subject.network):
            subject.try_on(x, data)
