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
    """A scheduler that looks at the objective before a step.

    Attributes:
        due: whether it wants to before the next step.
    """

    due: bool

    def measure(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Take in the objective on halves of the batch."""


def halves(
    evaluated: Evaluated,
    batch: Batch,
    model: nn.Module,
    autocast: Callable[[], AbstractContextManager[object]],
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Two functions, each the scalar objective on one half of this process's batch, with graph.

    What the objective searched for stays as it is; rules are suspended; running statistics and random numbers are
    left as they were.

    Raises:
        BackpassError: the objective cannot be evaluated again, or there is no second half.
    """
    again = evaluated.again
    if again is None:
        raise BackpassError(
            "this scheduler measures on halves of a batch, so the objective has to give Evaluated(again=...), a "
            "function (model, rows) -> the mean loss on some rows of the batch."
        )
    if len(batch) < 2:
        raise BackpassError("this scheduler measures on halves of a batch: batch_size must be at least 2 per process.")
    # Without its wrappers: a schedule may differentiate twice, which compiled code cannot.
    inner = unwrap(model)

    def evaluate(rows: slice) -> Tensor:
        with autocast():
            return again(inner, rows)

    return on_halves(inner, len(batch), evaluate)
