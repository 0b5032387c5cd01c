"""A network that diverges under semi-implicit steps, told by its steps: not finite, or far out of all proportion."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backpass.errors import BackpassError
from backpass.rules.semi_implicit.single_use import SingleUse

__all__ = ["DivergedError", "StepSizes"]

_JUMP = 1e3
"""Steps outgrow their weights by a factor near 1 in any training that learns, and by 1e5 where one explodes."""


class DivergedError(BackpassError):
    """A semi-implicit step is not finite, or so large that the network cannot be said to train any more."""


class StepSizes:
    """The lengths of the steps of an attached model's weights.

    What is compared has the unit of the weights on both sides, so no scale of loss, data or weights matters.

    Args:
        uses: knows the weights' names.
    """

    def __init__(self, uses: SingleUse) -> None:
        self._uses = uses
        self._longest: dict[str, float] = {}

    def admit(self, weight: Tensor, step: Tensor, learning: Tensor, eta: float) -> None:
        """Let a step pass.

        Args:
            weight: of the layer.
            step: of the weight; of the bias where that learns alone.
            learning: what ``step`` is for.
            eta: for the message.

        Raises:
            DivergedError: the step is not finite, or a thousand times as long as what it is for and as every step
                before. The first step has none before and passes, as it may where weights start from zero.
        """
        length = float(torch.linalg.vector_norm(step))
        if not math.isfinite(length):
            raise self.not_finite(weight, eta)
        name = self._uses.name(weight)
        if name is None:
            return
        longest = self._longest.get(name, 0.0)
        if longest and length > _JUMP * longest:
            size = max(longest, float(torch.linalg.vector_norm(learning.detach())))
            if length > _JUMP * size:
                raise DivergedError(
                    f"the semi-implicit step of the layer of {name!r} is {length / size:.1e} times as long as its "
                    f"weights and as every step before, {_advice(eta)}"
                )
        self._longest[name] = max(length, longest)

    def not_finite(self, weight: Tensor, eta: float) -> DivergedError:
        """What to raise for a layer whose step is not finite."""
        return DivergedError(
            f"{self._uses.describe(weight)} has no finite semi-implicit step: its input or its gradient is inf or NaN, "
            f"or its step overflows, {_advice(eta)}"
        )


def _advice(eta: float) -> str:
    return (
        f"so the network has diverged. eta is {eta:g}; about 1 / (number of layers) is usually stable (eta=None takes "
        "that), and a larger lam shortens the steps. Look at the losses of the steps before."
    )
