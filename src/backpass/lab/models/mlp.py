"""Multi-layer perceptrons of any widths."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from backpass.errors import BackpassError
from backpass.lab.models.activations import activation as make_activation

__all__ = ["mlp"]


def mlp(widths: Sequence[int] = (64, 128, 128, 128, 10), activation: str = "relu") -> nn.Sequential:
    r"""A perceptron :math:`W_L\,\sigma(W_{L-1} \cdots \sigma(W_1 x))` with biases.

    Args:
        widths: (pixels of the image, hidden widths ..., classes).
        activation: the name of the activation between the layers.

    Returns:
        A module from images (N, C, H, W), C*H*W = widths[0], to logits (N, widths[-1]).

    Raises:
        BackpassError: there are fewer than two widths, or one is below 1.
        UnknownNameError: no activation has this name.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise BackpassError(f"an MLP needs at least an input and an output width, all positive, got {tuple(widths)}.")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
        layers[f"linear{index}"] = nn.Linear(fan_in, fan_out)
        if index < len(widths) - 1:
            layers[f"act{index}"] = make_activation(activation)
    return nn.Sequential(layers)
