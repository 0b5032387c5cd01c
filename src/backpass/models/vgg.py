"""VGG-16 with batch normalisation (Simonyan, Zisserman, arXiv 1409.1556, Table 1 D) for 32x32 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backpass.models.activations import activation as make_activation
from backpass.models.initialisation import initialise
from backpass.models.normalize import Normalize
from backpass.models.shapes import Shape, require_side

__all__ = ["VGG", "vgg16"]

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """Thirteen 3x3 convolutions in five stages, each stage pooled, and linear layers of 4096, 4096 and ``classes``.

    Layers and weights have the names of torchvision's ``vgg16_bn``. A 32x32 image becomes one pixel of 512 channels
    before the linear layers.
    """

    def __init__(self, shape: Shape, classes: int, activation: str) -> None:
        super().__init__()
        self.normalize = Normalize(shape[0])
        layers: list[nn.Module] = []
        channels = shape[0]
        for stage in _STAGES:
            for out in stage:
                convolution = nn.Conv2d(channels, out, 3, padding=1)
                layers += [convolution, nn.BatchNorm2d(out), make_activation(activation)]
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(channels, 4096),
            make_activation(activation),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            make_activation(activation),
            nn.Dropout(),
            nn.Linear(4096, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        out: Tensor = self.classifier(self.avgpool(self.features(self.normalize(x))).flatten(1))
        return out


def vgg16(shape: Shape, classes: int, generator: torch.Generator, *, activation: str = "relu") -> VGG:
    """`VGG`, 15 activations, with He-normal convolutions and linear weights N(0, 0.01^2)."""
    require_side("vgg16", shape, 32)
    model = VGG(shape, classes, activation)
    initialise(model, generator, fan="fan_out", linear="small")
    return model
