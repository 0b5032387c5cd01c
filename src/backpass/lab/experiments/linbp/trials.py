"""Attacks on trained networks, with an outcome for every image, kept as pieces."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backpass.attacks import Attack, evaluate
from backpass.lab.bench.experiment import Bench
from backpass.lab.data import Labelled
from backpass.lab.experiments.linbp.victims import Victim
from backpass.lab.numbers import fraction_text
from backpass.lab.placements import parse_rule_for
from backpass.lab.protocols import make_protocol
from backpass.lab.studies.attack.plans import make_plans
from backpass.rules import Rule

__all__ = ["Outcomes", "Trial", "attack_images", "run_trial"]

_BATCH = 500


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One attack at one radius.

    Attributes:
        attack: in its text form.
        eps: the radius.
        protocol: says what it means.
        images: how many test images, from the first; all where it is None.
        precision: in which the search computes, ``float32``, ``bfloat16`` (autocast) or ``float64``.
    """

    attack: str
    eps: float
    protocol: str = "paper"
    images: int | None = None
    precision: str = "float32"

    def make(self, data: Labelled) -> Attack:
        """The attack for images of this data set in the protocol's space."""
        protocol = make_protocol(self.protocol, data.name, None)
        (plan,) = make_plans([self.attack], [self.eps], {}, protocol)
        return replace(plan.attack, dtype=torch.bfloat16 if self.precision == "bfloat16" else None)

    def __str__(self) -> str:
        return f"{self.attack}, eps {fraction_text(self.eps)}, {self.protocol} protocol"


class Outcomes(NamedTuple):
    """What became of the images.

    Attributes:
        right: (N,) bool, classified correctly when clean.
        fooled: (N,) bool, and mistaken under attack.
    """

    right: Tensor
    fooled: Tensor

    @property
    def rate(self) -> float:
        """Fooled, of those that were right, in per cent; ``nan`` if none was."""
        right = int(self.right.sum())
        return 100 * int(self.fooled.sum()) / right if right else float("nan")


def run_trial(bench: Bench, victim: Victim, rule: str, trial: Trial) -> Outcomes:
    """Attack with a rule's gradients, or find what an earlier run has found.

    Args:
        bench: keeps the outcome.
        victim: the network.
        rule: in its text form; ``start=paper`` is the paper's placement in this network.
        trial: the attack.
    """

    def compute() -> str:
        found = attack_images(victim, parse_rule_for(victim.training.model, rule), trial)
        return "".join("-" if not r else "1" if f else "0" for r, f in zip(*map(Tensor.tolist, found), strict=True))

    marks = bench.shared.value(
        f"{rule} against {victim.training.model}, seed {victim.seed}: {trial}",
        compute,
        rule=rule,
        trial=asdict(trial),
        victim=victim.key,
    )
    return Outcomes(
        torch.tensor([mark != "-" for mark in marks]),
        torch.tensor([mark == "1" for mark in marks]),
    )


def attack_images(victim: Victim, rule: Rule, trial: Trial, *, skip: int = 0) -> Outcomes:
    """Attack the images that come after the first `skip` with this rule's gradients."""
    data = victim.test
    protocol = make_protocol(trial.protocol, data.name, None)
    images, attack = data.images, trial.make(data)
    stop = None if trial.images is None else skip + trial.images
    x = protocol.images(images.pixels[skip:stop].float() / images.white)
    network, x = _in_precision(victim.network, x, trial.precision)
    with rule.attach(network):
        model: Any = protocol.model(network)
        report = evaluate(model.to(x.dtype), (x, images.labels[skip:stop]), attack, batch_size=_BATCH)
    (record,) = report.attacks.values()
    return Outcomes(report.correct, record.success)


def _in_precision(network: nn.Module, x: Tensor, precision: str) -> tuple[nn.Module, Tensor]:
    """Network and images, as doubles where that is asked for; autocast is the attack's own."""
    return (deepcopy(network).double(), x.double()) if precision == "float64" else (network, x)
