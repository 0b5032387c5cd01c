"""The activation functions as torch knows them, and how to compute each out of place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "activation_of", "is_in_place"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An elementwise activation function.

    Attributes:
        name: its name in a site table.
        compute: its value from the input and the parameters, by aten operators: a mode further out counts these
            as no call of the activation.
        parameters: names and defaults of the arguments between the input and ``inplace``.
    """

    name: str
    compute: Callable[..., Tensor]
    parameters: tuple[tuple[str, Any], ...] = ()


_TANH_OR_ERF = (("approximate", "none"),)
_RANGE = (("min_val", -1.0), ("max_val", 1.0))


def _gelu(x: Tensor, approximate: str) -> Tensor:
    return aten.gelu(x, approximate=approximate)  # type: ignore[no-any-return]


def _relu6(x: Tensor) -> Tensor:
    return aten.hardtanh(x, 0.0, 6.0)  # type: ignore[no-any-return]


_NAMED: tuple[Activation, ...] = (
    Activation("relu", aten.relu),
    Activation("relu6", _relu6),
    Activation("leaky_relu", aten.leaky_relu, (("negative_slope", 0.01),)),
    Activation("prelu", aten.prelu, (("weight", None),)),
    Activation("elu", aten.elu, (("alpha", 1.0),)),
    Activation("celu", aten.celu, (("alpha", 1.0),)),
    Activation("selu", aten.selu),
    Activation("silu", aten.silu),
    Activation("gelu", _gelu, _TANH_OR_ERF),
    Activation("mish", aten.mish),
    Activation("softplus", aten.softplus, (("beta", 1.0), ("threshold", 20.0))),
    Activation("hardswish", aten.hardswish),
    Activation("hardtanh", aten.hardtanh, _RANGE),
    Activation("hardsigmoid", aten.hardsigmoid),
    Activation("threshold", aten.threshold, (("threshold", 0.0), ("value", 0.0))),
    Activation("tanh", aten.tanh),
    Activation("sigmoid", aten.sigmoid),
)


def _everywhere(activation: Activation) -> dict[Callable[..., Any], Activation]:
    """Every torch function that computes the activation: functional, builtin, method, and in place."""
    places = (F, torch, torch.Tensor, torch.special, torch._C._nn)
    names = [activation.name, activation.name + "_"]
    if activation.name == "sigmoid":
        names.append("expit")
    found = (getattr(place, name, None) for place in places for name in names)
    return {function: activation for function in found if callable(function)}


_BY_FUNCTION = {function: activation for named in _NAMED for function, activation in _everywhere(named).items()}

ACTIVATIONS: Mapping[Callable[..., Any], str] = {
    function: activation.name for function, activation in _BY_FUNCTION.items()
}
"""The torch functions that are activations, and the name of each."""

_IN_PLACE = frozenset(function for function in _BY_FUNCTION if function.__name__.endswith("_"))


def activation_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Activation, Tensor, tuple[Any, ...]]:
    """The activation that a call computes, its input, and its parameters in order."""
    activation = _BY_FUNCTION[func]
    given = list(args[1:])
    parameters = tuple(
        given[position] if position < len(given) else kwargs.get(name, default)
        for position, (name, default) in enumerate(activation.parameters)
    )
    x = args[0] if args else kwargs["input"]
    return activation, x, parameters


def is_in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call overwrites its input: by its name, or by ``inplace=True``."""
    position = 1 + len(_BY_FUNCTION[func].parameters)
    return func in _IN_PLACE or bool(kwargs.get("inplace", args[position] if len(args) > position else False))
