"""Attacks on trained networks with a rule's gradients: success by image, halvings of the step, transfer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backpass.attacks import Attack, evaluate, transfer
from backpass.errors import BackpassError
from backpass.experiments.experiment import Context, Measurement, Outcome, Runs
from backpass.experiments.victims import Victim, load_victim
from backpass.lab.placement_search import choose_start, is_automatic
from backpass.lab.placements import parse_rule_for
from backpass.lab.plans import make_plans
from backpass.lab.protocols import make_protocol
from backpass.models.weights import weights_hash
from backpass.numbers import fraction_text
from backpass.report.proportions import marks, rate_of
from backpass.rules import LinBP, Rule

__all__ = [
    "FOOLED",
    "FOOLED_IMAGES",
    "HALVINGS",
    "Transfer",
    "Trial",
    "attack_images",
    "find_halvings",
    "halving",
    "transfer_images",
]

_BATCH = 500
HALVINGS = 4
"""Number of halvings whose iterations are reported."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One attack on one network.

    Attributes:
        victim: network to attack.
        rule: text form of the backward rule used for the attack's gradients. ``linbp:start=paper`` is the paper's
            placement in this network, ``linbp:start=auto`` the best one on as many images after those attacked.
        attack: text form of the attack.
        eps: radius in the units of the protocol.
        protocol: ``paper`` (normalised space) or ``standard`` (pixels in [0, 1]).
        images: number of test images, the first ones; None: all.
        precision: precision of the search: ``float32``, ``bfloat16`` (autocast) or ``float64``.
        scale: factor of the logits, above 0. Decisions stay, but a large factor saturates the cross-entropy.
    """

    victim: Victim
    rule: str = "bp"
    attack: str
    eps: float
    protocol: str = "paper"
    images: int | None = None
    precision: str = "float32"
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.attack}, eps {fraction_text(self.eps)}, {self.protocol} protocol"


@dataclass(frozen=True, kw_only=True)
class Transfer(Trial):
    """One attack on one network, and the networks that its images are shown to.

    Attributes:
        targets: networks that judge the images.
        networks: number of seeds. Seed s is judged by targets of the seed (s + 1) modulo this number.
    """

    targets: tuple[Victim, ...]
    networks: int


class _Prepared(NamedTuple):
    """Objects of a trial: what the attack sees, and the network in it to which rules are attached."""

    network: nn.Module
    model: nn.Module
    x: Tensor
    y: Tensor
    attack: Attack


def attack_images(trial: Trial, seed: int, context: Context) -> Outcome:
    """Attack the images of a trial.

    Returns:
        ``fooled``, the images fooled in per cent of those that the network classifies correctly; ``images``, a mark
        for each: ``1`` fooled, ``0`` not fooled, ``-`` wrong when clean; ``rule`` as used; ``weights``, their hash.

    Raises:
        BackpassError: ``start=auto`` has no images to choose on.
    """
    network, model, x, y, attack = _prepare(trial, seed, context)
    rule = _rule(trial, seed, context)
    with rule.attach(network):
        report = evaluate(model, (x, y), attack, batch_size=_BATCH)
    (record,) = report.attacks.values()
    images = marks(record.success, report.correct)
    return {"fooled": _percent(images), "images": images, "rule": str(rule), "weights": weights_hash(network)}


def find_halvings(trial: Trial, seed: int, context: Context) -> Outcome:
    """Run Auto-PGD to its last step on every image that is right when clean, fooled or not.

    Returns:
        ``halvings``, by image the iterations at which the step was halved; ``iterations`` and ``shares``, by halving
        the mean iteration and the per cent of the images that have it; ``weights``, their hash.

    Raises:
        BackpassError: the attack is another than Auto-PGD.
    """
    network, model, x, y, attack = _prepare(trial, seed, context)
    attack = replace(attack, early_stop=False)
    found: list[list[int]] = []
    with _rule(trial, seed, context).attach(network):
        for first in range(0, len(x), _BATCH):
            images, labels = (part[first : first + _BATCH].to(context.device) for part in (x, y))
            with torch.no_grad():
                right = (model(images).argmax(1) == labels).nonzero().squeeze(1)
            if len(right) == 0:
                continue
            halvings = attack(model, images[right], labels[right], indices=right + first).halvings
            if halvings is None:
                raise BackpassError(f"only apgd halves its steps, got {trial.attack!r}.")
            found += [[at for at in row if at >= 0] for row in halvings.tolist()]
    having = [[row[nth] for row in found if len(row) > nth] for nth in range(HALVINGS)]
    return {
        "halvings": found,
        "iterations": [_mean(some) for some in having],
        "shares": [100 * len(some) / len(found) if found else math.nan for some in having],
        "weights": weights_hash(network),
    }


def transfer_images(settings: Transfer, seed: int, context: Context) -> Outcome:
    """Attack one network to the last step, and show the images to networks of the next seed.

    Returns:
        ``source`` and, by name, each target: the images fooled in per cent of those that it classifies correctly;
        ``images of`` each: the marks of `attack_images`; ``weights``, the hash of the source's.

    Raises:
        BackpassError: there are fewer than two seeds.
    """
    if settings.networks < 2:
        raise BackpassError(f"transfer needs networks of at least two seeds, got {settings.networks}.")
    network, model, x, y, attack = _prepare(settings, seed, context)
    other = (seed + 1) % settings.networks
    targets = {one.model: load_victim(one, other, context).subject.model for one in settings.targets}
    # An image that barely fools the source transfers worst, so every search has all its steps.
    with _rule(settings, seed, context).attach(network):
        report = transfer({"": model}, {"source": model, **targets}, (x, y), replace(attack, early_stop=False))
    images = {name: marks(fooled, report.correct[name]) for name, fooled in report.fooled[""].items()}
    return {
        **{name: _percent(some) for name, some in images.items()},
        **{f"images of {name}": some for name, some in images.items()},
        "weights": weights_hash(network),
    }


FOOLED = Measurement(label="images fooled", unit="percentage points", key="fooled")
"""Measurement of `attack_images`, one number per network."""

FOOLED_IMAGES = Measurement(label="images fooled", unit="percentage points", key="images", images=True)
"""Images fooled, image by image, for comparisons over the images of few networks."""


def halving(nth: int, word: str) -> Measurement:
    """Return the measurement of the nth halving's mean iteration, from 0.

    Two arms are compared over the images that have this halving in both.
    """

    def pair(ours: Runs, theirs: Runs) -> tuple[list[float], list[float]]:
        found: tuple[list[float], list[float]] = ([], [])
        for a, b in zip(ours.runs, theirs.runs, strict=True):
            rows = zip(a["halvings"], b["halvings"], strict=True)
            both = [(p[nth], q[nth]) for p, q in rows if min(len(p), len(q)) > nth]
            found[0].append(_mean([p for p, _ in both]))
            found[1].append(_mean([q for _, q in both]))
        return found

    return Measurement(label=f"mean iteration of the {word} halving", key="iterations", at=nth, pair=pair)


def _prepare(trial: Trial, seed: int, context: Context, skip: int = 0) -> _Prepared:
    """Return the objects of a trial, with as many images after the first `skip`."""
    subject, _, test = load_victim(trial.victim, seed, context)
    protocol = make_protocol(trial.protocol, test.name, None)
    (plan,) = make_plans([trial.attack], [trial.eps], {}, protocol)
    chosen = slice(skip, None if trial.images is None else skip + trial.images)
    pixels = test.images.pixels[chosen].float() / test.images.white
    dtype = torch.float64 if trial.precision == "float64" else torch.float32
    model = protocol.model(subject.model).to(dtype)
    return _Prepared(
        network=subject.network,
        model=model if trial.scale == 1.0 else _Scaled(model, trial.scale),
        x=protocol.images(pixels).to(dtype),
        y=test.images.labels[chosen],
        attack=replace(plan.attack, dtype=torch.bfloat16 if trial.precision == "bfloat16" else None),
    )


def _rule(trial: Trial, seed: int, context: Context) -> Rule:
    """Return the rule, with ``start=auto`` replaced by the start that does best on the images after the trial's."""
    rule = parse_rule_for(trial.victim.model, trial.rule)
    if not (isinstance(rule, LinBP) and is_automatic(rule)):
        return rule
    if trial.images is None:
        raise BackpassError("linbp:start=auto chooses on test images that are not attacked: set images to fewer.")
    network, model, x, y, attack = _prepare(trial, seed, context, skip=trial.images)
    return choose_start(rule, network, x, y, attack, model=model, batch_size=_BATCH).rule


def _percent(images: str) -> float:
    return 100 * rate_of(images).value


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


class _Scaled(nn.Module):
    """A model whose logits are multiplied by a factor."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, ...) to (N, C)."""
        logits: Tensor = self.model(x) * self.factor
        return logits
