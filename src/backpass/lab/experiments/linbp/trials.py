"""Attacks on trained networks, with an outcome for every image, kept as pieces."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backpass.attacks import Attack, evaluate
from backpass.data import Labelled
from backpass.errors import BackpassError
from backpass.lab.bench.experiment import Bench
from backpass.lab.experiments.linbp.victims import Victim
from backpass.lab.placement_search import choose_start, is_automatic
from backpass.lab.placements import parse_rule_for
from backpass.lab.plans import make_plans
from backpass.lab.protocols import make_protocol
from backpass.numbers import fraction_text
from backpass.rules import LinBP, Rule

__all__ = ["Outcomes", "Trial", "attack_images", "run_trial", "search_halvings"]

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
        scale: what the logits are multiplied by, above 0: no decision changes, but a large one saturates the
            cross-entropy.
    """

    attack: str
    eps: float
    protocol: str = "paper"
    images: int | None = None
    precision: str = "float32"
    scale: float = 1.0

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
        rule: in its text form; ``start=paper`` is the paper's placement in this network, ``start=auto`` the one that
            does best on as many images that follow those of the trial.
        trial: the attack.

    Raises:
        BackpassError: ``start=auto`` has no images to choose by.
    """

    def compute() -> str:
        found = attack_images(victim, concrete, trial)
        return "".join("-" if not r else "1" if f else "0" for r, f in zip(*map(Tensor.tolist, found), strict=True))

    asked = {"rule": rule, "trial": asdict(trial), "victim": victim.key}
    who = f"{rule} against {victim.training.model}, seed {victim.seed}: {trial}"
    concrete = parse_rule_for(victim.training.model, rule)
    if isinstance(concrete, LinBP) and is_automatic(concrete):
        start = bench.shared.value(f"start of {who}", partial(_search, concrete, victim, trial), **asked)
        concrete = replace(concrete, start=start)
    marks = bench.shared.value(who, compute, **asked)
    return Outcomes(
        torch.tensor([mark != "-" for mark in marks]),
        torch.tensor([mark == "1" for mark in marks]),
    )


def attack_images(victim: Victim, rule: Rule, trial: Trial) -> Outcomes:
    """Attack the trial's images with this rule's gradients."""
    network, model, x, y = _prepared(victim, trial, 0)
    with rule.attach(network):
        report = evaluate(model, (x, y), trial.make(victim.test), batch_size=_BATCH)
    (record,) = report.attacks.values()
    return Outcomes(report.correct, record.success)


def search_halvings(victim: Victim, rule: str, trial: Trial) -> list[list[int]]:
    """The iterations at which Auto-PGD halves its step, for each image that the network has right when clean.

    Every image has all steps, also when it is fooled before the last.
    """
    network, model, x, y = _prepared(victim, trial, 0)
    attack = replace(trial.make(victim.test), early_stop=False)
    found: list[list[int]] = []
    for place in range(0, len(x), _BATCH):
        images, labels = (part[place : place + _BATCH].to(victim.device) for part in (x, y))
        with torch.no_grad():
            right = (model(images).argmax(1) == labels).nonzero().squeeze(1)
        if len(right) == 0:
            continue
        with parse_rule_for(victim.training.model, rule).attach(network):
            halvings = attack(model, images[right], labels[right], indices=right + place).halvings
        if halvings is None:
            raise BackpassError(f"only apgd halves its steps, not {trial.attack!r}.")
        found += [[at for at in row if at >= 0] for row in halvings.tolist()]
    return found


def _search(rule: LinBP, victim: Victim, trial: Trial) -> int:
    """The start that does best on the images after those of the trial."""
    left = 0 if trial.images is None else len(victim.test.images) - trial.images
    if left < 1:
        raise BackpassError(
            "linbp:start=auto chooses on test images that are not attacked, and none is left: set images to fewer "
            f"than {len(victim.test.images)}."
        )
    network, model, x, y = _prepared(victim, trial, trial.images or 0)
    start = choose_start(rule, network, x, y, trial.make(victim.test), model=model, batch_size=_BATCH).rule.start
    assert isinstance(start, int)  # noqa: S101  a search gives a place counted from the end
    return start


def _prepared(victim: Victim, trial: Trial, skip: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """The network, what the attack sees, and the images after the first `skip` with their labels."""
    protocol = make_protocol(trial.protocol, victim.test.name, None)
    images = victim.test.images
    stop = None if trial.images is None else skip + trial.images
    x = protocol.images(images.pixels[skip:stop].float() / images.white)
    network, x = _in_precision(victim.network, x, trial.precision)
    model = protocol.model(network).to(x.dtype)
    if trial.scale != 1.0:
        model = _Scaled(model, trial.scale)
    return network, model, x, images.labels[skip:stop]


class _Scaled(nn.Module):
    """A model whose logits are multiplied."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) to (N, C)."""
        logits: Tensor = self.model(x) * self.factor
        return logits


def _in_precision(network: nn.Module, x: Tensor, precision: str) -> tuple[nn.Module, Tensor]:
    """Network and images, as doubles where that is asked for; autocast is the attack's own."""
    return (deepcopy(network).double(), x.double()) if precision == "float64" else (network, x)
