"""Initial weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

__all__ = ["initialise"]


def initialise(
    model: nn.Module,
    generator: torch.Generator,
    *,
    fan: Literal["fan_in", "fan_out"] = "fan_in",
    linear: Literal["he", "small", "uniform"] = "he",
) -> None:
    r"""Draw the weights of linear layers and convolutions; set their biases to 0.

    Convolutions: :math:`W \sim N(0, 2/\mathrm{fan})`. Linear layers the same with ``"he"``, :math:`N(0, 0.01^2)` with
    ``"small"``, uniform in :math:`\pm 1/\sqrt{\mathrm{fan\_in}}` with ``"uniform"``.

    Args:
        model: network, changed in place.
        generator: source of randomness; layers draw from it in the order of ``model.modules()``.
        fan: fan of the convolutions, and of linear layers with ``"he"``.
        linear: distribution of the weights of linear layers.

    Source: He, Zhang, Ren, Sun, Delving deep into rectifiers (ICCV 2015), Eq. 10 and 14.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and linear == "small":
            nn.init.normal_(module.weight, std=0.01, generator=generator)
        elif isinstance(module, nn.Linear) and linear == "uniform":
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu", generator=generator)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
