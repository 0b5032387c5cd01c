"""The convolutional network of the paper on proximal backpropagation (Frerix et al., ICLR 2018)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from backpass.models.activations import activation as make_activation
from backpass.models.initialisation import initialise
from backpass.models.normalize import Normalize
from backpass.models.shapes import Shape, require_side

__all__ = ["convnet"]


def convnet(shape: Shape, classes: int, generator: torch.Generator, *, activation: str = "relu") -> nn.Sequential:
    """Three 5x5 convolutions of 16, 20 and 20 channels, the first two pooled, and a linear layer.

    Source: Frerix, Moellenhoff, Moeller, Cremers (arXiv 1706.04638), Section 5.
    """
    require_side("convnet", shape, 4)
    channels, height, breadth = shape
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalize=Normalize(channels),
        conv1=nn.Conv2d(channels, 16, 5, padding=2),
        act1=make_activation(activation),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(16, 20, 5, padding=2),
        act2=make_activation(activation),
        pool2=nn.MaxPool2d(2),
        conv3=nn.Conv2d(20, 20, 5, padding=2),
        act3=make_activation(activation),
        flatten=nn.Flatten(),
        linear=nn.Linear(20 * (height // 4) * (breadth // 4), classes),
    )
    model = nn.Sequential(layers)
    initialise(model, generator)
    return model
