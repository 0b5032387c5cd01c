"""Plain settings of a training run, shared by `Trainer`, recipe files and the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler

from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_number, is_whole
from backpass.training.averaging import read_average
from backpass.training.logs import Logger, check_loggers

__all__ = ["Settings", "precision", "seconds_between"]

_COUNTS = {
    **dict.fromkeys(("epochs", "accumulate", "log_every", "robust_every", "keep"), False),
    **dict.fromkeys(("batch_size", "evaluate_every", "max_steps"), True),
}
"""Whole numbers of at least 1, and whether None is allowed."""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None}
_TIME = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|h)")
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """Numbers, names and switches of a run; `Trainer` documents them.

    Raises:
        BackpassError: a setting is out of its range, or two contradict each other.
    """

    epochs: int
    batch_size: int | None = None
    accumulate: int = 1
    drop_last: bool | None = None
    max_steps: int | None = None
    scheduler: LRScheduler | str | None = None
    clip_norm: float | None = None
    normalize_gradient: Literal["model", "tensor"] | None = None
    average: str | None = None
    seed: int = 0
    dtype: torch.dtype | str | None = None
    channels_last: bool = False
    compile: bool | Mapping[str, Any] = False
    diverged_above: float | None = 10.0
    evaluate_every: int | None = 1
    evaluate_at: Sequence[int] = ()
    robust_every: int = 1
    checkpoint_every: int | str | None = None
    keep: int = 2
    log_every: int = 50
    loggers: Sequence[str | Logger] = ()

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise BackpassError(problem)

    def _problems(self) -> Iterator[str]:
        """Yield what is wrong with the settings, the first problem first."""
        for name, optional in _COUNTS.items():
            value = getattr(self, name)
            if not (is_whole(value, 1) or (optional and value is None)):
                yield f"{name} must be an int of at least 1{', or None' if optional else ''}; got {value!r}."
        for name, above in (("clip_norm", 0.0), ("diverged_above", 1.0)):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > above):
                yield f"{name} must be a finite number above {above:g}, or None; got {value!r}."
        if not isinstance(self.channels_last, bool):
            yield f"channels_last must be True or False, got {self.channels_last!r}."
        if self.drop_last is not None and not isinstance(self.drop_last, bool):
            yield f"drop_last must be True, False or None; got {self.drop_last!r}."
        if not isinstance(self.compile, bool | Mapping):
            yield f"compile must be True, False or a dict of torch.compile's arguments; got {self.compile!r}."
        if not is_whole(self.seed, -(2**63)):
            yield f"seed must be a whole number of 64 bits, got {self.seed!r}."
        if not isinstance(self.evaluate_at, Sequence) or not all(is_whole(one, 0) for one in self.evaluate_at):
            yield f"evaluate_at must be numbers of steps, such as (0, 100); got {self.evaluate_at!r}."
        if self.normalize_gradient not in (None, "model", "tensor"):
            raise UnknownNameError("normalize_gradient", str(self.normalize_gradient), ("model", "tensor"))
        if self.normalize_gradient is not None and self.clip_norm is not None:
            yield "normalize_gradient sets the norm of every gradient to 1: leave out clip_norm."
        if self.batch_size is not None and self.accumulate > self.batch_size:
            yield (
                f"accumulate={self.accumulate} parts of a batch_size={self.batch_size}: batch_size is the number of "
                "samples per optimizer step, which accumulate cuts into parts; it must be at least as large."
            )
        precision(self.dtype)
        seconds_between(self.checkpoint_every)
        check_loggers(self.loggers)
        if self.average is not None:
            read_average(self.average)


def precision(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype of autocast, or None for none.

    Raises:
        BackpassError: there is no such dtype, or it is not meant for autocast.
    """
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise UnknownNameError("dtype", dtype, _DTYPES)
        return _DTYPES[dtype]
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise BackpassError(f"dtype of autocast must be torch.bfloat16, torch.float16 or None; got {dtype!r}.")
    return dtype


def seconds_between(every: int | str | None) -> float | None:
    """Return the seconds between checkpoints, or None where they are counted in steps.

    Raises:
        BackpassError: ``every`` is neither a number of steps nor a time.
    """
    if every is None or is_whole(every, 1):
        return None
    match = _TIME.fullmatch(every) if isinstance(every, str) else None
    if match is None or not float(match[1]):
        raise BackpassError(
            f'checkpoint_every must be a number of steps of at least 1, or a time such as "10min", "30s" or "2h"; got '
            f"{every!r}."
        )
    return float(match[1]) * _SECONDS[match[2]]
