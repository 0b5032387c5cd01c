"""The conditions under which LinBP's white-box attacks are compared, small and at the paper's size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from backpass.lab.bench.experiment import Experiment
from backpass.lab.experiments.linbp.networks import LARGE, LARGE_SEEDS, SMALL_CNN, SMALL_RESNET
from backpass.lab.experiments.linbp.success import PAPER
from backpass.lab.experiments.linbp.trials import Trial
from backpass.lab.experiments.linbp.victims import Training
from backpass.lab.experiments.linbp.white_box import Condition, WhiteBox, measure

__all__ = ["EXPERIMENTS"]

_MNIST_STD = 0.3081  # of a pixel: the length of one normalised unit


class _From:
    """Conditions that differ from one by a thing at a time."""

    def __init__(self, base: Condition) -> None:
        self.base = base

    def other(self, factor: str, value: str, *, rule: str | None = None, **changes: Any) -> Condition:
        """Another network (fields of `Training`) or another placement."""
        training = replace(self.base.training, **changes)
        return replace(self.base, factor=factor, value=value, training=training, rule=rule or self.base.rule)

    def attack(self, factor: str, value: str, **changes: Any) -> Condition:
        """Another attack (fields of `Trial`)."""
        return replace(self.base, factor=factor, value=value, trial=replace(self.base.trial, **changes))


def _pgd(steps: int, step: float, more: str = "") -> str:
    return f"pgd:steps={steps},restarts=1,step={step:g}{more}"


def _small() -> WhiteBox:
    images, eps = 200, 0.1
    base = Condition(
        factor="base",
        value="three layers of 100",
        training=Training(model="mlp:widths=100-100-100", data="mnist", limit=4000, epochs=10),
        rule="linbp:start=-2",
        trial=Trial(attack=_pgd(10, eps / 4), eps=eps, protocol="standard", images=images),
    )
    a = _From(base)
    papers = Trial(attack="pgd:steps=10,restarts=1", eps=8 / 255, protocol="paper", images=images)
    return WhiteBox(
        conditions=(
            base,
            a.other("depth", "one layer", model="mlp:widths=100", rule="linbp:start=-1"),
            a.other("depth", "six layers", model="mlp:widths=100-100-100-100-100-100"),
            a.other("width", "20", model="mlp:widths=20-20-20"),
            a.other("width", "400", model="mlp:widths=400-400-400"),
            a.other("training", "1 epoch", epochs=1),
            a.other("training", "40 epochs", epochs=40),
            a.other("weight decay", "0", weight_decay=0.0),
            a.other("weight decay", "0.005", weight_decay=0.005),
            a.other("normalisation", "of every batch", model=f"{base.training.model},batch_norm=true"),
            a.attack(
                "normalisation",
                "of images, as in the paper",
                protocol="paper",
                eps=eps / 2 / _MNIST_STD,
                attack=_pgd(10, eps / 4 / _MNIST_STD),
            ),
            a.other("placement", "last site", rule="linbp:start=-1"),
            a.other("placement", "all sites", rule="linbp"),
            a.other("placement", "chosen on other images", rule="linbp:start=auto"),
            a.attack("reach of all steps", "half the radius", attack=_pgd(10, eps / 20)),
            a.attack("reach of all steps", "1.25 radii", attack=_pgd(10, eps / 8)),
            a.attack("reach of all steps", "10 radii", attack=_pgd(10, eps)),
            a.attack("steps", "1", attack=_pgd(1, 1.25 * eps)),
            a.attack("steps", "3", attack=_pgd(3, 2.5 * eps / 3)),
            a.attack("steps", "50", attack=_pgd(50, 2.5 * eps / 50)),
            a.attack("loss", "dlr", attack=_pgd(10, eps / 4, ",loss=dlr")),
            a.attack("loss", "margin", attack=_pgd(10, eps / 4, ",loss=margin")),
            a.attack("saturation", "logits times 10", scale=10.0),
            a.attack("saturation", "logits times 100", scale=100.0),
            a.attack("norm", "l2", attack=_pgd(10, 1.5 / 4, ",norm=l2"), eps=1.5),
            a.attack("radius", "0.05", attack=_pgd(10, 0.05 / 4), eps=0.05),
            a.attack("radius", "0.2", attack=_pgd(10, 0.2 / 4), eps=0.2),
            a.attack("precision", "float64", precision="float64"),
            a.attack("precision", "bfloat16", precision="bfloat16"),
            Condition(factor="network", value="CNN, CIFAR-10", training=SMALL_CNN, rule="linbp:start=-1", trial=papers),
            Condition(
                factor="network",
                value="CNN with batch normalisation, CIFAR-10",
                training=replace(SMALL_CNN, model=f"{SMALL_CNN.model}:batch_norm=true"),
                rule="linbp:start=-1",
                trial=papers,
            ),
            Condition(
                factor="network",
                value="ResNet with batch normalisation, CIFAR-10",
                training=SMALL_RESNET,
                rule="linbp:start=layer3",
                trial=papers,
            ),
        )
    )


def _large() -> WhiteBox:
    vgg, resnet = LARGE[:2]
    images, eps = 5000, 8 / 255
    base = Condition(
        factor="base",
        value="ResNet-50",
        training=resnet,
        rule="linbp:start=paper",
        trial=Trial(attack="pgd:steps=10,restarts=5", eps=eps, protocol="paper", images=images, precision="bfloat16"),
    )
    a = _From(base)
    return WhiteBox(
        seeds=LARGE_SEEDS,
        conditions=(
            base,
            a.other("network", "VGG-16", model=vgg.model),
            a.other("network", "MobileNetV2", model="mobilenetv2"),
            a.other("depth", "ResNet-18", model="resnet18", rule="linbp:start=layer4"),
            a.other("training", "5 epochs", epochs=5),
            a.other("training", "30 epochs", epochs=30),
            a.other("training", "no augmentation", augment=""),
            a.other("weight decay", "0", weight_decay=0.0),
            a.other("placement", "last site", rule="linbp:start=-1"),
            a.other("placement", "chosen on other images", rule="linbp:start=auto"),
            a.attack("reach of all steps", "2.5 radii", attack="pgd:steps=10,restarts=5,step=4/255"),
            a.attack("reach of all steps", "10 radii", attack="pgd:steps=10,restarts=5,step=16/255"),
            a.attack("steps", "100", attack="pgd:steps=100,restarts=5"),
            a.attack("restarts", "1", attack="pgd:steps=10,restarts=1"),
            a.attack("loss", "dlr", attack="pgd:steps=10,restarts=5,loss=dlr"),
            a.attack("loss", "margin", attack="pgd:steps=10,restarts=5,loss=margin"),
            a.attack("saturation", "logits times 10", scale=10.0),
            a.attack("precision", "float32", precision="float32"),
            a.attack("protocol", "standard, radius 1/255", protocol="standard", eps=1 / 255,
                     attack="pgd:steps=10,restarts=5,step=0.25/255"),
        )
    )  # fmt: skip


EXPERIMENTS = (
    Experiment(
        name="linbp-white-box",
        title="When does LinBP make the stronger white-box attack?",
        question=(
            "The paper's tables say that it does, everywhere; small checks said that it does not. One thing at a time "
            "is changed: depth, width and normalisation of the network, how long and with how much weight decay it was "
            "trained, where LinBP is placed, how far the steps of the attack reach, how many there are, the loss and "
            "its saturation, the norm, the radius, the precision. Both gradients see the same networks, images and "
            "starts. The experiment linbp-sleeping-units asks the same of networks made for it."
        ),
        source=f"{PAPER}, Section 4.2.1",
        scales={"small": _small(), "paper": _large()},
        measure=measure,
        data=("cifar10", "mnist"),
    ),
)
