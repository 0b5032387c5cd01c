"""Projected gradient descent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from backpass.attacks.iterative import Iterative
from backpass.attacks.oracle import Oracle
from backpass.attacks.settings import count

__all__ = ["PGD"]


@dataclass(frozen=True, kw_only=True)
class PGD(Iterative):
    """Projected gradient ascent with random restarts, z_{k+1} = project(z_k + step * direction(grad loss(z_k))).

    The direction is sign(g) for l_inf and g / |g|_2 for l_2. Returned is, of every sample, the first image found to
    fool the model, or else the last one of the restart that ends with the largest loss.
    Source: Madry et al., Towards deep learning models resistant to adversarial attacks (2018), section 2.1.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> result = PGD(eps=0.1, step=0.05, steps=4)(model, torch.rand(5, 1, 2, 2), torch.zeros(5).long())
        >>> result.x_adv.shape, result.success.shape
        (torch.Size([5, 1, 2, 2]), torch.Size([5]))
    """

    restarts: int = count(5)
    random_start: bool = True

    def direction(self, oracle: Oracle, gradient: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Steepest ascent, without memory."""
        return oracle.threat.direction(gradient), None
