"""Activation functions with explicit derivatives, by aten operators, for use without autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backpass.rules.activations import ACTIVATIONS, Activation, read_call

__all__ = ["Elementwise", "elementwise"]

aten = torch.ops.aten

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def _gelu(ones: Tensor, z: Tensor, approximate: str) -> Any:
    return aten.gelu_backward(ones, z, approximate=approximate)


_DERIVATIVES: Mapping[str, Callable[..., Any]] = {
    "relu": lambda ones, z: aten.threshold_backward(ones, z, 0),
    "relu6": lambda ones, z: aten.hardtanh_backward(ones, z, 0.0, 6.0),
    "leaky_relu": lambda ones, z, slope: aten.leaky_relu_backward(ones, z, slope, False),
    "elu": lambda ones, z, alpha: aten.elu_backward(ones, alpha, 1.0, 1.0, False, z),
    "celu": lambda ones, z, alpha: aten.elu_backward(ones, alpha, 1.0, 1.0 / alpha, False, z),
    "selu": lambda ones, z: aten.elu_backward(ones, _SELU_ALPHA, _SELU_SCALE, 1.0, False, z),
    "silu": aten.silu_backward,
    "gelu": _gelu,
    "mish": aten.mish_backward,
    "softplus": aten.softplus_backward,
    "hardswish": aten.hardswish_backward,
    "hardtanh": aten.hardtanh_backward,
    "hardsigmoid": aten.hardsigmoid_backward,
    "threshold": lambda ones, z, threshold, _: aten.threshold_backward(ones, z, threshold),
    "tanh": lambda ones, z: aten.tanh_backward(ones, aten.tanh(z)),
    "sigmoid": lambda ones, z: aten.sigmoid_backward(ones, aten.sigmoid(z)),
    "logsigmoid": lambda ones, z: ones * aten.sigmoid(-z),
    "softsign": lambda ones, z: ones / (1 + z.abs()).square(),
    "tanhshrink": lambda ones, z: ones * aten.tanh(z).square(),
    "hardshrink": aten.hardshrink_backward,
    "softshrink": aten.softshrink_backward,
}

_PIECEWISE_LINEAR = frozenset(
    ("relu", "relu6", "leaky_relu", "hardtanh", "hardsigmoid", "threshold", "hardshrink", "softshrink")
)

_BY_NAME: Mapping[str, Activation] = {
    name: read_call(function, (None,), {})[0] for function, name in ACTIVATIONS.items()
}


@dataclass(frozen=True)
class Elementwise:
    """An activation function s with fixed parameters.

    Attributes:
        name: its name in a site table.
        numbers: its parameters as numbers, which a compiled graph can store; 1 stands for gelu's ``"tanh"``.
    """

    name: str
    numbers: tuple[float, ...] = ()

    @property
    def has_kinks(self) -> bool:
        """True if s is piecewise linear, so that a Gauss-Newton model does not see its kinks."""
        return self.name in _PIECEWISE_LINEAR

    def value(self, z: Tensor) -> Tensor:
        """Return s(z) for z of any shape."""
        return _BY_NAME[self.name].compute(z, *self._parameters())

    def derivative(self, z: Tensor) -> Tensor:
        """Return s'(z), with the convention of autograd at kinks."""
        return self.backward(torch.ones_like(z), z)

    def backward(self, grad: Tensor, z: Tensor) -> Tensor:
        """Return s'(z) * grad."""
        product: Tensor = _DERIVATIVES[self.name](grad, z, *self._parameters())
        return product

    def _parameters(self) -> tuple[Any, ...]:
        if self.name == "gelu":
            return ("tanh" if self.numbers[0] else "none",)
        return self.numbers


def elementwise(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Elementwise, Tensor, bool] | None:
    """Return (s, input, True if in place) of an activation call; None for learned or random activations."""
    activation, z, parameters, in_place = read_call(func, args, kwargs)
    if activation.name == "gelu":
        return Elementwise("gelu", (float(parameters[0] == "tanh"),)), z, in_place
    if activation.name not in _DERIVATIVES or any(isinstance(p, Tensor) for p in parameters):
        return None
    return Elementwise(activation.name, tuple(float(p) for p in parameters)), z, in_place
