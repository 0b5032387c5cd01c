"""Multi-layer perceptrons of any widths."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from backpass.errors import BackpassError
from backpass.models.activations import activation as make_activation
from backpass.models.initialisation import initialise
from backpass.models.normalize import Normalize
from backpass.models.shapes import Shape

__all__ = ["mlp"]


def mlp(
    shape: Shape,
    classes: int,
    generator: torch.Generator,
    *,
    widths: Sequence[int] = (400, 200, 100),
    activation: str = "relu",
    batch_norm: bool = False,
) -> nn.Sequential:
    r"""Perceptron :math:`W_L\,\sigma(W_{L-1} \cdots \sigma(W_1 x))` with biases.

    Args:
        shape: (C, H, W) of one image.
        classes: number of logits.
        generator: source of the initial weights.
        widths: widths of the hidden layers, at least one.
        activation: name of every activation.
        batch_norm: put batch normalisation before every activation.

    Returns:
        A module from images (N, C, H, W) in [0, 1] to logits (N, classes).

    Raises:
        BackpassError: there is no hidden layer, or a width is below 1.
        UnknownNameError: the activation is unknown.

    Source: Li et al. (arXiv 2112.11018), Section 4.2.2 (784-400-200-100-10).
    """
    if not widths or min(widths) < 1:
        raise BackpassError(f"an MLP needs at least one hidden width, all positive, got {tuple(widths)}.")
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=Normalize(shape[0]), flatten=nn.Flatten())
    for index, (fan_in, fan_out) in enumerate(pairwise((math.prod(shape), *widths)), start=1):
        layers[f"linear{index}"] = nn.Linear(fan_in, fan_out)
        if batch_norm:
            layers[f"bn{index}"] = nn.BatchNorm1d(fan_out)
        layers[f"act{index}"] = make_activation(activation)
    layers[f"linear{len(widths) + 1}"] = nn.Linear(widths[-1], classes)
    model = nn.Sequential(layers)
    initialise(model, generator)
    return model
