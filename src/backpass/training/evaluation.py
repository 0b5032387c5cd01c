"""Clean loss and accuracy on the evaluation set, and what `robust` measures there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from backpass.errors import BackpassError
from backpass.preserved import preserved
from backpass.training.batches import unit_interval
from backpass.training.objective import Loss, correct
from backpass.training.processes import from_first, rank, summed, world
from backpass.training.settings import Settings
from backpass.training.sources import Source

__all__ = ["Evaluation"]


class Evaluation:
    """Judges a model in eval mode and leaves it as it was: flags, running statistics, gradients, random numbers.

    Args:
        settings: of the run.
        model: as it is called in one process.
        plain: suspends the rules.
        autocast: the precision.
    """

    def __init__(
        self,
        settings: Settings,
        model: nn.Module,
        plain: Callable[[], AbstractContextManager[object]],
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._settings, self._model, self._plain, self._autocast = settings, model, plain, autocast
        self._loss: Loss = getattr(settings.objective, "losses", _cross_entropy)

    def __call__(self, source: Source) -> dict[str, float]:
        """Mean loss and, where it is classification, accuracy in [0, 1], over all samples."""
        with preserved(self._model), torch.no_grad(), self._plain(), self._autocast():
            _share_buffers(self._model)
            sums = torch.zeros(3, dtype=torch.float64, device=self._settings.device)
            for x, y in self._read(source):
                output = self._model(x)
                right = correct(output, y)
                losses = self._loss(output, y).double().sum()
                known = torch.zeros_like(sums[1]) if right is None else right.sum()
                sums += torch.stack([losses, known, torch.full_like(losses, float(right is not None))])
            loss, hits, classified = summed(sums).tolist()
        means = {"loss": loss / len(source)}
        return {**means, "accuracy": hits / len(source)} if classified else means

    def robust(self, source: Source) -> dict[str, Any]:
        """What `robust` gives on the evaluation set, in process 0; the others wait."""
        tensors, function = source.tensors, self._settings.robust
        assert tensors is not None  # noqa: S101  the settings are checked
        assert function is not None  # noqa: S101
        x, y = (one.to(self._settings.device) for one in tensors)
        with preserved(self._model), self._plain():
            _share_buffers(self._model)
            return from_first(lambda: _numbers(function(self._model, self._prepare(x), y)))

    def _read(self, source: Source) -> Iterator[tuple[Tensor, Tensor]]:
        first, last = (len(source) * place // world() for place in (rank(), rank() + 1))
        size = -(-self._settings.batch_size // world())
        rows = [torch.arange(start, min(start + size, last)) for start in range(first, last, size)]
        for x, y in source.read(rows, 0, self._settings.device, 0):
            yield self._prepare(x), y

    def _prepare(self, x: Tensor) -> Tensor:
        if self._settings.prepare_evaluation is not None:
            return self._settings.prepare_evaluation(x)
        return unit_interval(x)


def _cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y, reduction="none")


def _numbers(measured: object) -> dict[str, float]:
    if isinstance(measured, Mapping):
        try:
            return {str(name): float(value) for name, value in measured.items()}
        except (TypeError, ValueError, RuntimeError):
            pass  # the message below says it
    raise BackpassError(f"robust gives a dict of numbers, such as {{'robust_accuracy': 0.4}}; got {measured!r}.")


def _share_buffers(model: nn.Module) -> None:
    """All processes take the running statistics of process 0, which are those of checkpoints."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
