"""The objective on the two halves of a batch, for schedulers that measure gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.rules import unwrap
from backpass.training.batches import Batch
from backpass.training.objective import Evaluated, Plain

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
    plain: Plain,
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
        raise BackpassError("this scheduler measures on halves of a batch, and the objective gives no `again`.")
    if len(batch) < 2:
        raise BackpassError("this scheduler measures on halves of a batch: batch_size must be at least 2 per process.")
    # Without its wrappers: a schedule may differentiate twice, which compiled code cannot.
    inner = unwrap(model)

    def on(rows: slice) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with _unmoved(inner), plain(), autocast():
                return again(inner, rows)

        return loss

    middle = len(batch) // 2
    return on(slice(0, middle)), on(slice(middle, len(batch)))


@contextmanager
def _unmoved(model: nn.Module) -> Iterator[None]:
    """Inside, the model writes into copies of its buffers; generators are afterwards what they were before.

    Copies, because a graph may need the buffers that it read, as they were.
    """
    places = [(module, name) for module in model.modules() for name, one in module._buffers.items() if one is not None]
    own = [(module, name, module.get_buffer(name)) for module, name in places]
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for module, name, buffer in own:
            module._buffers[name] = buffer.clone()
        try:
            yield
        finally:
            for module, name, buffer in own:
                module._buffers[name] = buffer
