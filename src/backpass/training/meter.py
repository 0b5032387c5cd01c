"""Accumulation of losses, accuracy and metrics, and the divergence criterion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from backpass.training.processes import summed, world

__all__ = ["Divergence", "Meter"]


class Meter:
    """Accumulate the numbers of steps and epochs on the device, so that no step synchronises with it.

    Args:
        device: device of the numbers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.forget_epoch()
        self._clear()

    def _clear(self) -> None:
        self._names: list[str] = []
        self._scalars: list[Tensor] = []  # of all steps, one after the other, in the order of the names
        self._correct: list[Tensor] = []
        self._counts: list[int] = []

    def forget_epoch(self) -> None:
        """Reset the sums of the epoch."""
        self._sums: dict[str, float] = {}
        self._samples, self._steps = 0, 0

    def add(self, scalars: Mapping[str, Tensor], correct: Sequence[Tensor], samples: int) -> None:
        """Add one step.

        Args:
            scalars: ``loss`` and the objective's metrics, detached; their mean over the processes is the batch's.
            correct: (B,) bool of this process's parts, or nothing.
            samples: number of samples of the step over all processes.
        """
        self._names = list(scalars)
        self._scalars += scalars.values()
        self._correct += correct
        self._counts.append(samples)

    def read(self) -> tuple[dict[str, float], list[float]]:
        """Return the numbers of the steps since the last reading, and the loss of each.

        Loss and metrics are means over the steps; accuracy, of a classifier, over the samples. Every process calls
        this after the same steps.
        """
        numbers = summed(torch.cat([self._stacked(), self._hits()[None]])).tolist()
        hits, steps, samples = numbers.pop(), len(self._counts), sum(self._counts)
        columns = {
            name: [value / world() for value in numbers[place :: len(self._names)]]
            for place, name in enumerate(self._names)
        }
        losses = columns.pop("loss")
        means = {name: math.fsum(column) / steps for name, column in columns.items()}
        sums = {"loss": math.fsum(map(float.__mul__, losses, map(float, self._counts)))}
        sums |= {name: math.fsum(column) for name, column in columns.items()}
        record = {"loss": math.fsum(losses) / steps}
        if self._correct:
            sums["accuracy"] = hits
            record["accuracy"] = hits / samples
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._samples, self._steps = self._samples + samples, self._steps + steps
        self._clear()
        return {**record, **means}, losses

    def epoch(self) -> dict[str, float]:
        """Return the means of the epoch: of loss and accuracy over samples, of metrics over steps."""
        over = {"loss": self._samples, "accuracy": self._samples}
        return {name: value / over.get(name, self._steps) for name, value in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch's sums, and this process's steps that were not read yet."""
        return {
            "epoch": [self._sums, self._samples, self._steps],
            "names": self._names,
            "scalars": self._stacked().cpu(),
            "correct": self._hits().cpu() if self._correct else None,
            "counts": self._counts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        sums, self._samples, self._steps = state["epoch"]
        self._sums, self._names, self._counts = dict(sums), list(state["names"]), list(state["counts"])
        self._scalars = list(state["scalars"].to(self._device))
        self._correct = [] if state["correct"] is None else [state["correct"].to(self._device)[None]]

    def _stacked(self) -> Tensor:
        if len({one.dtype for one in self._scalars}) > 1:
            self._scalars = [one.double() for one in self._scalars]
        return torch.stack(self._scalars).double() if self._scalars else self._zeros(0)

    def _hits(self) -> Tensor:
        return torch.cat(self._correct).sum(dtype=torch.float64) if self._correct else self._zeros()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self._device)


class Divergence:
    """Divergence criterion: a loss or gradient is not finite, or the mean loss is far above the first one.

    The threshold is ``factor`` times the larger of the first step's loss and 1, in the mean over one record of
    the log. The floor of 1 keeps a run that starts near 0 (fine-tuning) from being stopped by noise.

    Args:
        factor: factor above 1; None checks only that numbers are finite.
    """

    def __init__(self, factor: float | None) -> None:
        self._factor = factor
        self.first: float | None = None

    def check(self, losses: Sequence[float], last_step: int, gradient_norm: float | None) -> str | None:
        """Return the reason for which the run has diverged, or None.

        Args:
            losses: losses of the steps since the last check, at least one.
            last_step: number of the last of them, counted from 1.
            gradient_norm: gradient norm of the last of them, if known.
        """
        first_step = last_step - len(losses) + 1
        for step, loss in enumerate(losses, first_step):
            if not math.isfinite(loss):
                return f"the loss of step {step} is {loss}"
        if gradient_norm is not None and not math.isfinite(gradient_norm):
            return f"the gradient of step {last_step} is not finite"
        if self.first is None:
            self.first = losses[0]
        mean = math.fsum(losses) / len(losses)
        if self._factor is not None and mean > self._factor * max(self.first, 1.0):
            return (
                f"the mean loss of steps {first_step} to {last_step} is {mean:.4g}, more than {self._factor:g} times "
                f"max(1, first loss {self.first:.4g})"
            )
        return None
