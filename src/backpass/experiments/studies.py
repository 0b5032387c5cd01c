"""Studies of attacks on a user's networks: settings that ``attack`` and ``transfer`` share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from backpass.data import Labelled
from backpass.errors import BackpassError
from backpass.lab.placement_search import is_automatic
from backpass.lab.placements import parse_rule_for
from backpass.lab.plans import Plan, make_plans
from backpass.lab.protocols import Protocol
from backpass.lab.subjects import Subject
from backpass.numbers import fraction_text
from backpass.report.claims import Claim, agreement
from backpass.report.result import Finding
from backpass.rules import LinBP, parse_rule
from backpass.rules.registry import PLACEHOLDERS

__all__ = [
    "AttackImages",
    "Run",
    "Study",
    "check_rules",
    "comparison_of_rules",
    "limits",
    "order_rules",
    "radius_axis",
    "rule_name",
    "settings_of",
]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of an arm: everything that its outcome depends on, in JSON types.

    Attributes:
        rule: text form of the rule.
        plan: name of the plan.
        source: name of the attacked network.
        attack: settings of its attack.
        network: networks that are attacked or evaluated, with hashes of their weights.
        data: description of the images, with their hash.
        protocol: name of the protocol.
        target: target class of targeted attacks.
        batch_size: images searched at a time.
        values: values of the varied setting of a curve.
    """

    rule: str
    plan: str
    source: str
    attack: str
    network: str
    data: str
    protocol: str
    target: str | int | None
    batch_size: int
    values: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """Networks, images, attacks and rules of a study.

    Attributes:
        sources: networks to attack, by name; rules are attached to them.
        targets: networks that the images are evaluated on, by name; may be the same.
        data: the images.
        protocol: input space of the attacks and unit of eps.
        attacks: text forms of the attacks.
        radii: radii as given by the user.
        options: settings for every attack that has them.
        rules: text forms of the rules; each is compared with the first.
        batch_size: images searched at a time, and in one shard.
        device: device of the networks.
        shards: folder of finished parts.
        target: target class of targeted attacks, see `choose_targets`; None for attacks away from the label.
        gradients: budget in gradients per image; None for the attacks' own steps.
        swept: number of images for the curves over eps and steps; 0 disables the curves.
        shown: number of example images.
        parts: numbers of shards computed and found finished, counted during the run.
    """

    sources: Mapping[str, Subject]
    targets: Mapping[str, Subject] = field(default_factory=dict)
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
    swept: int = 0
    shown: int = 0
    parts: dict[str, int] = field(default_factory=lambda: {"computed": 0, "reused": 0})

    @property
    def subject(self) -> Subject:
        """The first network to attack."""
        return next(iter(self.sources.values()))

    @cached_property
    def digest(self) -> str:
        """The first digits of the SHA-256 of pixels and labels."""
        digest = hashlib.sha256()
        for tensor in (self.data.images.pixels, self.data.images.labels):
            for start in range(0, len(tensor), 1024):
                digest.update(tensor[start : start + 1024].contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    @cached_property
    def plans(self) -> list[Plan]:
        """All attacks at all radii."""
        return make_plans(self.attacks, self.radii, self.options, self.protocol, self.gradients)

    def plan(self, name: str) -> Plan:
        """Return the plan of a name."""
        return next(plan for plan in self.plans if plan.name == name)

    def rules_of(self, plan: Plan) -> Sequence[str]:
        """Return the rules that affect an attack; only the first one for an attack without gradients."""
        return self.rules if plan.uses_gradients else self.rules[:1]

    def run(self, rule: str, plan: Plan, source: str, values: Sequence[float] = ()) -> Run:
        """Return the settings of an arm."""
        networks = {source: self.sources[source], **self.targets}
        return Run(
            rule=rule,
            plan=plan.name,
            source=source,
            attack=_attack_text(plan),
            network=", ".join(f"{name} {subject.digest}" for name, subject in networks.items()),
            data=f"{self.data.description} (SHA-256 {self.digest})",
            protocol=self.protocol.name,
            target=self.target,
            batch_size=self.batch_size,
            values=tuple(values),
        )


class AttackImages(Dataset[tuple[Tensor, int]]):
    """Pairs (image, label); images are converted to floats on access, so that only bytes are kept in memory.

    Args:
        data: the images.
        protocol: protocol that defines the input space.
    """

    def __init__(self, data: Labelled, protocol: Protocol) -> None:
        self.images, self.protocol = data.images, protocol

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.images.pixels[index].float() / self.images.white
        return self.protocol.images(pixels), int(self.images.labels[index])


def rule_name(rule: str) -> str:
    """Return the label of a rule in a legend."""
    return "BP" if rule == "bp" else rule


def radius_axis(radii: Sequence[float]) -> tuple[str, list[float]]:
    """Return the label of an axis of radii, and their places on it."""
    in_255ths = all("/255" in fraction_text(eps) for eps in radii)
    return ("eps (255ths)" if in_255ths else "eps"), [round(eps * (255 if in_255ths else 1), 9) for eps in radii]


def settings_of(study: Study) -> dict[str, Any]:
    """Return the settings of a study for its report."""
    target = study.target
    if isinstance(target, int):
        target = f"{study.data.class_name(target)} ({target})"
    of_kind = (("source", study.sources), ("target", study.targets))
    both = {f"{kind} {name}": subject for kind, some in of_kind for name, subject in some.items()}
    return {
        **{
            name if study.targets else "network": f"{subject.name}, {subject.size:,} parameters; weights: "
            f"{subject.weights} (SHA-256 {subject.digest})"
            for name, subject in both.items()
        },
        "data": f"{study.data.description} (SHA-256 {study.digest})",
        "protocol": f"{study.protocol.name}. {study.protocol.explain(study.radii, None)}",
        "eps": ", ".join(map(fraction_text, study.radii)),
        "rules": ", ".join(study.rules),
        **({} if target is None else {"target class": target}),
        **({} if study.gradients is None else {"gradients of each image": study.gradients}),
        "batch size": study.batch_size,
        **{plan.name: _attack_text(plan) for plan in study.plans},
    }


def comparison_of_rules(study: Study, claims: Sequence[Claim]) -> list[str]:
    """Return a sentence that counts the verdicts on the further rules; none without claims."""
    more, fewer = (sum(agreement(claim.verdict) is agrees for claim in claims) for agrees in (True, False))
    return [
        f"Compared with the gradients of {rule_name(study.rules[0])}, those of the other rules fool significantly more "
        f"images in {more} and significantly fewer in {fewer} of {len(claims)} comparisons."
    ][: len(claims)]


def limits(study: Study) -> list[Finding]:
    """Return findings about weights, data and protocol."""
    found = []
    both = {**study.sources, **study.targets}
    initial = [name for name, subject in both.items() if not subject.trained]
    if initial:
        found.append(
            Finding(
                "The weights",
                f"For {', '.join(initial)} no file of weights was given: its own initial weights were used. Unless "
                "such a network loads trained ones by itself, its numbers say nothing about a trained network.",
            )
        )
    if study.data.warning:
        found.append(Finding("The images", study.data.warning))
    if study.protocol.name == "paper":
        step = next((plan.attack.step for plan in study.plans if hasattr(plan.attack, "step")), None)
        found.append(Finding("What eps means here", study.protocol.explain(study.radii, step)))
    return found


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


def _attack_text(plan: Plan) -> str:
    settings = asdict(plan.attack).items()
    return ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in settings if value is not None)


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return " to ".join(map(_plain, value))
    return fraction_text(value) if isinstance(value, float) else str(value)
