"""Progress and result of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["Progress", "TrainingResult"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a run.

    Attributes:
        epoch: present epoch, from 1.
        epochs: epochs of the run.
        step: optimizer steps so far.
        steps: optimizer steps of the run.
        seconds: since the run was started or resumed.
        record: newest record of the log; its ``kind`` is ``"step"``, ``"epoch"``, ``"evaluation"`` or ``"diverged"``.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    seconds: float
    record: dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingResult:
    """Result of a run; the model has the last weights.

    Attributes:
        history: one record per finished epoch, also of those before a resumption: ``epoch`` (from 1), ``step``,
            ``loss`` and ``accuracy`` in [0, 1] over the training samples during the epoch, ``lr``, ``evaluation``,
            ``averaged``, ``robust``.
        evaluations: one record per number of steps in ``evaluate_at``, with ``step`` and ``evaluation``.
        diverged: reason for which the run was ended as diverged, or None.
        stopped: reason for which ``on_progress`` ended the run, or None.
        steps: optimizer steps, also of those before a resumption.
        seconds: since the run was started or resumed.
        averaged: averaged weights as a state dict, where ``average`` was set and has begun.
        folder: folder of checkpoints and logs, or None.
    """

    history: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    diverged: str | None
    stopped: str | None
    steps: int
    seconds: float
    averaged: dict[str, Tensor] | None = field(repr=False)
    folder: Path | None
