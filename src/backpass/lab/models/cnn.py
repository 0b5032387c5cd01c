"""A small convolutional network for 8x8 images."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from backpass.lab.models.activations import activation as make_activation

__all__ = ["cnn"]


def cnn(channels: int = 1, classes: int = 10, activation: str = "relu", width: int = 16) -> nn.Sequential:
    """Three 3x3 convolutions, two poolings, two linear layers: four activations in all.

    Args:
        channels: of the image.
        classes: the number of logits.
        activation: the name of the activation.
        width: channels of the first two convolutions; the third has twice as many.

    Returns:
        A module from images (N, channels, 8, 8) to logits (N, classes).

    Raises:
        UnknownNameError: no activation has this name.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, width, 3, padding=1),
        act1=make_activation(activation),
        conv2=nn.Conv2d(width, width, 3, padding=1),
        act2=make_activation(activation),
        pool1=nn.MaxPool2d(2),
        conv3=nn.Conv2d(width, 2 * width, 3, padding=1),
        act3=make_activation(activation),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        linear1=nn.Linear(2 * width * 4, 64),
        act4=make_activation(activation),
        linear2=nn.Linear(64, classes),
    )
    return nn.Sequential(layers)
