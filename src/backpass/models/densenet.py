"""DenseNet-161 (Huang, Liu, van der Maaten, Weinberger, CVPR 2017, Table 1) for 32x32 images."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from backpass.models.activations import activation as make_activation
from backpass.models.initialisation import initialise
from backpass.models.normalize import Normalize
from backpass.models.shapes import Shape, require_side

__all__ = ["DenseNet", "densenet161"]


class _Dense(nn.Module):
    """y = [x, f(x)]: a 1x1 convolution to 4 * growth channels, a 3x3 one to growth, each after BN and activation."""

    def __init__(self, channels: int, growth: int, activation: str) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.act1 = make_activation(activation)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.act2 = make_activation(activation)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.act1(self.norm1(x)))
        return torch.cat([x, self.conv2(self.act2(self.norm2(h)))], 1)


class DenseNet(nn.Module):
    """Dense blocks ``features.denseblock1``, ... with transitions between them that halve channels and image.

    Layers and weights have torchvision's names. The first convolution is 3x3 with stride 1, as usual for small images,
    and is followed by a max pooling.

    Args:
        shape: (C, H, W) of one image.
        classes: number of logits.
        blocks: number of layers of each dense block.
        growth: channels that each layer adds.
        activation: name of every activation.
    """

    def __init__(self, shape: Shape, classes: int, *, blocks: tuple[int, ...], growth: int, activation: str) -> None:
        super().__init__()
        self.normalize = Normalize(shape[0])
        channels = 2 * growth
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(shape[0], channels, 3, padding=1, bias=False),
            norm0=nn.BatchNorm2d(channels),
            act0=make_activation(activation),
            pool0=nn.MaxPool2d(3, stride=2, padding=1),
        )
        for number, count in enumerate(blocks, start=1):
            layers[f"denseblock{number}"] = nn.Sequential(
                OrderedDict(
                    (f"denselayer{i + 1}", _Dense(channels + i * growth, growth, activation)) for i in range(count)
                )
            )
            channels += count * growth
            if number < len(blocks):
                layers[f"transition{number}"] = _transition(channels, activation)
                channels //= 2
        layers["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(layers)
        self.act = make_activation(activation)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        out: Tensor = self.classifier(self.avgpool(self.act(self.features(self.normalize(x)))).flatten(1))
        return out


def _transition(channels: int, activation: str) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        norm=nn.BatchNorm2d(channels),
        act=make_activation(activation),
        conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
        pool=nn.AvgPool2d(2),
    )
    return nn.Sequential(layers)


def densenet161(shape: Shape, classes: int, generator: torch.Generator, *, activation: str = "relu") -> DenseNet:
    """Dense blocks of 6, 12, 36 and 24 layers that add 48 channels each: 161 activations."""
    require_side("densenet161", shape, 16)
    model = DenseNet(shape, classes, blocks=(6, 12, 36, 24), growth=48, activation=activation)
    initialise(model, generator, fan="fan_in", linear="uniform")
    return model
