"""The objective on the two halves of a batch, for schedulers that measure gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.rules import unwrap
from backpass.training.batches import Batch
from backpass.training.half_batches import on_halves
from backpass.training.objective import Evaluated

__all__ = ["Measuring", "halves"]


@runtime_checkable
class Measuring(Protocol):
    """Scheduler that measures the objective before a step.

    Attributes:
        due: measure before the next step.

    An attribute ``frozen_curvature``, if it is there and true, accepts the curvature at fixed adversarial examples
    where they move with the parameters.
    """

    due: bool

    def measure(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Measure the objective on halves of the batch."""


def halves(
    evaluated: Evaluated,
    batch: Batch,
    model: nn.Module,
    autocast: Callable[[], AbstractContextManager[object]],
    *,
    frozen_curvature: bool = False,
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return two functions, each the scalar objective on one half of this process's batch, with graph.

    Adversarial examples are not searched again; rules are suspended; running statistics and random numbers are
    restored.

    Raises:
        BackpassError: the objective cannot be evaluated again, its examples move with the parameters, or there is no
            second half.
    """
    again = evaluated.again
    if again is None:
        raise BackpassError(
            "this scheduler measures on halves of a batch, so the objective has to give Evaluated(again=...), a "
            "function (model, rows) -> the mean loss on some rows of the batch."
        )
    if evaluated.moves and not frozen_curvature:
        raise BackpassError(
            "the adversarial examples of this objective move with the parameters: the curvature at fixed examples is "
            "not that of training, and the trainer cannot differentiate through the attack. Use an l_inf attack, whose "
            "steps are signs; or a loop with half_losses(model, loss, x, y, adversary=InnerLoop(...)); or accept the "
            "difference by ControlledLR(..., frozen_curvature=True)."
        )
    if len(batch) < 2:
        raise BackpassError("this scheduler measures on halves of a batch: batch_size must be at least 2 per process.")
    # Without its wrappers: a schedule may differentiate twice, which compiled code cannot.
    inner = unwrap(model)

    def evaluate(rows: slice) -> Tensor:
        with autocast():
            return again(inner, rows)

    return on_halves(inner, len(batch), evaluate)
