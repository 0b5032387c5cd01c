"""What a run tells while it goes on, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["Progress", "TrainingResult"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is.

    Attributes:
        epoch: the epoch that is running, from 1.
        epochs: how many there will be.
        step: optimizer steps so far.
        steps: how many there will be.
        seconds: since the run was started or resumed.
        record: the newest record of the log; its ``kind`` is ``"step"``, ``"epoch"`` or ``"diverged"``.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    seconds: float
    record: dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingResult:
    """What a run left behind; the model has the last weights.

    Attributes:
        history: one record per finished epoch, also of those before a resumption: ``epoch`` (from 1), ``step``,
            ``loss`` and ``accuracy`` in [0, 1] over the training samples as they were met, ``lr``, ``evaluation``,
            ``averaged``, ``robust``.
        diverged: why the run was stopped early, or None.
        steps: optimizer steps, also of those before a resumption.
        seconds: since the run was started or resumed.
        averaged: the averaged weights as a state dict, where ``average`` was set and has begun.
        folder: where checkpoints and logs are, or None.
    """

    history: list[dict[str, Any]]
    diverged: str | None
    steps: int
    seconds: float
    averaged: dict[str, Tensor] | None = field(repr=False)
    folder: Path | None
