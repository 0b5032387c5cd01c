"""What the paper trains, on which images and how, and the same in small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from backpass.lab.bench.images import Source
from backpass.lab.bench.training import Run

__all__ = ["CIFAR10", "MNIST", "Network", "Training"]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of a figure.

    Attributes:
        model: the text form of a network of the lab.
        rule: LinBP, placed in this network.
        rate: the learning rate.
        epochs: passes over the images.
    """

    model: str
    rule: str = "linbp:start=paper"
    rate: float
    epochs: int


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings of one figure.

    Attributes:
        source: of the images.
        networks: by the name in the report.
        per_epoch: how often a network is judged in each epoch.
        judged: at most so many images of each part are judged; ``None``: all.
        seeds: how many runs of each kind.
        batch: images per step.
        optimizer: the text form of an optimizer.
        schedule: the text form of a scheduler; empty for a constant rate.
        augment: random crops and mirror images.
        normalise: whether the images are standardised by channel.
    """

    source: Source
    networks: Mapping[str, Network]
    per_epoch: int = 1
    judged: int | None = None
    seeds: int = 3
    batch: int = 64
    optimizer: str = "sgd"
    schedule: str = ""
    augment: bool = False
    normalise: bool = False

    def run(self, one: Network, rule: str, marks: tuple[int, ...], seed: int, *, unit: bool = False) -> Run:
        """One of its runs.

        Args:
            one: the network.
            rule: the text form of a rule.
            marks: the numbers of steps after which the network is judged.
            seed: of the run.
            unit: scale the gradient of every weight tensor to l2 norm 1.
        """
        return Run(
            model=one.model,
            rule=rule,
            optimizer=self.optimizer,
            rate=one.rate,
            schedule=self.schedule,
            batch=self.batch,
            marks=marks,
            judged=self.judged,
            seed=seed,
            unit=unit,
            augment=self.augment,
            normalise=self.normalise,
        )


_SLOWLY = "exponential:gamma=0.98"
_RESIDUAL = Network(
    model="resnet:blocks=1-1-1,width=4,bottleneck=true", rule="linbp:start=layer3", rate=0.005, epochs=4
)
_CONVOLUTIONAL = Network(model="cnn:width=8", rule="linbp:start=-2", rate=0.005, epochs=4)

MNIST = {
    "small": Training(
        source=Source(data="mnist", test=2000),
        networks={
            "MLP": Network(model="mlp", rate=0.001, epochs=10),
            "LeNet-5": Network(model="lenet5", rate=0.005, epochs=3),
        },
        per_epoch=2,
        judged=2000,
        seeds=6,
        schedule=_SLOWLY,
    ),
    "paper": Training(
        source=Source(data="mnist"),
        networks={
            "MLP": Network(model="mlp", rate=0.001, epochs=50),
            "LeNet-5": Network(model="lenet5", rate=0.005, epochs=50),
        },
        seeds=5,
        schedule=_SLOWLY,
    ),
}
"""Figures 5 and 6, by scale. Epochs, schedule and raw pixels are those of the released code."""

_BIG = Training(
    source=Source(data="cifar10"),
    networks={
        "ResNet-50": Network(model="resnet50", rate=0.005, epochs=100),
        "DenseNet-161": Network(model="densenet161", rate=0.005, epochs=100),
        "MobileNetV2": Network(model="mobilenetv2", rate=0.005, epochs=100),
    },
    judged=10_000,
    batch=128,
    optimizer="sgd:momentum=0.9,weight_decay=5e-4",
    augment=True,
    normalise=True,
)
_LITTLE = replace(
    _BIG,
    source=Source(data="cifar10", train=3000, test=2000),
    networks={"Small ResNet": _RESIDUAL, "Small CNN": _CONVOLUTIONAL},
    judged=2000,
    seeds=6,
    batch=32,  # four times the steps that 128 make, without which such short a training would not begin to learn
)

CIFAR10 = {
    "cosine": {
        # As in the released code the cosine is twice as long as the training, so that the rate ends at one half.
        "small": replace(_LITTLE, schedule="cosine:epochs=8"),
        "paper": replace(_BIG, schedule="cosine:epochs=200"),
    },
    "exponential": {
        # 0.98 after each of 100 epochs is 0.6 after each of 4.
        "small": replace(_LITTLE, networks={"Small ResNet": _RESIDUAL}, schedule="exponential:gamma=0.6"),
        "paper": replace(_BIG, schedule=_SLOWLY),
    },
}
"""Figures 7 and 8, and Figure 10, by scale. Rate, momentum, weight decay and batch are those of the released code."""
