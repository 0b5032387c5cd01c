"""Staircase-sign FGSM."""

from dataclasses import dataclass

from torch import Tensor

from backpass.attacks import Iterative
from backpass.attacks.settings import count

__all__ = ["SSFGSM"]


@dataclass(frozen=True, kw_only=True)
class SSFGSM(Iterative):
    """z <- project(z + step * sign(g) * w), w larger where |g| is: images that transfer better than by the sign alone.

    An entry on stair k = 0, ..., K - 1 of its image, by the rank of |g|, has the weight w = (2 k + 1) / K.

    Args:
        stairs: K.

    Source: Gao et al., Staircase sign method for boosting adversarial attacks (2021).
    """

    stairs: int = count(64)

    def direction(self, oracle, gradient: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weighted sign of the gradient (B, ...)."""
        rank = gradient.abs().flatten(1).argsort(1).argsort(1).view_as(gradient)
        stair = rank * self.stairs // gradient[0].numel()
        return gradient.sign() * ((2 * stair + 1) / self.stairs).to(gradient.dtype), None
