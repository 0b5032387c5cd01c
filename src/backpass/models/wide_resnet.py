"""Wide ResNets (Zagoruyko, Komodakis, arXiv 1605.07146, Table 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.models.activations import activation as make_activation
from backpass.models.initialisation import initialise
from backpass.models.normalize import Normalize
from backpass.models.shapes import Shape

__all__ = ["WideResNet", "wide_resnet", "wrn_28_10"]


class _PreActivated(nn.Module):
    """y = x + f(x), f: twice BN, activation and a 3x3 convolution; where the shape changes, y = A a(x) + f(x)."""

    def __init__(self, channels: int, out: int, stride: int, activation: str) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = make_activation(activation)
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.act2 = make_activation(activation)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels != out:
            self.shortcut = nn.Conv2d(channels, out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.bn1(x))
        beside: Tensor = x if self.shortcut is None else self.shortcut(h)
        out: Tensor = beside + self.conv2(self.act2(self.bn2(self.conv1(h))))
        return out


class WideResNet(nn.Module):
    """A 3x3 convolution to 16 channels, three stages of ``(depth - 4) / 6`` blocks, BN, activation, a linear layer.

    Args:
        shape: (C, H, W) of one image.
        classes: number of logits.
        depth: 6 n + 4, the number of convolutions.
        width: factor of the stages' 16, 32 and 64 channels.
        activation: name of every activation.

    Raises:
        BackpassError: the depth is not 6 n + 4, or the width is below 1.
        UnknownNameError: the activation is unknown.
    """

    def __init__(self, shape: Shape, classes: int, *, depth: int, width: int, activation: str) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise BackpassError(
                f"a wide ResNet has depth 10, 16, 22, 28, ... and a width of at least 1; got {depth} and {width}."
            )
        self.normalize = Normalize(shape[0])
        self.conv1 = nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)
        channels = 16
        stages = []
        for out, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            blocks = []
            for index in range((depth - 4) // 6):
                blocks.append(_PreActivated(channels, out, 1 if index else stride, activation))
                channels = out
            stages.append(nn.Sequential(*blocks))
        self.block1, self.block2, self.block3 = stages
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = make_activation(activation)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        x = self.block3(self.block2(self.block1(self.conv1(self.normalize(x)))))
        out: Tensor = self.fc(self.avgpool(self.act(self.bn1(x))).flatten(1))
        return out


def wide_resnet(
    shape: Shape,
    classes: int,
    generator: torch.Generator,
    *,
    depth: int = 16,
    width: int = 4,
    activation: str = "relu",
) -> WideResNet:
    """A `WideResNet` of any depth and width, with He-normal convolutions.

    Args:
        shape: (C, H, W) of one image.
        classes: number of logits.
        generator: source of the initial weights.
        depth: 10, 16, 22, 28, ...
        width: factor of the channels.
        activation: name of every activation.

    Raises:
        BackpassError: the depth is not 6 n + 4, or the width is below 1.
        UnknownNameError: the activation is unknown.
    """
    model = WideResNet(shape, classes, depth=depth, width=width, activation=activation)
    initialise(model, generator, fan="fan_out", linear="uniform")
    return model


def wrn_28_10(shape: Shape, classes: int, generator: torch.Generator, *, activation: str = "relu") -> WideResNet:
    """WRN-28-10: 25 activations."""
    return wide_resnet(shape, classes, generator, depth=28, width=10, activation=activation)
