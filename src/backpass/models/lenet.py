"""LeNet-5 (LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document recognition, 1998)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from backpass.models.activations import activation as make_activation
from backpass.models.initialisation import initialise
from backpass.models.normalize import Normalize
from backpass.models.shapes import Shape, require_side

__all__ = ["lenet5"]

_PAPER_SIDE = 32  # LeCun et al. set digits of 28x28 pixels into fields of 32x32


def lenet5(shape: Shape, classes: int, generator: torch.Generator, *, activation: str = "relu") -> nn.Sequential:
    """Two 5x5 convolutions of 6 and 16 maps, each pooled, and linear layers of 120, 84 and ``classes``.

    Images below 32x32 pixels are padded by two zeros on every side in the first convolution, which makes 32x32 of
    MNIST's 28x28. As is usual now it has ReLU, max pooling, and a linear output layer, where the paper has tanh,
    trained averages, and radial basis functions.
    """
    require_side("lenet5", shape, 12)
    padding = 2 if min(shape[1:]) < _PAPER_SIDE else 0
    height, width = (((side + 2 * padding - 4) // 2 - 4) // 2 for side in shape[1:])
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalize=Normalize(shape[0]),
        conv1=nn.Conv2d(shape[0], 6, 5, padding=padding),
        act1=make_activation(activation),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(6, 16, 5),
        act2=make_activation(activation),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        linear1=nn.Linear(16 * height * width, 120),
        act3=make_activation(activation),
        linear2=nn.Linear(120, 84),
        act4=make_activation(activation),
        linear3=nn.Linear(84, classes),
    )
    model = nn.Sequential(layers)
    initialise(model, generator)
    return model
