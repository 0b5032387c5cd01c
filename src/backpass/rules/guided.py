"""Guided backpropagation and the backward pass of deconvolutional networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from backpass.rules.activation_rule import ActivationRule
from backpass.rules.activations import activations, is_relu

__all__ = ["Deconvnet", "GuidedBackprop"]


@dataclass(frozen=True, kw_only=True)
class GuidedBackprop(ActivationRule):
    """Guided backpropagation: dL/dx = max(dL/dy, 0) where x > 0, and 0 elsewhere, at every ReLU.

    Source: Springenberg, Dosovitskiy, Brox, Riedmiller, "Striving for Simplicity", ICLR workshop 2015, Section 3.4.
    The settings are those of `ActivationRule`.
    """

    name: ClassVar[str] = "guided"
    functions = activations("relu")

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return the positive part of the plain gradient."""
        return grad.clamp(min=0) * (x > 0)


@dataclass(frozen=True, kw_only=True)
class Deconvnet(ActivationRule):
    """Deconvolutional network: dL/dx = max(dL/dy, 0) at every ReLU and ReLU6, whatever the sign of x.

    Source: Zeiler, Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, Section 2.1. The settings
    are those of `ActivationRule`.
    """

    name: ClassVar[str] = "deconvnet"
    functions = activations("relu", "relu6", "hardtanh")
    needs_input: ClassVar[bool] = False

    def covers(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return True if a call is a ReLU; ``nn.ReLU6`` calls hardtanh."""
        return is_relu(func, args, kwargs)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return the positive part of dL/dy."""
        return grad.clamp(min=0)
