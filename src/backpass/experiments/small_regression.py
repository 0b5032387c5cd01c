"""Linear regression on four fixed points, with the adversary on the inputs: small enough for an exact oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backpass.errors import BackpassError

__all__ = ["PROBLEMS", "Regression", "choose", "squared_loss"]


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Four points, and a box that the chain stays close to.

    Attributes:
        inputs: x, four rows.
        targets: y, four numbers.
        start: theta at time 0.
        bounds: the box, (low, high) per parameter.
        nodes: of the oracle's grid, per dimension.
    """

    inputs: tuple[tuple[float, ...], ...]
    targets: tuple[float, ...]
    start: tuple[float, ...]
    bounds: tuple[tuple[float, float], ...]
    nodes: int

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        """X (4, d) and y (4,), float64."""
        return torch.tensor(self.inputs, dtype=torch.float64), torch.tensor(self.targets, dtype=torch.float64)


_TARGETS = (0.5, 0.3, 1.0, -0.2)

PROBLEMS: dict[int, Regression] = {
    1: Regression(
        inputs=((0.6,), (1.0,), (1.2,), (0.8,)),
        targets=_TARGETS,
        start=(1.0,),
        bounds=((-0.8, 1.6),),
        nodes=18,
    ),
    2: Regression(
        inputs=((1.0, 0.4), (-0.5, 0.9), (0.8, -0.6), (0.3, 0.7)),
        targets=_TARGETS,
        start=(1.0, 0.7),
        bounds=((-0.3, 1.3), (-0.3, 1.3)),
        nodes=12,
    ),
}
"""The problems by their number of parameters."""


def choose(dimension: int) -> Regression:
    """The problem with that many parameters.

    Raises:
        BackpassError: there is none.
    """
    if dimension not in PROBLEMS:
        raise BackpassError(f"the exact oracle works in one or two dimensions, got {dimension}.")
    return PROBLEMS[dimension]


def squared_loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(x . theta - y)^2 / 2 of every sample."""
    return (x @ theta - y).square() / 2
