"""MobileNetV2 (Sandler, Howard, Zhu, Zhmoginov, Chen, CVPR 2018, Table 2) for 32x32 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backpass.models.activations import activation as make_activation
from backpass.models.initialisation import initialise
from backpass.models.normalize import Normalize
from backpass.models.shapes import Shape

__all__ = ["MobileNetV2", "mobilenetv2"]

_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, blocks, stride; the second stage has stride 2 on ImageNet and 1 on 32x32 images."""


def _convolution(
    channels: int, out: int, size: int, activation: str, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, size, stride=stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), make_activation(activation))


class _InvertedResidual(nn.Module):
    """y = x + f(x), or f(x) where the shape changes: widen, a 3x3 convolution in each channel, narrow linearly."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int, activation: str) -> None:
        super().__init__()
        wide = channels * expansion
        self.adds = stride == 1 and channels == out
        self.conv = nn.Sequential(
            *([_convolution(channels, wide, 1, activation)] if expansion != 1 else []),
            _convolution(wide, wide, 3, activation, stride=stride, groups=wide),
            nn.Conv2d(wide, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.adds else out


class MobileNetV2(nn.Module):
    """A convolution, seventeen inverted residuals ``features.1`` to ``features.17``, a convolution, a linear layer.

    Layers and weights have torchvision's names.
    """

    def __init__(self, shape: Shape, classes: int, activation: str) -> None:
        super().__init__()
        self.normalize = Normalize(shape[0])
        channels = 32
        layers: list[nn.Module] = [_convolution(shape[0], channels, 3, activation)]
        for expansion, out, count, stride in _STAGES:
            for index in range(count):
                layers.append(_InvertedResidual(channels, out, 1 if index else stride, expansion, activation))
                channels = out
        layers.append(_convolution(channels, 1280, 1, activation))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        out: Tensor = self.classifier(self.avgpool(self.features(self.normalize(x))).flatten(1))
        return out


def mobilenetv2(shape: Shape, classes: int, generator: torch.Generator, *, activation: str = "relu6") -> MobileNetV2:
    """`MobileNetV2`, 35 activations, with He-normal convolutions and linear weights N(0, 0.01^2)."""
    model = MobileNetV2(shape, classes, activation)
    initialise(model, generator, fan="fan_out", linear="small")
    return model
