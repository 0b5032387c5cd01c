"""Guided backpropagation."""

from dataclasses import dataclass

from torch import Tensor

from backpass.rules import ActivationRule, activations

__all__ = ["Guided"]


@dataclass(frozen=True, kw_only=True)
class Guided(ActivationRule):
    """y = relu(x) forward, exactly; dL/dx = max(dL/dy, 0) where x > 0, and 0 elsewhere.

    Source: Springenberg, Dosovitskiy, Brox, Riedmiller, Striving for simplicity (2015), section 3.4.
    """

    name = "guided"
    functions = activations("relu")

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """Of what plain backpropagation passes on, the part that raises the output."""
        return grad.clamp(min=0) * (x > 0)
