"""Networks by name: from images in [0, 1] to logits, with weights that a seed determines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from backpass.data.normalisation import Normalisation
from backpass.errors import BackpassError, UnknownNameError
from backpass.models.cnn import cnn
from backpass.models.convnet import convnet
from backpass.models.densenet import densenet161
from backpass.models.lenet import lenet5
from backpass.models.mlp import mlp
from backpass.models.mobilenet import mobilenetv2
from backpass.models.normalize import Normalize
from backpass.models.resnet import resnet, resnet18, resnet50
from backpass.models.shapes import Shape, check_shape
from backpass.models.text import options_of, read_model
from backpass.models.vgg import vgg16
from backpass.models.whitened import whitened
from backpass.models.wide_resnet import wide_resnet, wrn_28_10

__all__ = ["INPUT_SHAPES", "MODELS", "Normalize", "build"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn": cnn,
    "convnet": convnet,
    "densenet161": densenet161,
    "lenet5": lenet5,
    "mlp": mlp,
    "mobilenetv2": mobilenetv2,
    "resnet": resnet,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vgg16": vgg16,
    "whitened": whitened,
    "wrn": wide_resnet,
    "wrn-28-10": wrn_28_10,
}
"""Networks by name.

Each function takes the shape (C, H, W) of one image, the number of classes, a generator for the initial weights and
keyword options, among them ``activation``, the name of every activation. The network maps images (N, C, H, W) in [0, 1]
to logits (N, classes). Too small images raise `BackpassError`, unknown activations `UnknownNameError`.
"""

_SMALL, _MNIST, _CIFAR = (1, 8, 8), (1, 28, 28), (3, 32, 32)

INPUT_SHAPES: dict[str, Shape] = {
    name: {"cnn": _SMALL, "mlp": _SMALL, "lenet5": _MNIST}.get(name, _CIFAR) for name in MODELS
}
"""Default shape (C, H, W) of one image of a network."""


def build(
    name: str,
    *,
    shape: tuple[int, ...] | None = None,
    classes: int = 10,
    normalisation: Normalisation | None = None,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Build a network with seeded weights.

    Args:
        name: one of `MODELS`, also with options: ``"resnet18:activation=silu"``.
        shape: (C, H, W) of one image; None: that of `INPUT_SHAPES`.
        classes: number of logits.
        normalisation: normalisation by the first layer, `Normalize`; None: mean 0 and standard deviation 1.
        seed: seed of the weights; the global random state is not touched.
        **options: options of this network, such as ``activation="silu"``; they override those in ``name``.

    Raises:
        UnknownNameError: the network, option or activation is unknown.
        BackpassError: an option is out of range, the images are too small for the network, or the normalisation has
            another number of channels.
    """
    name, given = read_model(name, MODELS)
    for option in options:
        if option not in options_of(MODELS[name]):
            raise UnknownNameError(f"option of model {name!r}", option, options_of(MODELS[name]))
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise BackpassError(f"a network needs a whole number of classes, at least 1, got {classes!r}.")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the layers' own initialisation draws from the global state
        model = MODELS[name](check_shape(shape or INPUT_SHAPES[name]), classes, generator, **{**given, **options})
    if normalisation is not None:
        for module in model.modules():
            if isinstance(module, Normalize):
                module.use(normalisation)
    return model
