"""Schedulers of the learning rate by name: ``cosine``, ``step:every=30``, ``controlled``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, LRScheduler, StepLR

from backpass.errors import BackpassError
from backpass.lab.training.optimizers import read_named
from backpass.numbers import is_number
from backpass.training.learning_rate import ControlledLR

__all__ = ["SCHEDULES", "Schedule", "make_schedule"]


class Schedule(NamedTuple):
    """A scheduler, and after what it steps."""

    scheduler: LRScheduler
    after: Literal["step", "epoch"]


def _cosine(optimizer: Optimizer, steps: int, epochs: int = 0) -> Schedule:
    """Lr (1 + cos(pi t / T)) / 2: to 0 at the last step, or by epochs, to 0 after so many."""
    if epochs:
        return Schedule(CosineAnnealingLR(optimizer, T_max=epochs), "epoch")
    return Schedule(CosineAnnealingLR(optimizer, T_max=steps), "step")


def _linear(optimizer: Optimizer, steps: int) -> Schedule:
    """Lr (1 - t / T)."""
    return Schedule(LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps), "step")


def _step(optimizer: Optimizer, steps: int, every: int = 30, gamma: float = 0.1) -> Schedule:
    """Times gamma after every so many epochs."""
    return Schedule(StepLR(optimizer, step_size=every, gamma=gamma), "epoch")


def _exponential(optimizer: Optimizer, steps: int, gamma: float = 0.98) -> Schedule:
    """Times gamma after each epoch."""
    return Schedule(ExponentialLR(optimizer, gamma=gamma), "epoch")


def _controlled(
    optimizer: Optimizer,
    steps: int,
    every: int = 1,
    window: float = 0.1,
    threshold: float = 0.5,
    slope: float = 0.25,
) -> Schedule:
    """By the optimal control of SGD, measured while training."""
    scheduler = ControlledLR(optimizer, every=every, window=window, threshold=threshold, slope=slope)
    return Schedule(scheduler, "step")


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "controlled": _controlled,
    "cosine": _cosine,
    "exponential": _exponential,
    "linear": _linear,
    "step": _step,
}


def make_schedule(text: str, optimizer: Optimizer, steps: int) -> Schedule:
    """The scheduler of a text form.

    Args:
        text: a name of `SCHEDULES`, with its settings.
        optimizer: whose rate it moves, from its present value.
        steps: of the whole run.

    Raises:
        UnknownNameError: there is no such scheduler or setting.
        BackpassError: a value is out of its range.
    """
    name, settings = read_named("scheduler", text, SCHEDULES)
    if not all(is_number(value) and value > 0 for value in settings.values()):
        raise BackpassError(f"the settings of the scheduler {text!r} are numbers above 0.")
    try:
        return SCHEDULES[name](optimizer, steps, **settings)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise BackpassError(f"the scheduler {text!r} cannot be made: {error}.") from error
