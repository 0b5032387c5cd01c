"""Networks by name: images in, logits out, the same weights for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from backpass.errors import UnknownNameError
from backpass.lab.models.cnn import cnn
from backpass.lab.models.mlp import mlp

__all__ = ["INPUT_SHAPES", "MODELS", "build", "cnn", "mlp"]

MODELS: dict[str, Callable[..., nn.Module]] = {"cnn": cnn, "mlp": mlp}

INPUT_SHAPES: dict[str, tuple[int, int, int]] = {"cnn": (1, 8, 8), "mlp": (1, 8, 8)}
"""The shape (C, H, W) of one image that a network takes with its default options."""


def build(name: str, *, seed: int = 0, **options: Any) -> nn.Module:
    """A network with seeded weights: He-normal with zero biases.

    Args:
        name: one of `MODELS`.
        seed: of the weights; the global random state is not touched.
        **options: passed to the network's own function, for instance ``activation="silu"``.

    Raises:
        UnknownNameError: no network has this name.
    """
    if name not in MODELS:
        raise UnknownNameError("model", name, MODELS)
    with torch.random.fork_rng(devices=[]):  # the layers' own initialisation draws from the global state
        model = MODELS[name](**options)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
