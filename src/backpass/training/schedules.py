"""Learning rate schedules by name: ``cosine:warmup=0.05``, ``one-cycle``, ``step:every=30``, ``controlled``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LRScheduler, StepLR

from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_number
from backpass.rules.text import read_settings
from backpass.training.learning_rate import ControlledLR

__all__ = ["SCHEDULES", "Ramp", "Schedule", "make_schedule", "read_named"]


class Schedule(NamedTuple):
    """Scheduler, and the interval of its calls: step or epoch."""

    scheduler: LRScheduler
    after: Literal["step", "epoch"]


class Ramp(LRScheduler):
    """Raise the rate linearly from ``start`` to 1 times its value, then lower it to ``end`` times its value.

    Args:
        optimizer: optimizer whose rates are scheduled, each relative to its present value.
        steps: steps of the whole run; the last one brings the rate to ``end``.
        warmup: part of the steps in which it rises, in [0, 1).
        start: factor of the first step, where there is a warm-up.
        end: factor after the last step.
        cosine: lower the rate along half a cosine; otherwise linearly.

    Raises:
        BackpassError: a setting is out of its range.
    """

    def __init__(
        self, optimizer: Optimizer, steps: int, *, warmup: float, start: float, end: float, cosine: bool
    ) -> None:
        if not 0 <= warmup < 1:
            raise BackpassError(f"warmup must be a part of all steps, in [0, 1); got {warmup!r}.")
        self.steps, self.warmup, self.start, self.end, self.cosine = steps, warmup, start, end, cosine
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rates of the groups."""
        rising = self.warmup * self.steps
        if self.last_epoch < rising:
            factor = self.start + (1 - self.start) * self.last_epoch / rising
        else:
            part = min((self.last_epoch - rising) / (self.steps - rising), 1.0)
            left = (1 + math.cos(math.pi * part)) / 2 if self.cosine else 1 - part
            factor = self.end + (1 - self.end) * left
        return [base * factor for base in self.base_lrs]


def _cosine(optimizer: Optimizer, steps: int, epochs: int = 0, warmup: float = 0.0, end: float = 0.0) -> Schedule:
    """Cosine annealing to the last step after a linear warm-up; with ``epochs``, per epoch over that many epochs."""
    if epochs and (warmup or end):
        raise BackpassError("cosine counts epochs or has a warm-up: leave out epochs, or warmup and end.")
    if epochs:
        return Schedule(CosineAnnealingLR(optimizer, T_max=epochs), "epoch")
    if warmup or end:
        return Schedule(Ramp(optimizer, steps, warmup=warmup, start=0.01, end=end, cosine=True), "step")
    return Schedule(CosineAnnealingLR(optimizer, T_max=steps), "step")


def _linear(optimizer: Optimizer, steps: int, warmup: float = 0.0, start: float = 0.01, end: float = 0.0) -> Schedule:
    """Linear decay to the last step after a linear warm-up."""
    return Schedule(Ramp(optimizer, steps, warmup=warmup, start=start, end=end, cosine=False), "step")


def _one_cycle(
    optimizer: Optimizer, steps: int, warmup: float = 0.3, start: float = 0.04, end: float = 0.0
) -> Schedule:
    """One-cycle schedule: linear from 1/25 over the first 30 % of the steps, then cosine annealing to 0."""
    return Schedule(Ramp(optimizer, steps, warmup=warmup, start=start, end=end, cosine=True), "step")


def _step(optimizer: Optimizer, steps: int, every: int = 30, gamma: float = 0.1) -> Schedule:
    """Multiply the rate by gamma after every ``every`` epochs."""
    return Schedule(StepLR(optimizer, step_size=every, gamma=gamma), "epoch")


def _exponential(optimizer: Optimizer, steps: int, gamma: float = 0.98) -> Schedule:
    """Multiply the rate by gamma after each epoch."""
    return Schedule(ExponentialLR(optimizer, gamma=gamma), "epoch")


def _controlled(
    optimizer: Optimizer,
    steps: int,
    every: int = 1,
    window: float = 0.1,
    slope: float = 0.25,
) -> Schedule:
    """Follow the optimal control of SGD, measured while training."""
    scheduler = ControlledLR(optimizer, every=every, window=window, slope=slope)
    return Schedule(scheduler, "step")


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "controlled": _controlled,
    "cosine": _cosine,
    "exponential": _exponential,
    "linear": _linear,
    "one-cycle": _one_cycle,
    "step": _step,
}


def make_schedule(text: str, optimizer: Optimizer, steps: int) -> Schedule:
    """Return the scheduler of a text form.

    Args:
        text: a name of `SCHEDULES`, with its settings.
        optimizer: optimizer whose rate is scheduled, from its present value.
        steps: steps of the whole run.

    Raises:
        UnknownNameError: there is no such scheduler or setting.
        BackpassError: a value is out of its range.
    """
    name, settings = read_named("scheduler", text, SCHEDULES)
    if not all(is_number(value) and (value > 0 or (key == "end" and value == 0)) for key, value in settings.items()):
        raise BackpassError(f"the settings of the scheduler {text!r} must be numbers above 0.")
    try:
        return SCHEDULES[name](optimizer, steps, **settings)
    except BackpassError:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise BackpassError(f"the scheduler {text!r} cannot be made: {error}.") from error


def read_named(kind: str, text: str, known: dict[str, Callable[..., Any]]) -> tuple[str, dict[str, Any]]:
    """Return name and settings of a text form, as arguments of the function of that name.

    Args:
        kind: kind of the function's result, for messages.
        text: ``name`` or ``name:setting=value,...``.
        known: the functions; settings are their parameters with defaults, except the rate.

    Raises:
        UnknownNameError: there is no such name or setting.
        BackpassError: the text has another form.
    """
    name, settings = read_settings(text)
    if name not in known:
        raise UnknownNameError(kind, name, known)
    parameters = inspect.signature(known[name]).parameters.values()
    names = {p.name for p in parameters if p.default is not p.empty} - {"lr"}
    for setting in settings:
        if setting not in names:
            raise UnknownNameError(f"setting of {kind} {name!r}", setting, names)
    return name, settings
