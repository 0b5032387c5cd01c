"""Transfer of adversarial digits between two small networks, trained from different initial weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from backpass.attacks import PGD, transfer
from backpass.data import load_digits
from backpass.experiments.experiment import Context, Outcome
from backpass.models import build
from backpass.models.shapes import check_shape
from backpass.rules import parse_rule
from backpass.training import Trainer

__all__ = ["DigitTransfer", "attack_digits"]


@dataclass(frozen=True, kw_only=True)
class DigitTransfer:
    """Settings.

    Attributes:
        rule: text form of the rule for the gradients of the attack.
        source: text form of the attacked network.
        target: text form of the evaluated network.
        epochs: epochs of AdamW with a one-cycle schedule, for both networks.
        batch_size: images per step.
        rate: largest learning rate.
        eps: radii of PGD, with steps of eps / 5 and one random start.
        steps: steps of PGD.
        images: number of attacked images, the first of the held-out ones.
    """

    rule: str = "bp"
    source: str = "resnet:width=8"
    target: str = "cnn"
    epochs: int = 8
    batch_size: int = 64
    rate: float = 3e-3
    eps: tuple[float, ...] = (0.1, 0.15, 0.2)
    steps: int = 10
    images: int = 200


def attack_digits(settings: DigitTransfer, seed: int, context: Context) -> Outcome:
    """Return the percentage of the target's correctly classified images that are fooled, by radius."""
    source, target = _networks(replace(settings, rule="bp"), seed)
    test = load_digits().test
    images = test.x[: settings.images], test.y[: settings.images]
    fooled = []
    for eps in settings.eps:
        attack = PGD(eps=eps, step=eps / 5, steps=settings.steps, restarts=1, seed=seed)
        with parse_rule(settings.rule).attach(source):
            fooled.append(100 * transfer({"": source}, {"": target}, images, attack).rates[""][""].value)
    return {"fooled": fooled}


@lru_cache(maxsize=8)  # the arms of all rules attack the same networks
def _networks(settings: DigitTransfer, seed: int) -> tuple[nn.Module, nn.Module]:
    return _trained(settings.source, settings, 2 * seed), _trained(settings.target, settings, 2 * seed + 1)


def _trained(name: str, settings: DigitTransfer, seed: int) -> nn.Module:
    split = load_digits()
    model = build(name, shape=check_shape(tuple(split.train.pixels.shape[1:])), classes=split.classes, seed=seed)
    Trainer(
        model,
        torch.optim.AdamW(model.parameters(), settings.rate),
        (split.train.x, split.train.y),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        scheduler="one-cycle",
        seed=seed,
    ).fit()
    return model.eval()
