"""ResNets (He, Zhang, Ren, Sun, Deep residual learning, CVPR 2016) for small images, and smaller ones of any depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.models.activations import activation as make_activation
from backpass.models.initialisation import initialise
from backpass.models.normalize import Normalize
from backpass.models.shapes import Shape

__all__ = ["ResNet", "resnet", "resnet18", "resnet50"]


class _Block(nn.Module):
    """y = s(shortcut(x) + f(x)); the shortcut is the identity, or a 1x1 convolution where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.downsample = nn.Sequential()
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))


class _Basic(_Block):
    """f: two 3x3 convolutions."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, activation: str) -> None:
        super().__init__(channels, width, stride)
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = make_activation(activation)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        out: Tensor = self.act2(h + self.downsample(x))
        return out


class _Bottleneck(_Block):
    """f: a 1x1 convolution, a 3x3 one, and a 1x1 one to four times as many channels."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, activation: str) -> None:
        super().__init__(channels, 4 * width, stride)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = make_activation(activation)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = make_activation(activation)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.act3 = make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.bn1(self.conv1(x)))
        h = self.bn3(self.conv3(self.act2(self.bn2(self.conv2(h)))))
        out: Tensor = self.act3(h + self.downsample(x))
        return out


class ResNet(nn.Module):
    """A 3x3 convolution, stages ``layer1``, ``layer2``, ... of residual blocks, an average, a linear layer.

    Each further stage doubles the width and halves the image. Layers and weights have torchvision's names.

    Args:
        shape: (C, H, W) of one image.
        classes: number of logits.
        bottleneck: use blocks of three convolutions instead of two.
        blocks: number of blocks of each stage.
        width: channels of the first stage.
        pooled: put a max pooling before the first stage.
        activation: name of every activation.

    Raises:
        BackpassError: a number of blocks, or the width, is below 1.
        UnknownNameError: the activation is unknown.
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        *,
        bottleneck: bool,
        blocks: Sequence[int],
        width: int,
        pooled: bool,
        activation: str,
    ) -> None:
        super().__init__()
        if not blocks or min(blocks) < 1 or width < 1:
            raise BackpassError(
                f"a ResNet needs at least one stage, blocks in each and a width, all positive; got blocks "
                f"{tuple(blocks)} and width {width}."
            )
        block = _Bottleneck if bottleneck else _Basic
        self.normalize = Normalize(shape[0])
        self.conv1 = nn.Conv2d(shape[0], width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = make_activation(activation)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if pooled else nn.Identity()
        channels, self.stages = width, len(blocks)
        for stage, count in enumerate(blocks):
            layers = []
            for index in range(count):
                layers.append(block(channels, width << stage, 2 if stage and not index else 1, activation))
                channels = (width << stage) * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(self.normalize(x)))))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        out: Tensor = self.fc(self.avgpool(x).flatten(1))
        return out


def resnet18(shape: Shape, classes: int, generator: torch.Generator, *, activation: str = "relu") -> ResNet:
    """Four stages of two basic blocks, 17 activations; 3x3 instead of 7x7 at the front, as usual for 32x32 images."""
    return _large((2, 2, 2, 2), False, shape, classes, generator, activation)


def resnet50(shape: Shape, classes: int, generator: torch.Generator, *, activation: str = "relu") -> ResNet:
    """Four stages of 3, 4, 6 and 3 bottleneck blocks, 49 activations; otherwise as `resnet18`."""
    return _large((3, 4, 6, 3), True, shape, classes, generator, activation)


def resnet(
    shape: Shape,
    classes: int,
    generator: torch.Generator,
    *,
    blocks: Sequence[int] = (1, 1, 1),
    width: int = 16,
    bottleneck: bool = False,
    activation: str = "relu",
) -> ResNet:
    """A ResNet of any depth without pooling at the front; ``blocks=(3, 3, 3)`` is the paper's ResNet-20.

    Args:
        shape: (C, H, W) of one image.
        classes: number of logits.
        generator: source of the initial weights.
        blocks: number of residual blocks of each stage.
        width: channels of the first stage; each further stage has twice as many.
        bottleneck: use blocks of three convolutions, whose outputs have four times as many channels, instead of two.
        activation: name of every activation.

    Raises:
        BackpassError: a number is below 1.

    Source: He et al., Section 4.2.
    """
    model = ResNet(
        shape, classes, bottleneck=bottleneck, blocks=blocks, width=width, pooled=False, activation=activation
    )
    initialise(model, generator, fan="fan_out", linear="uniform")
    return model


def _large(
    blocks: Sequence[int], bottleneck: bool, shape: Shape, classes: int, generator: torch.Generator, activation: str
) -> ResNet:
    model = ResNet(shape, classes, bottleneck=bottleneck, blocks=blocks, width=64, pooled=True, activation=activation)
    initialise(model, generator, fan="fan_out", linear="uniform")
    return model
