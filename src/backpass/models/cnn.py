"""A small convolutional network for small images."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from backpass.models.activations import activation as make_activation
from backpass.models.initialisation import initialise
from backpass.models.normalize import Normalize
from backpass.models.shapes import Shape, require_side

__all__ = ["cnn"]


def cnn(
    shape: Shape,
    classes: int,
    generator: torch.Generator,
    *,
    width: int = 16,
    activation: str = "relu",
    batch_norm: bool = False,
) -> nn.Sequential:
    """Three 3x3 convolutions, two poolings, two linear layers: four activations in all.

    Args:
        shape: (C, H, W) of one image, at least 4x4.
        classes: number of logits.
        generator: source of the initial weights.
        width: channels of the first two convolutions; the third has twice as many.
        activation: name of every activation.
        batch_norm: put batch normalisation before every activation.

    Returns:
        A module from images (N, C, H, W) in [0, 1] to logits (N, classes).

    Raises:
        BackpassError: the images are too small.
        UnknownNameError: the activation is unknown.
    """
    require_side("cnn", shape, 4)
    channels, height, breadth = shape
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=Normalize(channels))

    def add(index: int, name: str, layer: nn.Module, norm: nn.Module) -> None:
        layers[name] = layer
        if batch_norm:
            layers[f"bn{index}"] = norm
        layers[f"act{index}"] = make_activation(activation)

    add(1, "conv1", nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width))
    add(2, "conv2", nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
    layers["pool1"] = nn.MaxPool2d(2)
    add(3, "conv3", nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width))
    layers["pool2"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    add(4, "linear1", nn.Linear(2 * width * (height // 4) * (breadth // 4), 64), nn.BatchNorm1d(64))
    layers["linear2"] = nn.Linear(64, classes)
    model = nn.Sequential(layers)
    initialise(model, generator)
    return model
