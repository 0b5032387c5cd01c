"""The study of one network under attack: its settings, and what was measured."""

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
    """Where ``linbp:start=auto`` has come to start.

    Attributes:
        choice: the rule, and how every start did.
        plan: the attack by which it was chosen.
        images: on which.
    """

    choice: Choice
    plan: str
    images: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """What is attacked, and how.

    Attributes:
        subject: the network.
        data: the images.
        protocol: where the attacks move and what eps means.
        attacks: in their text forms.
        radii: as the user has given them.
        options: settings for every attack that has them.
        rules: in their text forms; the others are compared with the first.
        batch_size: images searched at a time, and in one shard.
        device: where the network is.
        swept: how many images the curves over eps and steps are measured on; 0 leaves the curves out.
        shown: how many fooled images are shown.
        shards: the folder that keeps finished parts.
        target: class that targeted attacks lead to, see `choose_targets`; None for attacks away from the label.
        placings: by the text form that asked for it, the start that was chosen.
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
        """Every attack at every radius."""
        return make_plans(self.attacks, self.radii, self.options, self.protocol)

    def plans_of(self, rule: str) -> list[Plan]:
        """Those that a rule can change; for the first rule, all."""
        return [plan for plan in self.plans if plan.uses_gradients or rule == self.rules[0]]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Success as one setting of an attack varies.

    Attributes:
        attack: its text form.
        over: the setting, ``eps`` or ``steps``.
        places: its values.
        fixed: what else matters, in words.
        rates: by rule, the part fooled of the images that the network has right, at every place.
        images: how many images there are, right or wrong.
    """

    attack: str
    over: str
    places: list[float]
    fixed: str
    rates: dict[str, list[Rate]]
    images: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One image before, and after each rule's attack.

    Attributes:
        index: its place in the data.
        label: its class.
        before: (C, H, W) pixels.
        after: by rule, pixels, outside [0, 1] where the protocol allows it.
        seen: by rule, the class that the network sees in it.
        confidence: the softmax probability of the label, before.
        confidences: by rule, that of the class that is seen.
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
    """What was measured.

    Attributes:
        study: the settings.
        reports: by rule; attacks by their plan's name.
        sweeps: the curves.
        samples: images that the first plan fools.
        computed: shards computed.
        reused: shards found finished.
        seconds: how long it took.
    """

    study: Study
    reports: dict[str, Report]
    sweeps: list[Sweep]
    samples: list[Sample]
    computed: int
    reused: int
    seconds: float


def order_rules(rules: Sequence[str], model: str | None = None) -> list[str]:
    """The rules with plain backpropagation first, where it is among them: the others are compared with it.

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
    """Every rule finds something to act on in the subject, for images x (N, C, H, W) of ``data``.

    Raises:
        NoSiteError: one does not.
    """
    for text in rules:
        rule = parse_rule_for(subject.name, text)
        if isinstance(rule, LinBP) and is_automatic(rule):
            rule = replace(rule, start=None)
        with rule.attach(subject.network):
            subject.try_on(x, data)
