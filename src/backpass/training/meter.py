"""Numbers of the steps since the last record, read from the device once per record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backpass.training.processes import summed, world

__all__ = ["Meter", "Reading", "Totals"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Numbers of the steps since the last record, over all processes.

    Attributes:
        losses: mean loss of each step's batch.
        counts: samples of each step.
        correct: number of samples classified correctly, before their step; None without classification.
        metrics: metrics of the objective, each the mean over the steps.
    """

    losses: list[float]
    counts: list[int]
    correct: int | None
    metrics: dict[str, float]

    @property
    def loss(self) -> float:
        """Mean loss over the steps."""
        return math.fsum(self.losses) / len(self.losses)

    @property
    def accuracy(self) -> float | None:
        """Accuracy in [0, 1], or None."""
        return None if self.correct is None else self.correct / sum(self.counts)


class Totals:
    """The readings of an epoch, added up."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Reset all sums."""
        self._sums: dict[str, float] = {"loss": 0.0}
        self._samples, self._steps, self._correct, self._classified = 0, 0, 0, False

    def add(self, reading: Reading) -> None:
        """Add one reading."""
        losses = zip(reading.losses, reading.counts, strict=True)
        self._sums["loss"] += math.fsum(loss * count for loss, count in losses)
        for name, value in reading.metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * len(reading.losses)
        self._samples += sum(reading.counts)
        self._steps += len(reading.losses)
        self._correct += reading.correct or 0
        self._classified = self._classified or reading.correct is not None

    def means(self) -> dict[str, float]:
        """Return the means of loss and accuracy over samples, and of metrics over steps."""
        means = {name: value / self._steps for name, value in self._sums.items()}
        means["loss"] = self._sums["loss"] / self._samples
        return {**means, "accuracy": self._correct / self._samples} if self._classified else means

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "sums": dict(self._sums),
            "samples": self._samples,
            "steps": self._steps,
            "correct": self._correct,
            "classified": self._classified,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._sums = dict(state["sums"])
        self._samples, self._steps = state["samples"], state["steps"]
        self._correct, self._classified = state["correct"], state["classified"]


class Meter:
    """Keeps each step's numbers on the device until they are read, so that no step waits for the device.

    Args:
        device: where the numbers are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._clear()

    def _clear(self) -> None:
        self._names: list[str] = []
        self._scalars: list[Tensor] = []  # of all steps, one after the other, in the order of the names
        self._correct: list[Tensor] = []
        self._counts: list[int] = []
        self._restored: tuple[Tensor, int] | None = None  # scalars (steps, names) and correct answers

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, scalars: Mapping[str, Tensor], correct: Sequence[Tensor], samples: int) -> None:
        """Add one step.

        Args:
            scalars: ``loss`` and the objective's metrics; their mean over the processes is that of the batch.
            correct: (B,) bool of this process's parts, or nothing.
            samples: of the step, over all processes.
        """
        self._names = list(scalars)
        self._scalars += [value.detach() for value in scalars.values()]
        self._correct += correct
        self._counts.append(samples)

    def read(self) -> Reading:
        """Return the numbers of all steps since the last reading. Every process calls this after the same steps."""
        scalars, correct, classified = self._local()
        everything = summed(torch.cat([scalars.flatten(), correct[None]])).tolist()
        right, steps = int(everything.pop()), len(scalars)
        columns = {name: everything[place :: len(self._names)] for place, name in enumerate(self._names)}
        means = {name: [value / world() for value in column] for name, column in columns.items()}
        reading = Reading(
            losses=means.pop("loss"),
            counts=self._counts,
            correct=right if classified else None,
            metrics={name: math.fsum(column) / steps for name, column in means.items()},
        )
        self._clear()
        return reading

    def state_dict(self) -> dict[str, Any]:
        """Return this process's steps that were not read yet."""
        if not self._counts:
            return {}
        scalars, correct, classified = self._local()
        return {
            "names": self._names,
            "scalars": scalars.cpu(),
            "correct": int(correct) if classified else None,
            "counts": self._counts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._clear()
        if state:
            self._names, self._counts = list(state["names"]), list(state["counts"])
            self._restored = state["scalars"], state["correct"]

    def _local(self) -> tuple[Tensor, Tensor, bool]:
        """Scalars (steps, names) and the number of correct answers, in float64; whether there are answers."""
        rows = torch.zeros(0, len(self._names), dtype=torch.float64, device=self._device)
        correct = torch.zeros((), dtype=torch.float64, device=self._device)
        classified = bool(self._correct)
        if self._restored is not None:
            before, right = self._restored
            rows, classified = before.to(self._device), classified or right is not None
            correct = correct + (right or 0)
        if self._scalars:
            kinds = {one.dtype for one in self._scalars}
            scalars = self._scalars if len(kinds) == 1 else [one.double() for one in self._scalars]
            rows = torch.cat([rows, torch.stack(scalars).double().view(-1, len(self._names))])
        if self._correct:
            correct = correct + torch.cat(self._correct).sum()
        return rows, correct, classified
