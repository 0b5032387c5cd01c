"""Networks that the experiments on LinBP's attacks share: small ones, and those of Li et al., arXiv 2112.11018."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from backpass.experiments.experiment import Arm, Measurement
from backpass.experiments.victims import Victim, describe_data, describe_victim

__all__ = [
    "DESCRIPTION",
    "LARGE",
    "LARGE_SEEDS",
    "OVER_NETWORKS",
    "PAIRED_NETWORKS",
    "PAPER",
    "SEEDS",
    "SMALL_CNN",
    "SMALL_RESNET",
    "described",
    "large",
    "network_arms",
    "slug",
]

PAPER = "Li et al., arXiv 2112.11018"
OVER_NETWORKS = (
    "Lines are means over networks that were trained with different seeds, bands their 95 % intervals. Rates are of "
    "the images that a network classifies correctly."
)
PAIRED_NETWORKS = (
    "A pair is one trained network, attacked with both gradients: the same images, random starts and steps. Intervals "
    "are Student's t over the networks."
)

SMALL_CNN = Victim(model="cnn", limit=4000, epochs=10, lr=0.02, augment="flip")
SMALL_RESNET = Victim(model="resnet:width=8", limit=5000, epochs=12, augment="flip")
SEEDS = (0, 1, 2, 3, 4)


def large(model: str) -> Victim:
    """Return one of the paper's networks, trained on all images to the end."""
    return Victim(model=model, epochs=200, batch_size=128, augment="crop,flip", dtype="bfloat16")


LARGE = (
    *map(large, ("vgg16", "resnet50", "densenet161", "mobilenetv2")),
    replace(large("wrn-28-10"), epochs=100, adversary="pgd:eps=8/255,step=2/255,steps=10"),
)
"""The paper's networks. The last is trained on adversarial examples; the paper takes one from RobustBench."""

LARGE_SEEDS = (0, 1, 2)

DESCRIPTION = (
    Measurement(label="loss on training images", unit="nats", key="train loss"),
    Measurement(label="accuracy on training images", unit="%", key="train accuracy"),
    Measurement(label="accuracy on test images", unit="%", key="test accuracy"),
)
"""Measurements of the arms of `network_arms`."""


def network_arms(victims: Sequence[Victim]) -> list[Arm]:
    """Return the arms that describe the attacked networks, each once, in a group of their own."""
    different = list(dict.fromkeys(victims))
    names = [one.model for one in different]
    return [
        Arm(name=one.model if names.count(one.model) == 1 else f"{one.model}, training {place}", work=describe_victim,
            candidates={"": one}, group="The networks")
        for place, one in enumerate(different, 1)
    ]  # fmt: skip


def described(victims: Sequence[Victim]) -> Callable[[], str]:
    """Return a function that describes the data of these networks."""
    return lambda: describe_data(victims)


def slug(text: str) -> str:
    """Return letters, digits and hyphens, for the id of a claim."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
